"""Generation, chunk by chunk (`lf_jax.chunk` is what happens in one).

    rollout   all chunks as one `lax.scan`: jit it with `config` static, and donate `state` (5.6 GB at full size)
    stream    the same chunks one at a time, as a generator
    prefill   commits given latents instead of generated ones: image-to-video, video extension

Everything that a video so far is made of is in `RolloutState`, so a rollout can stop after any chunk, be saved or
forked, and go on as if it had not stopped. `Config.video.num_frames` is not read here.

A video planned as one chunk without a window (the bidirectional models) has no past to read and no chunk to follow: its
cache has no slots, and the pass that would fill them is left out.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import cache as kv
from lf_jax.arrays import Array, Float, Int, Key, Leaf
from lf_jax.cache import KVCache
from lf_jax.chunk import branches, commit_chunk, compiled_chunk, draws, frame_shape, next_chunk, step_config
from lf_jax.config import Config, check
from lf_jax.dit.model import TextCache, WanDiT
from lf_jax.sparsity import Budget, chunk_budgets
from lf_jax.tokens import Grid, chunk_lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """A video up to now."""

    cache: KVCache  # of twice the batch under classifier-free guidance: conditional first, then unconditional
    keys: Leaf  # [b] keys of `noise.sample_key`
    chunk: Leaf  # [] int32: chunks committed
    budgets: Budget | None  # [chunk] of the planned video, from its first chunk on; None where attention is dense


def initial_state(config: Config, batch: int, frames: int, keys: Key[Array, " b"]) -> RolloutState:
    """The state before the first chunk.

    Args:
        batch: videos made together.
        frames: latent frames that the whole video is planned to have, prefilled ones included. Chunk-Aware Growth
            spreads the sparsity over this plan, so a video continued from a state follows the plan of that state.
            Without a window the cache holds them all, or none where they are one chunk.
        keys: one a video.

    Raises:
        ValueError: if `frames` does not split into chunks, or `keys` are not `batch`.
    """
    settings, grid = config.rollout, Grid.of(config)
    check(keys.shape == (batch,), f"keys has shape {keys.shape}, expected {(batch,)}")
    lengths = chunk_lengths(frames, settings.chunk_frames, settings.independent_first_frame)
    sparse = not config.sparsity.dense
    budgets = chunk_budgets(lengths, 0, grid, config.sparsity, config.cache) if sparse else None
    return RolloutState(
        cache=kv.empty(config.model, grid, config.cache, sparse, batch * branches(config), frames if len(lengths) > 1 else 0),
        keys=jnp.copy(keys),  # a donated state must not take the caller's keys along
        chunk=jnp.zeros((), jnp.int32),
        budgets=None if budgets is None else dataclasses.replace(budgets, blocks=jnp.asarray(budgets.blocks)),
    )


def fork(state: Leaf) -> Leaf:
    """A copy, of a state or any pytree, that lives on where the original is consumed: by `stream` and a donating `rollout`."""
    return jax.tree.map(jnp.copy, state)


def rollout(
    model: WanDiT,
    text: TextCache,
    noise: Float[Array, "b f h w c"],
    state: RolloutState,
    config: Config,
    step_noise: Float[Array, "draws b f h w c"] | None = None,
) -> tuple[Float[Array, "b f h w c"], RolloutState]:
    """Generates the next `f` latent frames (Self-Forcing's inference loop; Light Forcing, section 3).

    Args:
        text: of the prompts; under guidance of the prompts and then of as many negative prompts, batch 2 b.
        noise: starting noise, for example of `noise.video_noise`; `f` frames are whole chunks.
        step_noise: fresh noise for each of `draws(config)` uses; None draws it from `state.keys`.

    Returns:
        Clean latents, normalised, float32, and the state after them.

    Raises:
        ValueError: if `f` is not made of whole chunks, batches disagree, or the frames exceed what `state` was made
            for. Where that can only be known while running, because `state` is traced, the latents are NaN instead.
    """
    _check_inputs(text, noise.shape[0], state, config, noise=noise)
    lengths, fits = _admit(noise.shape[1], state, config)
    if step_noise is not None:
        wanted = (draws(config), *noise.shape)
        check(step_noise.shape == wanted, f"step_noise has shape {step_noise.shape}, expected {wanted}")

    def chunk(cache: KVCache, index: Array, inputs: tuple[Array, Array | None]) -> tuple[KVCache, Array]:
        start, fresh = inputs
        fresh = None if fresh is None else jnp.moveaxis(fresh, 2, 0)
        budget = chunk_budget(state, index)
        latents, cache = next_chunk(model, text, start, cache, state.keys, index, budget, config, start.shape[1], fresh)
        return cache, latents

    frames = noise, None if step_noise is None else jnp.moveaxis(step_noise, 0, 2)
    cache, latents = over_chunks(chunk, state.cache, state.chunk, lengths, frames)
    latents = jnp.where(fits, latents, jnp.nan)
    return latents, dataclasses.replace(state, cache=cache, chunk=state.chunk + len(lengths))


def prefill(
    model: WanDiT, text: TextCache, latents: Float[Array, "b f h w c"], state: RolloutState, config: Config
) -> RolloutState:
    """Commits clean latents as if they had been generated: the first image, or a video to extend.

    They are cached at timestep 0, whatever the context of generated chunks is cached at (Self-Forcing). The frames must
    be whole chunks: one image needs `independent_first_frame`. Of a video planned as one chunk they are the whole video:
    they are counted, and nothing can follow.

    Raises:
        ValueError: as `rollout`.
    """
    _check_inputs(text, latents.shape[0], state, config, latents=latents)
    lengths, fits = _admit(latents.shape[1], state, config)

    def chunk(cache: KVCache, index: Array, frames: Array) -> tuple[KVCache, None]:
        return commit_chunk(model, text, frames, cache, chunk_budget(state, index), config, timestep=0.0), None

    latents = jnp.where(fits, latents, jnp.nan)
    cache, _ = over_chunks(chunk, state.cache, state.chunk, lengths, latents)
    return dataclasses.replace(state, cache=cache, chunk=state.chunk + len(lengths))


def stream(
    model: WanDiT,
    text: TextCache,
    noise: Float[Array, "b f h w c"] | None,
    state: RolloutState,
    config: Config,
    frames: int,
    step_noise: Float[Array, "draws b f h w c"] | None = None,
) -> Iterator[tuple[Float[Array, "b chunk_frames h w c"], RolloutState]]:
    """Generates the next `frames` latent frames, and yields each chunk as soon as it is dispatched.

    Each state is consumed when the next chunk is asked for: `fork` it to keep it. One compiled step (`compiled_chunk`)
    serves every chunk, and with a window every length. The arguments are as in `rollout`; `noise` None draws it
    from `state.keys`.

    Yields:
        The chunk's latents, float32, and the state after it.

    Raises:
        ValueError: as `rollout`, before the first chunk.
    """
    _check_inputs(text, state.keys.shape[0], state, config, noise=noise)
    lengths, _ = _admit(frames, state, config)
    shape = (state.keys.shape[0], frames, *frame_shape(config))
    for name, given, wanted in (("noise", noise, shape), ("step_noise", step_noise, (draws(config), *shape))):
        check(
            given is None or given.shape == wanted, f"{name} has shape {given is not None and given.shape}, expected {wanted}"
        )
    return _stream(model, text, noise, state, config, lengths, step_noise)


def _stream(model, text, noise, state, config, lengths, step_noise):
    config = step_config(config)
    first, at = int(state.chunk), 0
    blocks = None if state.budgets is None else np.asarray(state.budgets.blocks)
    for index, length in enumerate(lengths, start=first):
        here = slice(at, at + length)
        latents, cache = compiled_chunk(
            model,
            text,
            None if noise is None else noise[:, here],
            state.cache,
            state.keys,
            np.int32(index),
            None if blocks is None else dataclasses.replace(state.budgets, blocks=blocks[index]),
            config,
            length,
            None if step_noise is None else step_noise[:, :, here],
        )
        at += length
        state = dataclasses.replace(state, cache=cache, chunk=jnp.asarray(index + 1, jnp.int32))
        yield latents, state


def over_chunks(chunk: Callable, carry: Any, first: Array | int, lengths: tuple[int, ...], frames: Any) -> tuple[Any, Any]:
    """Runs `chunk(carry, index, frames of the chunk) -> (carry, result)` over a pytree of [b, f, ...]; joins the results.

    One scan, after a first chunk of another length. `first` is the index of the first chunk.
    """
    done = 1 if lengths[0] != lengths[-1] else 0
    numbers = first + jnp.arange(len(lengths), dtype=jnp.int32)
    results = []
    if done:
        carry, result = chunk(carry, numbers[0], jax.tree.map(lambda leaf: leaf[:, : lengths[0]], frames))
        results.append(result)

    def stack(leaf: Array) -> Array:
        rest = leaf[:, done * lengths[0] :]
        return jnp.moveaxis(rest.reshape(rest.shape[0], -1, lengths[-1], *rest.shape[2:]), 1, 0)

    def join(leaf: Array) -> Array:
        merged = jnp.moveaxis(leaf, 0, 1)
        return merged.reshape(merged.shape[0], -1, *merged.shape[3:])

    carry, stacked = jax.lax.scan(lambda c, xs: chunk(c, *xs), carry, (numbers[done:], jax.tree.map(stack, frames)))
    results.append(jax.tree.map(join, stacked))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results)


def chunk_budget(state: RolloutState, chunk: Int[Array, ""]) -> Budget | None:
    """The budget of one chunk of the plan."""
    return None if state.budgets is None else dataclasses.replace(state.budgets, blocks=state.budgets.blocks[chunk])


def _admit(frames: int, state: RolloutState, config: Config) -> tuple[tuple[int, ...], Array | bool]:
    """The chunks that `frames` more frames split into, and whether the state has room for them.

    A cache without a window would overwrite its first frames, one without slots forgets the first chunk, and a plan that
    has run out has no budgets left.
    """
    settings, cache = config.rollout, state.cache
    traced = isinstance(state.chunk, jax.core.Tracer)
    longer = settings.independent_first_frame and settings.chunk_frames > 1  # a first chunk of one frame can be told apart
    starts = longer and (frames % settings.chunk_frames == 1 if traced else int(state.chunk) == 0)
    lengths = chunk_lengths(frames, settings.chunk_frames, starts)
    planned = None if state.budgets is None else state.budgets.blocks.shape[0]
    end, chunk = (0, 0) if traced else (int(cache.end), int(state.chunk))
    room = cache.frames or lengths[0]
    if config.cache.window is None:
        check(end + frames <= room, f"{frames=} after {end} exceed the {room} frames that the state has room for")
    check(
        planned is None or chunk + len(lengths) <= planned, f"{frames=} after chunk {chunk} exceed the plan of {planned} chunks"
    )
    if not traced:
        return lengths, True
    fits = jnp.bool_(config.cache.window is not None) | (cache.end + frames <= room)
    fits &= jnp.bool_(planned is None) | (state.chunk + len(lengths) <= (planned or 0))
    return lengths, fits & (jnp.bool_(not longer) | ((state.chunk == 0) == starts))


def _check_inputs(text: TextCache, batch: int, state: RolloutState, config: Config, **latents: Array | None) -> None:
    """Raises ValueError where text, state and the named latents do not belong to `config` or to each other."""
    frame, cache, settings = frame_shape(config), state.cache, config.cache
    for name, given in latents.items():
        fits = given is None or (given.ndim == 5 and given.shape[2:] == frame)
        check(fits, f"{name} has shape {given is not None and given.shape}, expected (b, f, {', '.join(map(str, frame))})")
    wanted = batch * branches(config)
    model = (config.model.layers, config.model.heads, config.model.head_dim)
    for name, (layers, size, _, *heads) in (("text", text.k.shape), ("state.cache", cache.k.shape)):
        check(
            size == wanted,
            f"{name} has batch {size}, expected {wanted}: {batch} videos, {branches(config)} network passes each",
        )
        made = (layers, *heads)
        check(made == model, f"{name} is of another model: its layers, heads and head width are {made}, expected {model}")
    check(state.keys.shape == (batch,), f"state.keys has shape {state.keys.shape}, expected {(batch,)}")
    planned = state.budgets is not None
    check(
        planned != config.sparsity.dense,
        f"state was made {'with' if planned else 'without'} block budgets, {config.sparsity.policy=} needs the other",
    )
    check(
        settings.window in (None, cache.frames) and settings.sink == cache.sink,
        f"state.cache has {cache.frames} slots and a sink of {cache.sink}, expected {settings}",
    )
