"""`lf-jax parity`: a dump of another implementation replayed through ours, and the fault it finds when there is one."""

import functools
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_rollout import CONFIG, FRAME, MODEL, change, draw, make_model

import convert
from lf_jax import cache as kv
from lf_jax import checkpoint, cli, dit, flow, parity
from lf_jax.tokens import Grid

FORWARD = jax.jit(dit.forward, static_argnames=("budget", "grid", "sparsity"))
TOOL = pathlib.Path(__file__).resolve().parents[1] / "tools" / "dump_torch.py"


@pytest.fixture(scope="module")
def tool():
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("dump_torch", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def diffusers_run(tool, tmp_path_factory):
    """A dump of a tiny `WanTransformer3DModel`, and the folder that the converter made of the same model."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.ndim == 1 else p[0].numel() ** -0.5))
    x = torch.randn(1, 16, 3, 4, 6)
    text = torch.nn.functional.pad(torch.randn(1, 5, 8), (0, 0, 0, 507))
    with torch.no_grad(), tool.Dump(model, folder / "dump.safetensors"):
        model(x, torch.tensor([900]), text)
        model(x, torch.tensor([123]), 2 * text)  # guidance runs a second text through the same model
    model.save_pretrained(folder / "source" / "transformer")
    convert.convert("diffusers", folder / "source", folder / "model")
    return folder / "dump.safetensors", folder / "model"


def command(dump, model, *options):
    return cli.main(["parity", "--dump", str(dump), "--model", str(model), *options])


def perturbed(model, target, name, layer=None):
    """A converted folder whose parameter `name` is off by a little, in one layer of it."""
    part, module = checkpoint.load_component(model, "dit")
    arrays = {key: np.array(array) for key, array in checkpoint.flatten(module).items()}
    arrays[name][() if layer is None else layer] += 0.05
    checkpoint.save_component(target, "dit", part, arrays)
    checkpoint.save_settings(target, checkpoint.load_config(model))
    return target


@pytest.mark.torch
def test_diffusers_model_agrees(diffusers_run, capsys):
    assert command(*diffusers_run) == 0
    printed = capsys.readouterr().out
    assert "AGREES within 0.0001" in printed
    for row in ("call 0 patch embedding", "call 0 block 2", "call 1 block 0", "call 1 velocity"):
        assert row in printed


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "layer", "first"),
    [
        ("patch_embedding.kernel", None, "call 0 patch embedding"),
        ("blocks.ffn.down.kernel", 1, "call 0 block 1"),
        ("blocks.self_attention.qkv.bias", 2, "call 0 block 2"),
        ("head.linear.kernel", None, "call 0 velocity"),
    ],
)
def test_the_perturbed_layer_is_named(diffusers_run, tmp_path, capsys, name, layer, first):
    dump, model = diffusers_run
    assert command(dump, perturbed(model, tmp_path / "model", name, layer)) == 1
    assert f"DIFFERS: first over 0.0001 is {first}, off by" in capsys.readouterr().out


@pytest.mark.torch
def test_blocks_after_the_wrong_one_are_right_alone(diffusers_run, tmp_path):
    dump = parity.read(diffusers_run[0])
    assert "noise" not in dump.tensors  # the model keeps no cache: nothing to roll out
    folder = perturbed(diffusers_run[1], tmp_path / "model", "blocks.ffn.down.kernel", 0)
    settings = parity.settings_for(dump, checkpoint.load_config(folder))
    _, model = checkpoint.load_component(folder, "dit", dtype="float32")
    rows = {row.name: row for row in parity.replay(model, dump, settings)}
    assert rows["call 0 block 0"].alone > 1e-3
    for layer in (1, 2):
        assert rows[f"call 0 block {layer}"].relative > 1e-3
        assert rows[f"call 0 block {layer}"].alone < 1e-4


@pytest.mark.torch
def test_the_dump_command_runs_a_model_on_random_inputs(tool, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    (tmp_path / "mine.py").write_text(
        "import diffusers\n"
        "def make():\n"
        "    sizes = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1, text_dim=8, freq_dim=16)\n"
        "    return diffusers.WanTransformer3DModel(**sizes)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dump_torch.py", "mine:make", "dump", "--frames", "2", "--height", "4", "--width", "6"])
    monkeypatch.setattr("sys.path", [*sys.path])
    tool.main()
    dump = parity.read(tmp_path / "dump")
    assert dump.tensors["call.0.block.0"].shape == (1, 12, 24) and dump.tensors["text.0"].shape == (1, 512, 8)
    np.testing.assert_array_equal(dump.tensors["call.0.timestep"], np.full((1, 2), 625.0))


@pytest.fixture
def causal(tool):
    """A stand-in for a causal model: two blocks over flattened patches, called as Self-Forcing's pipelines do."""
    torch = pytest.importorskip("torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])

        def forward(self, *args, **kwargs):
            x = args[0]
            tokens = x.flatten(2).transpose(1, 2)[:, : x.shape[2] * 6]  # 6 tokens a frame
            for block in self.blocks:
                tokens = block(tokens)
            return -x

    model = Model()

    def call(x, t, start, text):
        times = torch.full(x.shape[:2], float(t))
        return model(x.permute(0, 2, 1, 3, 4), t=times, context=[text], current_start=start * 6)

    return model, call


def last(x):
    """[b, f, c, h, w] of torch to ours."""
    return x.permute(0, 1, 3, 4, 2).numpy()


@pytest.mark.torch
def test_dump_records_a_chunked_rollout(tool, causal, tmp_path):
    torch = pytest.importorskip("torch")
    (model, call), x0, fresh = causal, {}, []
    given, noise, text = torch.randn(1, 1, 4, 4, 6), torch.randn(1, 4, 4, 4, 6), torch.randn(3, 8)
    with tool.Dump(model, tmp_path / "dump", {"rollout": {"shift": 3.0}}, blocks_for=(0,)):
        call(given, 0, 0, text)
        for start in (1, 3):
            x = noise[:, start - 1 : start + 1]
            call(x, 1000, start, text)
            fresh.append(torch.randn_like(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
            torch.randn_like(x[:, :1])  # of another size: not the noise of a step
            call(fresh[-1], 500, start, text)
            x0[start] = torch.full_like(x, start)
            call(x0[start], 0, start, text)
    dump = parity.read(tmp_path / "dump")
    assert [c["start"] for c in dump.calls] == [0, 1, 1, 1, 3, 3, 3]
    assert dump.settings == {"rollout": {"shift": 3.0}}
    np.testing.assert_array_equal(dump.tensors["initial_latents"], last(given))
    np.testing.assert_array_equal(dump.tensors["noise"], last(noise))
    np.testing.assert_array_equal(dump.tensors["step_noise"], last(torch.cat(fresh, 1))[None])
    np.testing.assert_array_equal(dump.tensors["latents"], last(torch.cat([x0[1], x0[3]], 1)))
    np.testing.assert_array_equal(dump.tensors["call.2.velocity"], -dump.tensors["call.2.x"])
    np.testing.assert_array_equal(dump.tensors["call.2.timestep"], np.full((1, 2), 500.0))
    assert "call.0.block.1" in dump.tensors and "call.1.block.1" not in dump.tensors


@pytest.mark.torch
@pytest.mark.parametrize("sampler", ["unipc", "few_step"])
def test_dump_records_guidance(tool, causal, tmp_path, sampler):
    """Two branches a step and no noise between steps; a few-step sampler without that noise is no rollout to repeat."""
    torch = pytest.importorskip("torch")
    (model, call), x = causal, torch.randn(4, 1, 2, 4, 4, 6)
    texts = torch.randn(2, 3, 8)
    with tool.Dump(model, tmp_path / "dump", {"rollout": {"sampler": sampler}}):
        for chunk in (0, 1):
            for latents, t in ((x[chunk], 900), (x[chunk] / 2, 500), (x[2 + chunk], 0)):
                for text in texts:
                    call(latents, t, 2 * chunk, text)
    dump = parity.read(tmp_path / "dump")
    assert [c["text"] for c in dump.calls] == [0, 1] * 6
    if sampler == "few_step":
        assert "noise" not in dump.tensors
        return
    np.testing.assert_array_equal(dump.tensors["noise"], last(torch.cat([x[0], x[1]], 1)))
    np.testing.assert_array_equal(dump.tensors["latents"], last(torch.cat([x[2], x[3]], 1)))
    assert not {"step_noise", "initial_latents"} & dump.tensors.keys()


def recorded(settings=CONFIG, frames=9, batch=2):
    model, tensors, calls = rolled_out(settings, frames, batch)
    return model, {name: x.copy() for name, x in tensors.items()}, [dict(call) for call in calls]


@functools.cache
def rolled_out(settings, frames, batch):
    """A dump of our own passes, chunk by chunk in the order of Self-Forcing's pipeline."""
    model, grid = make_model(), Grid.of(settings)
    embeddings = draw(batch, 4, settings.model.text_dim, seed=1)
    text = dit.text_cache(model, embeddings)
    noise, step_noise = draw(batch, frames, *FRAME), draw(1, batch, frames, *FRAME, seed=4)
    cache = kv.empty(settings.model, grid, settings.cache, sparse=False, batch=batch, frames=frames)
    tensors, calls, latents = {"text.0": embeddings, "noise": noise, "step_noise": step_noise}, [], []

    def call(x, timestep, start):
        times = jnp.full(x.shape[:2], timestep, jnp.float32)
        velocity, new = FORWARD(model, x, times, text, cache, None, grid, settings.sparsity)
        name = f"call.{len(calls)}."
        tensors.update({name + "x": x, name + "timestep": times, name + "velocity": velocity})
        calls.append({"start": start, "text": 0})
        return velocity, new

    first, second = flow.warp(settings.rollout.timesteps, settings.rollout.shift)
    for start in range(0, frames, 3):
        here = slice(start, start + 3)
        x = noise[:, here]
        x0 = x - first / 1000 * call(x, first, start)[0]
        x = (1 - second / 1000) * x0 + second / 1000 * step_noise[0][:, here]
        latents.append(x - second / 1000 * call(x, second, start)[0])
        _, new = call(latents[-1], 0.0, start)
        cache = kv.append(cache, new, 3, 3)
    tensors["latents"] = jnp.concatenate(latents, 1)
    return model, {name: np.asarray(x) for name, x in tensors.items()}, calls


def written(path, tensors, calls, settings=None):
    metadata = {"format": "lf_jax.parity", "version": "1", "source": "test", "calls": json.dumps(calls)}
    save_file(tensors, path, metadata | {"settings": json.dumps(settings or {})})
    return path


def replayed(path, model, base=CONFIG):
    dump = parity.read(path)
    return parity.Report(tuple(parity.replay(model, dump, parity.settings_for(dump, base))), 1e-4)


def test_cached_calls_and_the_free_rollout_are_replayed(tmp_path):
    model, tensors, calls = recorded()
    report = replayed(written(tmp_path / "dump", tensors, calls), model)
    assert report.diverged is None and report.worst.relative < 1e-5
    assert [row.name for row in report.rows] == [f"call {i} velocity" for i in range(9)] + [
        f"chunk {i} latents" for i in range(3)
    ]


def test_the_dump_says_how_its_cache_was_kept(tmp_path):
    model, tensors, calls = recorded(change(cache=dict(window=4, sink=1)))
    del tensors["noise"]  # the calls are enough
    path = written(tmp_path / "dump", tensors, calls, {"cache": {"window": 4, "sink": 1}})
    assert replayed(path, model).diverged is None
    path = written(tmp_path / "dump", tensors, calls, {"cache": {"window": 4, "sink": 0}})
    assert replayed(path, model).diverged.name == "call 3 velocity"  # the first pass that sees 4 frames of 6


def test_noise_and_latents_are_compared_chunk_by_chunk(tmp_path):
    model, tensors, calls = recorded()
    tensors["step_noise"][:, :, 3:6] += 0.01
    report = replayed(written(tmp_path / "dump", tensors, calls), model)
    assert report.diverged.name == "chunk 1 latents"


def test_a_second_rollout_starts_with_an_empty_cache(tmp_path):
    model, tensors, calls = recorded()
    again = {
        name.replace(f"call.{i}.", f"call.{i + 9}."): x for i in range(9) for name, x in tensors.items() if f"call.{i}." in name
    }
    report = replayed(written(tmp_path / "dump", tensors | again, calls + calls), model)
    assert report.diverged is None and len(report.rows) == 18 + 3


def test_nan_is_a_divergence():
    row = parity.compare("x", np.array([np.nan, 1.0]), np.ones(2))
    report = parity.Report((parity.compare("w", np.ones(2), np.ones(2)), row), 1e-4)
    assert report.diverged is row and report.worst is row


def test_comparison_against_numbers_worked_out_by_hand():
    row = parity.compare("x", np.array([3.0, 4.0]), np.array([0.0, 4.0]))
    assert (row.max_abs, row.relative) == (3.0, 0.75) and row.cosine == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("change_dump", "message"),
    [
        (lambda tensors, calls: tensors.pop("call.1.velocity"), "lacks call.1.velocity"),
        (lambda tensors, calls: calls[3].update(start=4), "call 3 of the dump starts at frame 4, expected 0, 0 or 3"),
        (lambda tensors, calls: calls[0].update(start=3), "call 0 of the dump starts at frame 3, expected 0"),
        (lambda tensors, calls: tensors.update({"call.0.tokens": tensors["call.0.x"]}), "lacks the outputs of blocks"),
        (lambda tensors, calls: tensors.pop("step_noise"), "need step_noise in the dump"),
        (lambda tensors, calls: tensors.update({"text.0": tensors["text.0"][..., :5].copy()}), "embeddings are 5 wide"),
    ],
)
def test_a_dump_that_does_not_fit_is_refused(tmp_path, change_dump, message):
    model, tensors, calls = recorded()
    change_dump(tensors, calls)
    path = written(tmp_path / "dump", tensors, calls)
    with pytest.raises(ValueError, match=message):
        replayed(path, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": {"sinks": 3}}, "settings name sinks, which cache does not have"),
        ({"cache": {"window": 2, "sink": 1}}, "must hold"),
        ({"rollout": {"sampler": "unipc", "guidance_scale": 3.0}}, "needs text.0 and text.1 in the dump"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    model, tensors, calls = recorded()
    path = written(tmp_path / "dump", tensors, calls, settings)
    with pytest.raises(ValueError, match=message):
        replayed(path, model)


def test_bad_files_end_in_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": np.zeros(2)}, tmp_path / "other")
    model, tensors, calls = recorded()
    good = written(tmp_path / "dump", tensors, calls)
    for dump, message in (
        (tmp_path / "text", "is not a safetensors file"),
        (tmp_path / "other", "is not a dump"),
        (tmp_path / "missing", "missing"),
        (good, "nowhere"),
    ):
        assert command(dump, tmp_path / "nowhere") == 2
        assert message in capsys.readouterr().err


def test_the_command_runs_without_torch(tmp_path, capsys):
    """On a dump of all chunks, with a folder written by us."""
    model, tensors, calls = recorded()
    checkpoint.save_component(tmp_path / "model", "dit", MODEL, model)
    checkpoint.save_component(tmp_path / "model", "vae", CONFIG.vae, {})  # only its config is read: latents of 4 channels
    checkpoint.save_settings(tmp_path / "model", CONFIG)
    path = written(tmp_path / "dump", tensors, calls)
    assert command(path, tmp_path / "model") == 0
    assert "12 tensors" in capsys.readouterr().out
    assert load_file(path)["latents"].shape == (2, 9, *FRAME)
