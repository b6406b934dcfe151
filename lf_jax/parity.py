"""Replays what another implementation computed, dumped by `tools/dump_torch.py`, through our model and says where they part.

Two replays of one file, `docs/parity.md` describes its format:

    calls     every forward pass on the dumped inputs, the cache filled by our own passes; block by block where the
              dump has block outputs. An error here belongs to one pass.
    rollout   the whole video from the dumped noise. An error here has travelled through all steps and chunks before.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lf_jax import attention, config
from lf_jax import cache as kv
from lf_jax.arrays import Array, Float
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.chunk import branches, draws
from lf_jax.config import Config, check
from lf_jax.dit import TextCache, WanDiT, forward, text_cache
from lf_jax.dit.block import Block, SelfAttention
from lf_jax.dit.model import embed_time, over_layers, patchify, turns
from lf_jax.rollout import initial_state, prefill, rollout
from lf_jax.tokens import Grid, chunk_lengths

# Compiled once a process for every replay of one size.
_append = jax.jit(kv.append, static_argnames=("frames", "next_frames"))
_forward = jax.jit(forward, static_argnames=("budget", "grid", "sparsity"))
_prefill = jax.jit(prefill, static_argnames="config")
_rollout = jax.jit(rollout, static_argnames="config")
_text_cache = jax.jit(text_cache)

FORMAT, VERSION = "lf_jax.parity", "1"
TINY = 1e-30  # a dumped tensor of zeros divides nothing by zero


@dataclasses.dataclass(frozen=True)
class Row:
    """One dumped tensor beside ours."""

    name: str
    max_abs: float
    relative: float  # |ours - theirs| / |theirs|, Euclidean norms
    cosine: float
    alone: float | None = None  # of a block: `relative` when the block reads the dumped output of the block before

    @property
    def error(self) -> float:
        """What the verdict goes by: of a block, the error that it adds itself."""
        return self.relative if self.alone is None else self.alone


@dataclasses.dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    tolerance: float

    @property
    def diverged(self) -> Row | None:
        """The first tensor, in the order they were computed, that is over the tolerance or not finite."""
        return next((row for row in self.rows if not row.error <= self.tolerance), None)

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: float("inf") if np.isnan(row.error) else row.error)


@dataclasses.dataclass(frozen=True)
class Dump:
    """A dump file, its tensors in memory."""

    tensors: Mapping[str, np.ndarray]
    calls: tuple[Mapping[str, int], ...]  # {"start": first absolute frame, "text": which of the texts}
    settings: Mapping[str, Mapping[str, Any]]  # fields of `config.Cache` and `config.Rollout`
    source: str


def read(path: Path) -> Dump:
    """
    Raises:
        ValueError: if the file is not a dump, or lacks a tensor that its description promises.
    """
    try:
        with safe_open(path, "np") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    kind = metadata.get("format"), metadata.get("version")
    check(kind == (FORMAT, VERSION), f"{path} is not a dump: format and version are {kind}, expected {(FORMAT, VERSION)}")
    calls = tuple(json.loads(metadata["calls"]))
    needed = [f"call.{i}.{name}" for i in range(len(calls)) for name in ("x", "timestep", "velocity")]
    missing = [name for name in [*needed, *(f"text.{call['text']}" for call in calls)] if name not in tensors]
    check(not missing, f"{path} lacks {', '.join(missing)}")
    return Dump(tensors, calls, json.loads(metadata["settings"]), metadata["source"])


def compare(name: str, ours: Array | np.ndarray, theirs: np.ndarray, alone: Array | None = None) -> Row:
    """
    Raises:
        ValueError: if the shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    check(ours.shape == theirs.shape, f"{name}: ours has shape {ours.shape}, the dump {theirs.shape}")
    return Row(
        name,
        max_abs=float(np.abs(ours - theirs).max()),
        relative=_relative(ours, theirs),
        cosine=float((ours * theirs).sum() / max(np.linalg.norm(ours) * np.linalg.norm(theirs), TINY)),
        alone=None if alone is None else _relative(np.asarray(alone, np.float64), theirs),
    )


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), TINY))


