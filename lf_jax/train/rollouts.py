"""Videos chunk by chunk, for gradients: a given video in one causal pass, and one of the network's own.

    causal_pass     the velocities of a noisy video whose past is given too; an ordinary differentiable function
    self_rollout    Self-Forcing's training rollout: every chunk is denoised up to a random exit step
    exit_gradient   the gradient of such a rollout

Self-Forcing truncates the gradient of a rollout: in every chunk only the exit step has one, and what that step reads, its
noisy input and the cache, counts as constant. So nothing ties the chunks' gradients together, and the rollout's is made in
three phases, with the memory of one chunk instead of that of a video: `self_rollout` runs without gradient and keeps the
noisy inputs, the caller's loss gives the derivative by the latents, and `exit_gradient` goes through the chunks again, each
with a gradient of its own. It equals differentiating the loss in one piece.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lf_jax import attention, flow, solvers
from lf_jax import cache as kv
from lf_jax import noise as seeded
from lf_jax.arrays import Array, Float, Int, Key
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.chunk import as_context, branches, commit_chunk, frame_shape
from lf_jax.config import Config, check
from lf_jax.dit.block import Block, SelfAttention
from lf_jax.dit.model import TextCache, WanDiT, embed_time, forward, over_layers, patchify, text_cache, turns, unpatchify
from lf_jax.rollout import RolloutState, chunk_budget, initial_state, over_chunks
from lf_jax.sparsity import Budget
from lf_jax.tokens import Grid, chunk_lengths


class SelfRollout(NamedTuple):
    """A video of the network's own. Both [b, f, h, w, c], float32."""

    inputs: Array  # what the exit step of every chunk started from
    latents: Array  # x0 as predicted there


def causal_pass(
    model: WanDiT,
    prompt: Float[Array, "b n text_dim"],
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    keys: Key[Array, " b"],
    config: Config,
    context: Float[Array, "b f h w c"] | None = None,
    through_cache: bool = True,
    remat: bool = False,
) -> Float[Array, "b f h w c"]:
    """The velocity of every chunk of `x`, reading the chunks before it: block-causal attention.

    Dense and without a window all chunks go through the layers together, as none has to wait for another's selection;
    otherwise one after the other by way of the cache, of which differentiating keeps one a chunk.

    Args:
        timestep: one a frame, the same within a chunk.
        keys: one a video, of the noise that `rollout.context_noise` puts on the context.
        context: clean frames, cached as `rollout` caches finished chunks (teacher forcing). None: the keys and values of
            `x` itself are cached, noisy as it is, which saves the second pass.
        through_cache: whether a chunk's gradient reaches what it reads of the chunks before it.
        remat: as in `dit.forward`.

    Raises:
        ValueError: if `config.rollout` has guidance, or the frames do not split into chunks.
    """
    lengths, state, text = *_begin(config, keys, x.shape[1]), text_cache(model, prompt)
    if config.sparsity.dense and config.cache.window is None:
        return _together(model, text, x, timestep, context, lengths, state, config, through_cache, remat)

    def chunk(cache: KVCache, index: Array, frames: tuple[Array, Array, Array | None]) -> tuple[KVCache, Array]:
        noisy, times, clean = frames
        past = cache if through_cache else jax.lax.stop_gradient(cache)
        velocity, new = _network(model, text, noisy, times, past, chunk_budget(state, index), config, remat)
        if clean is not None:
            clean, times = as_context(clean, keys, index, config, None), jnp.full_like(times, config.rollout.context_timestep)
            _, new = _network(model, text, clean, times, past, chunk_budget(state, index), config, remat)
        return kv.append(cache, new, noisy.shape[1], config.rollout.chunk_frames), velocity

    return over_chunks(chunk, state.cache, 0, lengths, (x, timestep, context))[1]


def _together(
    model: WanDiT,
    text: TextCache,
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    context: Float[Array, "b f h w c"] | None,
    lengths: tuple[int, ...],
    state: RolloutState,
    config: Config,
    through_cache: bool,
    remat: bool,
) -> Float[Array, "b f h w c"]:
    """`causal_pass` of all chunks at once: the context is half of the rows, the first, whose keys all read."""
    (batch, frames), grid, rows, times = x.shape[:2], Grid.of(config), x, timestep
    starts = list(accumulate(lengths, initial=0))
    if context is not None:
        parts = jnp.split(context, starts[1:-1], axis=1)
        clean = [as_context(part, state.keys, jnp.int32(index), config, None) for index, part in enumerate(parts)]
        rows = jnp.concatenate([jnp.concatenate(clean, axis=1).astype(x.dtype), x])
        times = jnp.concatenate([jnp.full_like(times, config.rollout.context_timestep), times])
    halves = rows.shape[0] // batch
    time, modulation = embed_time(model, times)
    turn = turns(model, state.cache, frames, grid)

    def attend(own: SelfAttention, qkv: Array) -> tuple[Array, ChunkKV]:
        q, _, new = own.queries_keys(qkv, turn, grid, pool=False)
        past = [half[:batch] if through_cache else jax.lax.stop_gradient(half[:batch]) for half in (new.k, new.v)]

        def chunk(start: int, end: int) -> Array:
            keys, values = (
                jnp.concatenate([jnp.tile(old[:, :start], (halves, 1, 1, 1)), part[:, start:end]], axis=1)
                for old, part in zip(past, (new.k, new.v), strict=True)
            )
            return attention.dense_attention(q[:, start:end], keys, values, implementation=config.sparsity.implementation)

        tokens = [start * grid.frame_tokens for start in starts]
        return jnp.concatenate([chunk(*ends) for ends in pairwise(tokens)], axis=1), new

    def layer(tokens: Array, index: Array, block: Block, text: TextCache) -> tuple[Array, None]:
        k, v = (jnp.tile(part, (halves, 1, 1, 1)) for part in (text.k, text.v))
        return block(tokens, modulation, k, v, attend)[0], None

    tokens, _ = over_layers(model, layer, patchify(model, rows), text, remat=remat)
    velocity = model.head(tokens[-batch:], time[-batch:])
    return unpatchify(model, velocity, grid).astype(x.dtype)


