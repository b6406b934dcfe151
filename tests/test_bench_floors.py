"""Floors against numbers known otherwise, and kernels by the scope that they were written in."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx

from lf_jax import config, presets, vae
from lf_jax.bench import ceilings, floors, stages
from lf_jax.bench.ceilings import Ceilings, measure
from lf_jax.bench.floors import Work
from lf_jax.checkpoint import abstract
from pallas_kernels import platform

LARGE = presets.load("light_forcing_1_3b")


def test_the_transformer_of_the_1_3b_model():
    chunks = floors.transformer(LARGE)
    assert len(chunks) == 7 and all(set(chunk) < set(stages.STAGES) for chunk in chunks)
    last = chunks[-1]
    launches = 5 * 30  # passes, layers; 4608 tokens of 1536 features
    assert last["ffn"].linear == 4 * 4608 * 1536 * 8960 * launches
    assert last["qkv"].linear == 3 * last["output"].linear == 3 * 2 * 4608 * 1536**2 * launches
    assert last["cross-attention"].linear == 2 * last["output"].linear
    assert last["cross-attention"].other == 4 * 4608 * 512 * 1536 * launches
    assert last["attention"].other == 4 * 4608 * 51 * 64 * 1536 * launches  # the budget of the seventh chunk: 51 of 504 blocks
    assert last["qkv"].bytes == 2 * (4 * 4608 * 1536 + 3 * 1536**2) * launches
    assert last["norm + rope"].bytes == 2 * 4 * 4608 * 1536 * launches
    assert last["selection"].bytes == 4 * (72 + 504) * 1536 * launches
    assert last["copies"].bytes == 2 * 2 * 2 * 30 * 4608 * 1536
    rows = 5 * 3  # passes, frames
    embedded = 2 * 5 * 4608 * 64 * 1536 + 2 * rows * (256 * 1536 + 7 * 1536**2)
    assert last["embeddings"].linear == embedded


def test_linear_layers_in_8_bits():
    full = floors.transformer(LARGE)[-1]
    eight = floors.transformer(dataclasses.replace(LARGE, model=dataclasses.replace(LARGE.model, linears="fp8")))[-1]
    assert [name for name, work in eight.items() if work.eight_bits] == ["qkv", "output", "cross-attention", "ffn"]
    assert all((full[name].linear, full[name].other) == (work.linear, work.other) for name, work in eight.items())
    assert eight["output"].bytes == (3 * 4608 * 1536 + 1536**2) * 5 * 30


def test_the_transformer_of_a_dense_model_reads_all_it_sees():
    dense = dataclasses.replace(LARGE, sparsity=config.Sparsity())
    chunks = floors.transformer(dense)
    for number, chunk in enumerate(chunks, start=1):
        assert chunk["attention"].other == 4 * 4608 * (4608 * number) * 1536 * 5 * 30
        assert chunk["selection"] == Work()
    guided = dataclasses.replace(dense.rollout, sampler="euler", guidance_scale=5.0, num_inference_steps=10)
    doubled = floors.transformer(dataclasses.replace(dense, rollout=guided))
    assert doubled[0]["ffn"].linear == pytest.approx(2 * 11 / 5 * chunks[0]["ffn"].linear)


VAES = {
    "wan": config.Vae(base=4, dtype="float32"),
    "tiny": config.Vae(kind="tiny", widths=(8, 6, 4, 4), temporal=(True, True, False), dtype="float32"),
}


@pytest.mark.parametrize("kind", VAES)
def test_the_decoder_counts_what_the_network_does(kind):
    part = VAES[kind]
    settings = config.Config(vae=part, video=config.Video(height=32, width=48, num_frames=21))
    module = jax.eval_shape(lambda: vae.build(part, rngs=nnx.Rngs(0)))
    latents = jax.ShapeDtypeStruct((1, 3, 4, 6, part.channels), jnp.float32)
    past = None
    for work in floors.decoder(settings):
        traced = jax.make_jaxpr(vae.decode_chunk)(module, latents, past)
        assert work.other == products(traced.jaxpr)
        _, past = jax.eval_shape(vae.decode_chunk, module, latents, past)


def products(jaxpr) -> int:
    """FLOPs of all products of matrices and convolutions."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += sum(times * products(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            first, kernel = (operand.aval.shape for operand in equation.invars)
            if equation.primitive.name == "dot_general":
                contracted = math.prod(first[axis] for axis in equation.params["dimension_numbers"][0][0])
            else:
                contracted = math.prod(kernel[:-1])
            total += 2 * math.prod(equation.outvars[0].aval.shape) * contracted
    return total


def test_the_text_encoder_by_its_parameters():
    part = config.Text()
    weights = {name: leaf for name, leaf in jax.tree_util.tree_flatten_with_path(abstract(part).blocks)[0]}
    products = sum(leaf.size for leaf in weights.values() if leaf.ndim == 3 and min(leaf.shape[1:]) > 64)
    assert floors.text_encoder(part).bytes == 2 * products
    assert floors.text_encoder(part).other == 2 * 512 * products + 4 * 24 * 512**2 * 64 * 64


def test_pixels_of_a_video():
    assert floors.pixel_bytes(LARGE) == [3 * 512 * 768 * n for n in (9, 12, 12, 12, 12, 12, 12)]


