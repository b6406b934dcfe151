"""Runs the original Self-Forcing pipeline on a tiny random model and dumps it for `lf-jax parity`.

    git clone https://github.com/guandeh17/Self-Forcing && git -C Self-Forcing checkout 33593df
    python tools/self_forcing_oracle.py Self-Forcing OUT

Needs torch (CPU), diffusers, transformers, einops, ftfy and regex; no download, no GPU. It writes OUT/model.pt in the
layout of a released checkpoint and OUT/<case>.safetensors for every case. What runs is the checkout's own
`CausalInferencePipeline` and `CausalDiffusionInferencePipeline`, `WanDiffusionWrapper.forward`, the schedulers and
`CausalWanModel`. Replaced from outside, because they need a GPU, a download or the one released size:

* the wrapper's constructor (it downloads), the text encoder and the VAE (given embeddings; latents are returned);
* a helper module that asks for a GPU as soon as it is imported, and the package files that import more than is needed;
* flash attention, by `scaled_dot_product_attention` in the dtype of its inputs (the checkout would round to bfloat16);
* the numbers 30 layers, 12 heads of 128, 1560 tokens a frame and 32760 tokens of cache, by the tiny model's.
"""

import argparse
import importlib.machinery
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from dump_torch import Dump

TINY = dict(dim=256, ffn_dim=480, freq_dim=256, text_dim=48, num_heads=2, num_layers=3)  # head_dim 128, as released
TEXT_LEN, PROMPT_LEN = 512, 17
HEIGHT, WIDTH = 8, 12  # of a latent frame: 24 tokens
BLOCKS_FOR = (0, 3, 4, 8, 13, 34)  # calls whose block outputs are kept: denoising and cache passes, early and late
STEPS = [1000, 750, 500, 250]
SHIFT = 5.0

# name: frames of noise, window, sink, independent first frame, frames given
CASES = {
    "global": (21, -1, 0, False, 0),
    "window6_sink1": (27, 6, 1, False, 0),
    "window6_sink3": (27, 6, 3, False, 0),
    "window9_sink2": (30, 9, 2, False, 0),
    "first_frame_alone": (22, -1, 0, True, 0),
    "image_to_video": (18, -1, 0, True, 1),
    "extension": (15, -1, 0, False, 6),
    "guided": (9, -1, 0, False, 0),  # the many-step pipeline: UniPC, two branches
}
GUIDANCE, GUIDED_STEPS = 3.0, 8


def import_checkout(path):
    """The checkout's modules, without the package files that import what only a GPU machine has."""
    sys.path.insert(0, str(path))
    for name in ("wan", "wan.modules", "pipeline"):
        module = types.ModuleType(name)
        module.__path__ = [str(path.joinpath(*name.split(".")))]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    memory = types.ModuleType("demo_utils.memory")  # asks for a CUDA device as soon as it is imported
    memory.gpu = torch.device("cpu")
    for name in ("get_cuda_free_memory_gb", "DynamicSwapInstaller", "move_model_to_device_with_memory_preservation"):
        setattr(memory, name, None)
    sys.modules["demo_utils.memory"] = memory
    torch.cuda.current_device = lambda: "cpu"  # a default argument of the text encoder

    import pipeline.causal_diffusion_inference as guided
    import pipeline.causal_inference as inference
    import utils.wan_wrapper as wrapper
    import wan.modules.causal_model as causal
    import wan.modules.model as base

    def attention(q, k, v, k_lens=None, **_):
        if k_lens is not None:
            raise ValueError("this attention knows no lengths")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    causal.attention = base.flash_attention = attention
    return inference.CausalInferencePipeline, guided.CausalDiffusionInferencePipeline, wrapper, causal


