"""Dumps what a PyTorch Wan model computes, for `lf-jax parity`. Needs torch and safetensors; knows nothing of lf_jax.

As a library, in your own environment, around whatever already runs there:

    with Dump(pipeline.generator.model, "dump.safetensors", settings={"rollout": {"shift": 5.0}}):
        pipeline.inference(noise=noise, text_prompts=prompts)

As a command, with one forward pass on random inputs of a bidirectional model that a function of yours returns:

    python tools/dump_torch.py my_module:make_model dump.safetensors --frames 3 --height 8 --width 12

It hooks models that have a list `blocks` and are called with (latents, timestep, text): `WanModel` of Wan2.1,
`CausalWanModel` of Self-Forcing and LongLive, `WanTransformer3DModel` of diffusers. `docs/parity.md` describes the file.
"""

import argparse
import importlib
import json
import sys

import torch
from safetensors.torch import save_file

NAMES = (("x", "hidden_states"), ("t", "timestep"), ("context", "encoder_hidden_states"))


class Dump:
    """Records every call of `model` until the `with` block ends, then writes one safetensors file.

    Args:
        model: a `torch.nn.Module` with a list of blocks at `model.blocks`.
        path: the file to write.
        settings: {"cache": {...}, "rollout": {...}}: fields of lf_jax's `Cache` and `Rollout` that describe how the
            model was run (window, sink, shift, timesteps, ...). What is left out is taken from the converted model.
        blocks_for: the calls, counted from 0, whose block outputs are kept; None keeps all. A block output has
            batch * tokens * width numbers: choose a few calls of a model of full size.
    """

    def __init__(self, model, path, settings=None, blocks_for=None):
        self.model, self.path, self.settings, self.blocks_for = model, path, settings or {}, blocks_for
        self.tensors, self.calls, self.texts, self.handles = {}, [], [], []
        self.chunked = True  # until a call comes without a start: the model keeps no cache

    def __enter__(self):
        self.handles.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True))
        for layer, block in enumerate(self.model.blocks):
            self.handles.append(block.register_forward_hook(lambda _m, args, out, layer=layer: self._block(layer, args, out)))
        self.handles.append(self.model.register_forward_hook(self._after))
        self.randn_like = torch.randn_like
        torch.randn_like = self._draw
        return self

    def __exit__(self, kind, error, trace):
        torch.randn_like = self.randn_like
        for handle in self.handles:
            handle.remove()
        if kind is None:
            if self.chunked:
                self._rollout()
            self._save()

    def _before(self, _model, args, kwargs):
        x, timestep, text = (_argument(args, kwargs, i, names) for i, names in enumerate(NAMES))
        x = _latents(x)
        frames = x.shape[1]
        timestep = torch.as_tensor(timestep).detach().float().cpu().reshape(-1, 1) if _rank(timestep) < 2 else timestep
        every = max(1, timestep.shape[1] // frames)  # some models take a timestep a token
        timestep = timestep[:, ::every].detach().float().cpu().expand(x.shape[0], frames)
        start, call = kwargs.get("current_start"), len(self.calls)
        self.chunked &= start is not None
        self.calls.append({"start": int(start or 0), "text": self._text(text)})  # start: in tokens until _block
        self.tensors[f"call.{call}.x"] = x
        self.tensors[f"call.{call}.timestep"] = timestep.clone()

    def _block(self, layer, args, out):
        out = out[0] if isinstance(out, tuple) else out
        call = len(self.calls) - 1
        keep = self.blocks_for is None or call in self.blocks_for
        if layer == 0:
            frames = self.tensors[f"call.{call}.x"].shape[1]
            self.calls[call]["start"] //= out.shape[1] // frames  # tokens to frames
            if keep:
                self.tensors[f"call.{call}.tokens"] = _keep(args[0])
        if keep:
            self.tensors[f"call.{call}.block.{layer}"] = _keep(out)

    def _after(self, _model, _args, out):
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        self.tensors[f"call.{len(self.calls) - 1}.velocity"] = _latents(out)

    def _draw(self, *args, **kwargs):
        """`torch.randn_like`; a draw as large as the last call's latents is the noise of the next step."""
        noise = self.randn_like(*args, **kwargs)
        x = self.tensors.get(f"call.{len(self.calls) - 1}.x")
        if x is not None and noise.numel() == x.numel():
            b, f, h, w, c = x.shape
            self.tensors[f"call.{len(self.calls) - 1}.renoise"] = _keep(noise.reshape(b, f, c, h, w).permute(0, 1, 3, 4, 2))
        return noise

    def _text(self, text):
        rows = max(len(u) for u in text)
        text = torch.stack([torch.nn.functional.pad(_keep(u), (0, 0, 0, rows - len(u))) for u in text])
        for index, known in enumerate(self.texts):
            if torch.equal(known, text):
                return index
        self.texts.append(text)
        return len(self.texts) - 1

    def _rollout(self):
        """Noise and latents of the video, if the calls were a rollout chunk by chunk.

        A chunk is a run of calls with one start: its first input is noise, its last one the finished chunk on its way
        into the cache. A chunk of a single call was given (image-to-video, extension). Guidance doubles the calls; those
        with the first text tell all.
        """
        chunks, last = [], None
        for call, fields in enumerate(self.calls):
            if fields["start"] != last:
                chunks.append([])
            if fields["text"] == 0:
                chunks[-1].append(call)
            last = fields["start"]
        given = [c for c in chunks if len(c) == 1]
        made = [c for c in chunks if len(c) > 1]
        drawn = [[f"call.{i}.renoise" for i in c if f"call.{i}.renoise" in self.tensors] for c in made]
        renoises = self.settings.get("rollout", {}).get("sampler", "few_step") == "few_step"
        if not made or any(len(names) != (len(c) - 2 if renoises else 0) for names, c in zip(drawn, made, strict=True)):
            return
        take = self.tensors.__getitem__
        if given:
            self.tensors["initial_latents"] = torch.cat([take(f"call.{c[0]}.x") for c in given], 1)
        self.tensors["noise"] = torch.cat([take(f"call.{c[0]}.x") for c in made], 1)
        self.tensors["latents"] = torch.cat([take(f"call.{c[-1]}.x") for c in made], 1)
        steps = [torch.cat([take(name) for name in step], 1) for step in zip(*drawn, strict=True)]
        if steps:
            self.tensors["step_noise"] = torch.stack(steps)

    def _save(self):
        tensors = {k: v for k, v in self.tensors.items() if not k.endswith(".renoise")}
        tensors |= {f"text.{i}": text for i, text in enumerate(self.texts)}
        metadata = {
            "format": "lf_jax.parity",
            "version": "1",
            "source": f"{type(self.model).__module__}.{type(self.model).__name__}, torch {torch.__version__}",
            "calls": json.dumps(self.calls),
            "settings": json.dumps(self.settings),
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.path, metadata)
        print(f"{self.path}: {len(self.calls)} calls, {len(tensors)} tensors", file=sys.stderr)


def _argument(args, kwargs, index, names):
    for name in names:
        if name in kwargs:
            return kwargs[name]
    if index >= len(args):
        raise TypeError(f"the model was called without any of {names}: {len(args)} arguments and {sorted(kwargs)}")
    return args[index]


def _rank(timestep):
    return torch.as_tensor(timestep).ndim


def _keep(x):
    return x.detach().float().cpu().clone()


def _latents(x):
    """[b, c, f, h, w], or a list of [c, f, h, w], as [b, f, h, w, c]."""
    x = torch.stack(list(x)) if isinstance(x, list | tuple) else x
    return _keep(x.permute(0, 2, 3, 4, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="module:function, a function without arguments that returns the model")
    parser.add_argument("out", help="the safetensors file to write")
    parser.add_argument("--frames", type=int, default=3, help="latent frames")
    parser.add_argument("--height", type=int, default=8, help="latent rows")
    parser.add_argument("--width", type=int, default=12, help="latent columns")
    parser.add_argument("--timestep", type=float, default=625.0, help="in 0..1000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    sys.path.insert(0, "")
    module, function = options.model.split(":")
    model = getattr(importlib.import_module(module), function)().eval()
    diffusers = "in_channels" in model.config
    channels = model.config["in_channels" if diffusers else "in_dim"]
    text_dim = model.config["text_dim"] if diffusers else model.text_embedding[0].in_features
    torch.manual_seed(options.seed)
    weight = next(model.parameters())
    x = torch.randn(1, channels, options.frames, options.height, options.width).to(weight)
    text = torch.randn(1, 512 if diffusers else model.text_len, text_dim).to(weight)
    timestep = torch.full((1,), options.timestep, device=weight.device)
    with torch.no_grad(), Dump(model, options.out):
        if diffusers:
            model(x, timestep, text)
        else:
            _, down, across = model.patch_size
            model(list(x), timestep, list(text), options.frames * (options.height // down) * (options.width // across))


if __name__ == "__main__":
    main()
