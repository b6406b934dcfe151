"""One chunk of a video: denoise it while reading the cache, then commit it with one pass more."""

import dataclasses

import jax
import jax.numpy as jnp

from lf_jax import cache as kv
from lf_jax import flow, solvers
from lf_jax import noise as seeded
from lf_jax.arrays import Array, Float, Int, Key
from lf_jax.cache import KVCache
from lf_jax.config import Config
from lf_jax.dit.model import TextCache, WanDiT, forward
from lf_jax.sparsity import Budget
from lf_jax.tokens import Grid


def next_chunk(
    model: WanDiT,
    text: TextCache,
    noise: Float[Array, "b f h w c"] | None,
    cache: KVCache,
    keys: Key[Array, " b"],
    chunk: Int[Array, ""],
    budget: Budget | None,
    config: Config,
    frames: int,
    step_noise: Float[Array, "draws b f h w c"] | None = None,
) -> tuple[Float[Array, "b f h w c"], KVCache]:
    """One chunk of `frames` frames, generated and committed."""
    if noise is None:
        noise = seeded.chunk_noise(keys, chunk, (frames, *frame_shape(config)))
    latents = denoise_chunk(model, text, noise, cache, keys, chunk, budget, config, step_noise)
    context = as_context(latents, keys, chunk, config, step_noise)
    return latents, commit_chunk(model, text, context, cache, budget, config, config.rollout.context_timestep)


def denoise_chunk(
    model: WanDiT,
    text: TextCache,
    noise: Float[Array, "b f h w c"],
    cache: KVCache,
    keys: Key[Array, " b"],
    chunk: Int[Array, ""],
    budget: Budget | None,
    config: Config,
    step_noise: Float[Array, "draws b f h w c"] | None = None,
) -> Float[Array, "b f h w c"]:
    """All steps of one chunk as one scan; reads the cache. Latents stay float32 from step to step."""
    schedule = solvers.schedule(config.rollout)
    given = None
    if schedule.stochastic and step_noise is not None:  # after the last step nothing is added, so its noise is of no account
        between = step_noise[: schedule.steps - 1].astype(jnp.float32)
        given = jnp.concatenate([between, jnp.zeros((1, *noise.shape), jnp.float32)])

    def step(carry: tuple[Array, solvers.Memory], inputs) -> tuple[tuple[Array, solvers.Memory], None]:
        (x, memory), (at, number, fresh) = carry, inputs
        if schedule.stochastic and fresh is None:
            fresh = seeded.step_noise(keys, chunk, number, x.shape[1:])
        velocity = guided_velocity(model, text, x, at.timestep, cache, budget, config)
        return solvers.step(at, x, velocity, memory, fresh), None

    x = noise.astype(jnp.float32)
    steps = (schedule, jnp.arange(schedule.steps), given)
    (x, _), _ = jax.lax.scan(step, (x, solvers.forget(x)), steps)
    return x


def guided_velocity(
    model: WanDiT,
    text: TextCache,
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, ""],
    cache: KVCache,
    budget: Budget | None,
    config: Config,
) -> Float[Array, "b f h w c"]:
    """The network's velocity; under guidance scale g it is u + g (c - u) of both halves of a doubled batch."""
    both = jnp.tile(x, (branches(config), 1, 1, 1, 1))
    times = jnp.broadcast_to(timestep, both.shape[:2])
    velocity, _ = one_pass(model, both, times, text, cache, budget, Grid.of(config), config.sparsity)
    if branches(config) == 1:
        return velocity
    conditional, unconditional = jnp.split(velocity, 2)
    return unconditional + config.rollout.guidance_scale * (conditional - unconditional)


def as_context(
    latents: Float[Array, "b f h w c"], keys: Key[Array, " b"], chunk: Int[Array, ""], config: Config, step_noise: Array | None
) -> Float[Array, "b f h w c"]:
    """What a finished chunk is cached as: itself, or slightly noisy (`context_noise`), as in training rollouts. At timestep 0
    the original's look-up of the noise level finds the lowest one of its grid, 0.005 at shift 5, and so does this one."""
    settings = config.rollout
    if not settings.context_noise:
        return latents
    fresh = seeded.step_noise(keys, chunk, draws(config) - 1, latents.shape[1:]) if step_noise is None else step_noise[-1]
    return flow.add_noise(latents, fresh, flow.nearest_sigma(jnp.float32(settings.context_timestep), settings.shift))


def commit_chunk(
    model: WanDiT,
    text: TextCache,
    latents: Float[Array, "b f h w c"],
    cache: KVCache,
    budget: Budget | None,
    config: Config,
    timestep: float,
) -> KVCache:
    """The pass whose only purpose is the keys and values of a finished chunk; none where the cache would not hold them."""
    if cache.frames == 0:
        return dataclasses.replace(cache, end=cache.end + latents.shape[1])
    both = jnp.tile(latents.astype(jnp.float32), (branches(config), 1, 1, 1, 1))
    times = jnp.full(both.shape[:2], timestep, jnp.float32)
    _, new = one_pass(model, both, times, text, cache, budget, Grid.of(config), config.sparsity)
    return kv.append(cache, new, latents.shape[1], config.rollout.chunk_frames)


def branches(config: Config) -> int:
    """Copies of the batch that the network runs on: 2 under classifier-free guidance."""
    return 1 if config.rollout.guidance_scale == 1.0 else 2


def draws(config: Config) -> int:
    """Fresh noises a chunk uses after its starting noise: one between two steps, and one for a noisy context."""
    schedule = solvers.schedule(config.rollout)
    return (schedule.steps - 1 if schedule.stochastic else 0) + config.rollout.context_noise


def frame_shape(config: Config) -> tuple[int, int, int]:
    """Height, width and channels of a latent frame."""
    grid, (_, down, across) = Grid.of(config), config.model.patch
    return grid.rows * down, grid.columns * across, config.model.channels


def step_config(config: Config) -> Config:
    """What the compiled step of `stream` is compiled for: the length of the video and its other prompt are no part of it."""
    return dataclasses.replace(config, video=dataclasses.replace(config.video, num_frames=1, negative_prompt=""))


# Inside the compiled step too: its denoising and its commit then share one lowering, which takes long for Mosaic kernels.
one_pass = jax.jit(forward, static_argnames=("grid", "sparsity"))
compiled_chunk = jax.jit(next_chunk, static_argnames=("config", "frames"), donate_argnames="cache")