def settings_for(dump: Dump, base: Config, dtype: str = "float32") -> Config:
    """`base` with the dump's settings, the size of its latents, and dense attention, as the originals have.

    Args:
        dtype: of parameters and activations on our side.

    Raises:
        ValueError: if the settings name no field, or contradict each other.
    """
    _, frames, height, width, _ = dump.tensors["call.0.x"].shape
    stride = base.vae.spatial_stride
    total = max(call["start"] + dump.tensors[f"call.{i}.x"].shape[1] for i, call in enumerate(dump.calls))
    parts = {name: _replaced(getattr(base, name), name, fields) for name, fields in dump.settings.items()}
    parts["model"] = dataclasses.replace(base.model, dtype=dtype)
    video = dataclasses.replace(
        base.video,
        height=height * stride,
        width=width * stride,
        num_frames=1 + (total - 1) * base.vae.temporal_stride,
    )
    return dataclasses.replace(base, **parts, video=video, sparsity=dataclasses.replace(base.sparsity, policy="dense"))


def _replaced(part: Any, name: str, fields: Mapping[str, Any]) -> Any:
    unknown = set(fields) - {f.name for f in dataclasses.fields(part)}
    check(not unknown, f"the dump's settings name {', '.join(sorted(unknown))}, which {name} does not have")
    return dataclasses.replace(part, **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def replay(model: WanDiT, dump: Dump, settings: Config) -> Iterator[Row]:
    """Both replays, as far as the dump has what they need. `settings` are of `settings_for`."""
    yield from replay_calls(model, dump, settings)
    yield from replay_rollout(model, dump, settings)


def replay_calls(model: WanDiT, dump: Dump, settings: Config) -> Iterator[Row]:
    """Every forward pass of the dump on its own inputs.

    A call that starts where the last one did runs the same chunk again; one that starts right after it commits the last
    one's keys and values first, as Self-Forcing does; one at frame 0 starts anew. Every text has its own cache: the two
    branches of classifier-free guidance take turns.

    Raises:
        ValueError: if the calls of the dump cannot follow each other like that.
    """
    grid, states = Grid.of(settings), {}
    frames = (settings.video.num_frames - 1) // settings.vae.temporal_stride + 1
    used = {call["text"] for call in dump.calls}
    texts = {name: _text_cache(model, jnp.asarray(dump.tensors[f"text.{name}"])) for name in used}
    for i, call in enumerate(dump.calls):
        x, timestep = (jnp.asarray(dump.tensors[f"call.{i}.{name}"]) for name in ("x", "timestep"))
        room = settings.cache.window or frames
        check(x.shape[1] <= room, f"call {i} of the dump has {x.shape[1]} frames, the cache holds {room}")
        last_start, cache, last = states.get(call["text"], (None, None, None))
        last_frames = 0 if last is None else last.k.shape[2] // grid.padded_frame
        if call["start"] == 0 and last_start != 0:
            cache = kv.empty(model.config, grid, settings.cache, sparse=False, batch=x.shape[0], frames=frames)
        elif last_start is not None and call["start"] == last_start + last_frames:
            cache = _append(cache, last, frames=last_frames, next_frames=x.shape[1])
        else:
            follows = "0" if last_start is None else f"0, {last_start} or {last_start + last_frames}"
            check(call["start"] == last_start, f"call {i} of the dump starts at frame {call['start']}, expected {follows}")
        text = texts[call["text"]]
        if f"call.{i}.tokens" in dump.tensors:
            yield from _replay_blocks(model, dump, i, x, timestep, text, cache, grid, settings)
        ours, new = _forward(model, x, timestep, text, cache, budget=None, grid=grid, sparsity=settings.sparsity)
        yield compare(f"call {i} velocity", ours, dump.tensors[f"call.{i}.velocity"])
        states[call["text"]] = (call["start"], cache, new)


def _replay_blocks(
    model: WanDiT,
    dump: Dump,
    i: int,
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    text: TextCache,
    cache: KVCache,
    grid: Grid,
    settings: Config,
) -> Iterator[Row]:
    """The same pass, block by block."""
    layers = range(model.config.layers)
    missing = [layer for layer in layers if f"call.{i}.block.{layer}" not in dump.tensors]
    check(not missing, f"call {i} of the dump lacks the outputs of blocks {missing}; the model has {len(layers)} layers")
    theirs = np.stack([dump.tensors[f"call.{i}.{name}"] for name in ("tokens", *(f"block.{layer}" for layer in layers))])
    tokens, chained, alone = block_outputs(model, x, timestep, text, cache, jnp.asarray(theirs[:-1]), grid, settings.sparsity)
    yield compare(f"call {i} patch embedding", tokens, theirs[0])
    for layer in layers:
        yield compare(f"call {i} block {layer}", chained[layer], theirs[layer + 1], alone[layer])


@partial(jax.jit, static_argnames=("grid", "sparsity"))
def block_outputs(
    model: WanDiT,
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    text: TextCache,
    cache: KVCache,
    given: Float[Array, "l b t d"],
    grid: Grid,
    sparsity: config.Sparsity,
) -> tuple[Float[Array, "b t d"], Float[Array, "l b t d"], Float[Array, "l b t d"]]:
    """What `lf_jax.dit.forward` does not return: every block's output.

    Args:
        given: what another implementation fed to every block.

    Returns:
        The first block's input, every block's output in a chain, and every block's output from `given`.
    """
    _, modulation = embed_time(model, timestep)
    turn, tokens = turns(model, cache, x.shape[1], grid), patchify(model, x)

    def layer(tokens: Array, index: Array, block: Block, text: TextCache, given: Array) -> tuple[Array, tuple[Array, Array]]:
        def attend(own: SelfAttention, qkv: Array) -> tuple[Array, ChunkKV]:
            q, _, new = own.queries_keys(qkv, turn, grid, pool=False)
            return attention.self_attention(q, new, cache, index, None, None, grid, sparsity), new

        chained, _ = block(tokens, modulation, text.k, text.v, attend)
        alone, _ = block(given.astype(tokens.dtype), modulation, text.k, text.v, attend)
        return chained, (chained, alone)

    _, (chained, alone) = over_layers(model, layer, tokens, text, given)
    return tokens, chained, alone


def replay_rollout(model: WanDiT, dump: Dump, settings: Config) -> Iterator[Row]:
    """The video of the dump from its noise, chunk by chunk; nothing if the dump has no noise of a video.

    Raises:
        ValueError: if the dump has not what the sampler of `settings` needs: noise for every step, two texts for guidance.
    """
    if "noise" not in dump.tensors:
        return
    texts = [f"text.{i}" for i in range(branches(settings))]
    check(set(texts) <= dump.tensors.keys(), f"{settings.rollout.guidance_scale=} needs {' and '.join(texts)} in the dump")
    text = _text_cache(model, jnp.concatenate([dump.tensors[name] for name in texts]))
    noise, given = dump.tensors["noise"], dump.tensors.get("initial_latents")
    before = 0 if given is None else given.shape[1]
    batch, frames = noise.shape[0], before + noise.shape[1]
    state = initial_state(settings, batch, frames, jax.random.split(jax.random.key(0), batch))
    if given is not None:
        state = _prefill(model, text, jnp.asarray(given), state, config=settings)
    step_noise = dump.tensors.get("step_noise")
    check(step_noise is not None or draws(settings) == 0, f"{settings.rollout.timesteps=} need step_noise in the dump")
    step_noise = None if draws(settings) == 0 else jnp.asarray(step_noise)
    latents, _ = _rollout(model, text, jnp.asarray(noise), state, config=settings, step_noise=step_noise)
    lengths = chunk_lengths(frames, settings.rollout.chunk_frames, settings.rollout.independent_first_frame)
    ends = np.cumsum(lengths)
    for chunk, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
        if start >= before:
            part = slice(start - before, end - before)
            yield compare(f"chunk {chunk} latents", latents[:, part], dump.tensors["latents"][:, part])