def randomize(model, seed=0):
    """Activations of order one, nothing left at zero or one, and attention that looks at few keys: the past matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.copy_((1 + 0.2 * noise) * (2 if "attn.norm" in name else 1))
            elif p.ndim == 1:
                p.copy_(0.1 * noise)
            elif "modulation" in name:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)


def build(parts, window, sink, alone, guided, dtype):
    """One of the checkout's pipelines around a tiny random model."""
    few_step, many_step, wrapper, causal = parts
    frame = HEIGHT // 2 * (WIDTH // 2)

    class Wrapper(wrapper.WanDiffusionWrapper):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.model = causal.CausalWanModel(**TINY, local_attn_size=window, sink_size=sink).eval()
            randomize(self.model)
            for block in self.model.blocks:
                block.self_attn.max_attention_size = 10**9 if window == -1 else window * frame
            self.uniform_timestep = False
            self.scheduler = wrapper.FlowMatchScheduler(shift=SHIFT, sigma_min=0.0, extra_one_step=True)
            self.scheduler.set_timesteps(1000, training=True)
            self.seq_len = 10**9
            self.post_init()

    class Given(torch.nn.Module):
        def forward(self, text_prompts):
            return {"prompt_embeds": text_prompts if torch.is_tensor(text_prompts) else text_prompts[0]}

        def decode_to_pixel(self, latents, **_):
            return latents

    class Pipeline(many_step if guided else few_step):
        def _initialize_kv_cache(self, batch_size, dtype, device):
            frames = 64 if window == -1 else window
            shape = [batch_size, frames * frame, TINY["num_heads"], TINY["dim"] // TINY["num_heads"]]

            def empty():
                cache = {name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")}
                return cache | {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}

            self.kv_cache1, self.kv_cache_pos, self.kv_cache_neg = (
                [empty() for _ in self.generator.model.blocks] for _ in "123"
            )

    args = types.SimpleNamespace(
        denoising_step_list=STEPS,
        warp_denoising_step=True,
        num_frame_per_block=3,
        independent_first_frame=alone,
        context_noise=0,
        num_train_timestep=1000,
        timestep_shift=SHIFT,
        guidance_scale=GUIDANCE,
        negative_prompt=None,
    )
    pipe = Pipeline(args, "cpu", generator=Wrapper().to(dtype), text_encoder=Given(), vae=Given())
    pipe.num_transformer_blocks, pipe.frame_seq_length, pipe.sampling_steps = TINY["num_layers"], frame, GUIDED_STEPS
    return pipe


def prompt(batch, generator):
    text = torch.randn(batch, TEXT_LEN, TINY["text_dim"], generator=generator)
    text[:, PROMPT_LEN:] = 0
    return text


def run_case(parts, name, out, dtype=torch.float32, batch=1):
    frames, window, sink, alone, given = CASES[name]
    guided = name == "guided"
    pipe = build(parts, window, sink, alone, guided, dtype)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, frames, 16, HEIGHT, WIDTH, generator=generator).to(dtype)
    text = prompt(batch, generator).to(dtype)
    initial = torch.randn(batch, given, 16, HEIGHT, WIDTH, generator=generator).to(dtype) if given else None
    pipe.args.negative_prompt = prompt(batch, generator).to(dtype)
    settings = {
        "cache": {"window": None if window == -1 else window, "sink": sink},
        "rollout": {"chunk_frames": 3, "timesteps": STEPS, "warp": True, "shift": SHIFT, "independent_first_frame": alone},
    }
    if guided:
        many = {"sampler": "unipc", "num_inference_steps": GUIDED_STEPS, "guidance_scale": GUIDANCE}
        settings["rollout"] |= many
    torch.manual_seed(2)
    draw = torch.randn_like
    torch.randn_like = lambda x, **_: torch.randn(x.shape).to(x.dtype)  # the same noise for every dtype
    try:
        with torch.no_grad(), Dump(pipe.generator.model, str(out), settings, BLOCKS_FOR):
            pipe.inference(noise, text, initial_latent=initial, return_latents=True)
    finally:
        torch.randn_like = draw
    return pipe.generator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of Self-Forcing")
    parser.add_argument("out", type=Path, help="folder to write; made if missing")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = import_checkout(options.checkout.resolve())
    dtype = getattr(torch, options.dtype)
    for name in options.cases:
        generator = run_case(parts, name, options.out / f"{name}.safetensors", dtype, options.batch)
    if dtype == torch.float32:
        torch.save({"generator": generator.state_dict()}, options.out / "model.pt")


if __name__ == "__main__":
    main()