def self_rollout(
    model: WanDiT,
    prompt: Float[Array, "b n text_dim"],
    keys: Key[Array, " b"],
    exits: Int[Array, " chunk"],
    config: Config,
    frames: int,
) -> SelfRollout:
    """Generates `frames` latent frames, leaving the denoising of every chunk at its exit step (Self-Forcing, algorithm 1).

    With every exit at the last step this is what `lf_jax.rollout.rollout` generates from the same keys. Not differentiable:
    see `exit_gradient`.

    Args:
        keys: of all noise, one a video.
        exits: the step, from 0, whose prediction is the chunk.

    Raises:
        ValueError: if `config.rollout` is not a few-step sampler's, or the frames do not split into chunks.
    """
    check(config.rollout.sampler == "few_step", f"{config.rollout.sampler=} has no exit steps: expected 'few_step'")
    lengths, state, text = *_begin(config, keys, frames), text_cache(model, prompt)
    schedule = solvers.schedule(config.rollout)

    def chunk(cache: KVCache, index: Array, noise: Array) -> tuple[KVCache, tuple[Array, Array]]:
        def step(number: Array, x: Array) -> Array:
            at = _row(schedule, number)
            times = jnp.broadcast_to(at.timestep, x.shape[:2])
            velocity, _ = _network(model, text, x, times, cache, chunk_budget(state, index), config)
            fresh = seeded.step_noise(keys, index, number, x.shape[1:])
            return solvers.step(at, x, velocity, solvers.forget(x), fresh)[0]

        x = jax.lax.fori_loop(0, exits[index], step, noise)
        latents = _exit(model, text, x, cache, chunk_budget(state, index), _row(schedule, exits[index]), config)
        return _commit(model, text, latents, cache, state, index, config), (x, latents)

    noise = seeded.video_noise(keys, 0, lengths, frame_shape(config))
    return SelfRollout(*over_chunks(chunk, state.cache, 0, lengths, noise)[1])


def exit_gradient(
    model: WanDiT,
    prompt: Float[Array, "b n text_dim"],
    inputs: Float[Array, "b f h w c"],
    derivative: Float[Array, "b f h w c"],
    keys: Key[Array, " b"],
    exits: Int[Array, " chunk"],
    config: Config,
    remat: bool = False,
) -> WanDiT:
    """The gradient of a loss of `self_rollout(...).latents` with respect to `model`, in float32.

    Args:
        inputs: of the rollout.
        derivative: of the loss, by its latents.
        keys, exits: as given to the rollout.
        remat: as in `dit.forward`.
    """
    lengths, state, text = *_begin(config, keys, inputs.shape[1]), text_cache(model, prompt)
    schedule = solvers.schedule(config.rollout)

    def chunk(carry: tuple[KVCache, WanDiT], index: Array, frames: tuple[Array, Array]) -> tuple[tuple[KVCache, WanDiT], None]:
        (cache, total), (x, by_latents) = carry, frames

        def of(model: WanDiT) -> Array:
            at, text = _row(schedule, exits[index]), text_cache(model, prompt)
            kept = remat or None  # of one chunk: layers unrolled would save less time than they take to compile
            return _exit(model, text, x, cache, chunk_budget(state, index), at, config, kept)

        latents, pull = jax.vjp(of, model)
        total = jax.tree.map(jnp.add, total, *pull(by_latents))
        return (_commit(model, text, latents, cache, state, index, config), total), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), model)
    return over_chunks(chunk, (state.cache, zeros), 0, lengths, (inputs, derivative))[0][1]


def _begin(config: Config, keys: Array, frames: int) -> tuple[tuple[int, ...], RolloutState]:
    check(branches(config) == 1, f"{config.rollout.guidance_scale=} is for sampling: networks are trained at 1")
    settings = config.rollout
    lengths = chunk_lengths(frames, settings.chunk_frames, settings.independent_first_frame)
    return lengths, initial_state(config, keys.shape[0], frames, keys)


def _network(
    model: WanDiT,
    text: TextCache,
    x: Array,
    timestep: Array,
    cache: KVCache,
    budget: Budget | None,
    config: Config,
    remat: bool | None = None,
) -> tuple[Array, ChunkKV]:
    return forward(model, x, timestep, text, cache, budget, Grid.of(config), config.sparsity, remat)


def _exit(
    model: WanDiT,
    text: TextCache,
    x: Array,
    cache: KVCache,
    budget: Budget | None,
    at: solvers.Schedule,
    config: Config,
    remat: bool | None = None,
) -> Array:
    """x0 as predicted at one step of the schedule."""
    velocity, _ = _network(model, text, x, jnp.broadcast_to(at.timestep, x.shape[:2]), cache, budget, config, remat)
    return flow.velocity_to_x0(x, velocity, at.sigma)


def _commit(
    model: WanDiT, text: TextCache, latents: Array, cache: KVCache, state: RolloutState, index: Array, config: Config
) -> KVCache:
    context = as_context(latents, state.keys, index, config, None)
    return commit_chunk(model, text, context, cache, chunk_budget(state, index), config, config.rollout.context_timestep)


def _row(schedule: solvers.Schedule, number: Array) -> solvers.Schedule:
    return jax.tree.map(lambda column: column[number], schedule)
