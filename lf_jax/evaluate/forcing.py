"""Teacher forcing: every policy meets the same past and the same noisy chunk as dense attention, one pass at a time.

A free-running video that has strayed from the dense one may be as good. Here nothing strays: what differs is the error of
this pass alone. The policy "full" computes what dense attention does by other means, so its error is the floor below
which differences mean nothing.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import cache as kv
from lf_jax import noise as seeded
from lf_jax import solvers
from lf_jax.arrays import Array, Float, Int, Key
from lf_jax.cache import KVCache
from lf_jax.chunk import as_context, branches, commit_chunk, guided_velocity
from lf_jax.config import Config, Sparsity, check
from lf_jax.dit import TextCache, WanDiT
from lf_jax.evaluate.probe import Reading, read
from lf_jax.evaluate.statistics import nested, worst
from lf_jax.inputs import video_chunks
from lf_jax.rollout import initial_state
from lf_jax.sparsity import Budget, chunk_budgets
from lf_jax.tokens import Grid


def measure(
    model: WanDiT,
    text: TextCache,
    keys: Key[Array, "1"],
    latents: Float[np.ndarray, "f h w c"],
    dense: Config,
    policies: Mapping[str, Config],
) -> dict[str, dict[str, Any]]:
    """Follows one dense video chunk by chunk and measures what every policy would have made of it.

    Args:
        latents: of the dense video; committed as they are, they are everybody's past.
        policies: sparse, and all of one token grid.

    Returns:
        A policy, as JSON can hold it: `velocity` [chunk, step], the relative L2 distance of its velocity from the dense
        one; `recall` and `worst` [chunk, step, layer], the share of the true attention mass in the blocks that it reads,
        as the mean over query blocks and heads and as the mean of the lowest 1 % of them; `density` [chunk], blocks read
        over blocks visible; `reads`, a chunk: the visible `frames` and the `share` [key block] of layers and heads whose
        middle query block reads each block of them in the last step.

    Raises:
        ValueError: if the policies are not of one grid.
    """
    lengths, some = video_chunks(dense), next(iter(policies.values()))
    grids = {Grid.of(settings) for settings in policies.values()}
    check(len(grids) == 1, f"policies have {len(grids)} token grids, expected one: {grids}")
    full = dataclasses.replace(some, sparsity=dataclasses.replace(some.sparsity, policy="full"))
    everything, budgets = _budgets(full), {name: _budgets(settings) for name, settings in policies.items()}
    past, listed = (initial_state(settings, 1, sum(lengths), keys).cache for settings in (dense, full))
    found = {name: {"velocity": [], "recall": [], "worst": [], "density": [], "reads": []} for name in policies}
    for chunk, part in enumerate(np.split(latents, np.cumsum(lengths)[:-1])):
        frames = part.shape[0]
        noisy, velocities = trajectory(model, text, past, keys, np.int32(chunk), dense, part.shape)
        visible, allowed = _of_chunk(everything, chunk), {name: _of_chunk(budget, chunk) for name, budget in budgets.items()}
        for name, settings in policies.items():
            errors = velocity_errors(model, text, noisy, velocities, listed, allowed[name], settings)
            found[name]["velocity"].append(nested(errors))
        chosen = tuple(settings.sparsity for settings in policies.values())
        readings = choices(model, text, noisy, listed, visible, tuple(allowed.values()), full, chosen)
        for name, reading in zip(policies, readings, strict=True):
            for key, value in _notes(reading, listed, frames).items():
                found[name][key].append(value)
        context = as_context(jnp.asarray(part)[None], keys, jnp.int32(chunk), dense, None)
        past = _commit(model, text, context, past, None, dense, dense.rollout.context_timestep)
        listed = _commit(model, text, context, listed, visible, full, dense.rollout.context_timestep)
    return found


@partial(jax.jit, static_argnames=("config", "shape"))
def trajectory(
    model: WanDiT,
    text: TextCache,
    cache: KVCache,
    keys: Key[Array, " b"],
    chunk: Int[Array, ""],
    config: Config,
    shape: tuple[int, ...],
) -> tuple[Float[Array, "step b f h w c"], Float[Array, "step b f h w c"]]:
    """What a chunk of `shape` [f, h, w, c] is before every denoising step under `config`, and the velocities there."""
    schedule = solvers.schedule(config.rollout)

    def step(carry: tuple[Array, solvers.Memory], inputs: tuple) -> tuple[tuple[Array, solvers.Memory], tuple[Array, Array]]:
        (x, memory), (at, number) = carry, inputs
        fresh = seeded.step_noise(keys, chunk, number, shape) if schedule.stochastic else None
        velocity = guided_velocity(model, text, x, at.timestep, cache, None, config)
        return solvers.step(at, x, velocity, memory, fresh), (x, velocity)

    x = seeded.chunk_noise(keys, chunk, shape)
    _, (noisy, velocities) = jax.lax.scan(step, (x, solvers.forget(x)), (schedule, jnp.arange(schedule.steps)))
    return noisy, velocities


@partial(jax.jit, static_argnames="config")
def velocity_errors(
    model: WanDiT,
    text: TextCache,
    noisy: Float[Array, "step b f h w c"],
    velocities: Float[Array, "step b f h w c"],
    cache: KVCache,
    budget: Budget,
    config: Config,
) -> Float[Array, " step"]:
    """The relative L2 distance from `velocities` of those of another config at the same points."""

    def step(_, inputs: tuple[Array, Array, Array]) -> tuple[None, Array]:
        x, expected, timestep = inputs
        velocity = guided_velocity(model, text, x, timestep, cache, budget, config)
        return None, jnp.linalg.norm((velocity - expected).ravel()) / jnp.linalg.norm(expected.ravel())

    return jax.lax.scan(step, None, (noisy, velocities, solvers.schedule(config.rollout).timestep))[1]


@partial(jax.jit, static_argnames=("full", "policies"))
def choices(
    model: WanDiT,
    text: TextCache,
    noisy: Float[Array, "step b f h w c"],
    cache: KVCache,
    everything: Budget,
    budgets: tuple[Budget, ...],
    full: Config,
    policies: tuple[Sparsity, ...],
) -> tuple[Reading, ...]:
    """The `Reading` of every policy, with leading axes [step, layer]; under guidance of the conditional half."""

    def step(_, inputs: tuple[Array, Array]) -> tuple[None, tuple[Reading, ...]]:
        x, timestep = inputs
        both = jnp.tile(x, (branches(full), 1, 1, 1, 1))
        times = jnp.broadcast_to(timestep, both.shape[:2])
        return None, read(model, both, times, text, cache, everything, budgets, Grid.of(full), full.sparsity, policies)

    return jax.lax.scan(step, None, (noisy, solvers.schedule(full.rollout).timestep))[1]


def _notes(reading: Reading, cache: KVCache, frames: int) -> dict[str, Any]:
    """What is kept of one chunk's readings."""
    rows = np.asarray(reading.recall).reshape(*reading.recall.shape[:2], -1)
    seen, end = np.sort(np.asarray(kv.visible(cache, frames))), int(cache.end)
    seen = seen[seen >= 0]
    share, block = np.asarray(reading.reads[-1]).mean(0), reading.reads.shape[-1] // (cache.frames + frames)
    share = np.concatenate([share[: len(seen) * block], share[cache.frames * block :]])  # without what is out of sight
    return {
        "recall": nested(rows.mean(-1)),
        "worst": nested(worst(rows)),
        "density": nested(np.mean(reading.density)),
        "reads": {"frames": [*map(int, seen), *range(end, end + frames)], "share": nested(share)},
    }


def _budgets(settings: Config) -> Budget:
    """Of all chunks of the video."""
    return chunk_budgets(video_chunks(settings), 0, Grid.of(settings), settings.sparsity, settings.cache)


def _of_chunk(budget: Budget, chunk: int) -> Budget:
    return dataclasses.replace(budget, blocks=budget.blocks[chunk])


_commit = jax.jit(commit_chunk, static_argnames=("config", "timestep"), donate_argnames="cache")