def test_a_floor_is_the_longer_of_products_and_bytes():
    limits = Ceilings(product=1e12, eight_bits=2e12, copy=1e9, to_host=1.0)
    assert limits.floor(Work(linear=3e12, other=1e12, bytes=1e9)) == 4000
    assert limits.floor(Work(linear=3e12, other=1e12, bytes=6e9)) == 6000
    assert limits.floor(Work(linear=3e12, other=1e12, eight_bits=True)) == 2500
    assert dataclasses.replace(limits, eight_bits=None).floor(Work(linear=3e12, eight_bits=True)) == 3000
    assert Work(1.0, 2.0, 3.0) * 2 + Work(1.0, eight_bits=True) == Work(3.0, 4.0, 6.0, True)


def test_what_this_machine_reaches():
    limits = measure("float32")
    assert limits.product > 1e8 and limits.copy > 1e7 and limits.to_host > 1e7 and limits.eight_bits is None


def test_float8_where_the_device_has_it(monkeypatch):
    here = platform.device()
    monkeypatch.setattr(platform, "device", lambda: dataclasses.replace(here, compute_capability=(8, 9)))
    monkeypatch.setitem(ceilings.SIDE, here.backend, 64)
    assert measure("bfloat16").eight_bits > 1e6


TEXT = """
%fused_reduce (param_0.6: f32[4,512]) -> bf16[512] {
  %param_0.6 = f32[4,512]{1,0} parameter(0), metadata={scheduling_name="param_0.6"}
  %reduce.4 = f32[512]{0} reduce(%param_0.6), metadata={op_name="jit(g)/while/body/block/ffn/dot_general" stack_frame_id=5}
  %tanh.1 = f32[512]{0} tanh(%reduce.4), metadata={op_name="jit(g)/while/body/block/ffn/tanh"}
  %tanh.2 = f32[512]{0} tanh(%tanh.1), metadata={op_name="jit(g)/while/body/block/ffn/tanh"}
  ROOT %convert.2 = bf16[512]{0} convert(%tanh.2), metadata={scheduling_name="convert.2"}
}

%region_0.2 (arg.1: (s32[], bf16[512])) -> (s32[], bf16[512]) {
  %gemm_fusion = f32[4,512]{1,0} fusion(%x), kind=kCustom, calls=%gemm, metadata={op_name="jit(g)/block/attention/qkv/dot"}
  %loop_reduce_fusion = bf16[512]{0} fusion(%gemm_fusion), kind=kLoop, calls=%fused_reduce, metadata={scheduling_name="a"}
  %mosaic.3 = (f32[4]{0}, /*index=1*/f32[4]{0}) custom-call(%x), metadata={op_name="g/block/attention/attend/call;x/head/y"}
  %fusion-start = ((bf16[4]), u32[]) fusion-start(%w), kind=kLoop, calls=%slice, metadata={op_name="jit(g)/while/dynamic_slice"}
  ROOT %copy.7 = bf16[512]{0} copy(%loop_reduce_fusion)
}

ENTRY %main.4 (x.1: bf16[512], w.1: bf16[4,512,512]) -> bf16[512] {
  %while.5 = (s32[], bf16[512]{0}) while(%tuple), condition=%c, body=%region_0.2, metadata={op_name="jit(g)/block/ffn/while"}
  %call.1 = bf16[512]{0} call(%tuple), to_apply=%parallel
  ROOT %loop_add_fusion.1 = bf16[512]{0} fusion(%while.5), kind=kLoop, calls=%add, metadata={op_name="jit(g)/jit(ffn)/add"}
}
"""


def test_kernels_by_the_scope_of_their_instruction():
    paths = stages.instructions(TEXT)
    assert paths["while.5"] is None and paths["call.1"] is None
    assert paths["loop_reduce_fusion"] == "jit(g)/while/body/block/ffn/tanh"  # of what is inside it
    names = ["while.5", "gemm_fusion", "loop_reduce_fusion", "loop_reduce_fusion", "mosaic.3", "fusion-start", "copy.7"]
    events = [(name, 2.0**i) for i, name in enumerate([*names, "loop_add_fusion.1", "of another program"])]
    found = {stage: ms for stage, ms in stages.attribute(events, paths).items() if ms}
    assert found == {"qkv": 2, "ffn": 4 + 8, "attention": 16, "copies": 32 + 64, "other": 128}
    with pytest.raises(RuntimeError, match="saw no kernel"):
        stages.attribute([("of another program", 1.0)], paths)


def test_a_program_by_its_scopes():
    def network(x, weights):
        def layer(x, w):
            with jax.named_scope("block"):
                with jax.named_scope("attention"), jax.named_scope("qkv"):
                    x = x @ w
                with jax.named_scope("ffn"):
                    return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    x, weights = jnp.ones((128, 128)), jnp.ones((4, 128, 128))
    program = stages.compiled(jax.jit(network).lower(x, weights))
    result, found = stages.measure(program, lambda: program(x, weights))
    assert jnp.array_equal(result, network(x, weights))
    assert found["qkv"] > 0 and found["ffn"] > 0
    assert not any(found[stage] for stage in stages.STAGES if stage not in ("qkv", "ffn", "copies", "other"))
