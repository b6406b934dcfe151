"""The attention policies that are compared, each as changes of a config's `Sparsity`, all on the same average budget.

The budget is `sparsity.target`: the share of key blocks that is left out, averaged over the key work of all chunks that
have a past. Chunk-Aware Growth spreads it over the chunks and keeps that average, so policies with and without it spend
the same.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lf_jax import config, sparsity
from lf_jax.config import Config, check
from lf_jax.inputs import video_chunks
from lf_jax.tokens import Grid

MEANINGS = {
    "dense": "every visible key: what the others are compared with",
    "full": "the same attention as lists of all blocks, through the block-sparse implementation: the noise floor",
    "light_forcing": "Light Forcing: Chunk-Aware Growth, then frames, then blocks of those frames",
    "constant": "Light Forcing without Chunk-Aware Growth: the same sparsity in every chunk",
    "topk": "Light Forcing without the choice of frames: the best blocks of all",
    "window": "the chunk, the sink and the last frames before it, at least the others' budget in whole frames",
    "random": "blocks drawn at random",
    "oracle": "the blocks that hold the most attention, found by computing all of it",
}
DEFAULT = tuple(MEANINGS)


def names() -> tuple[str, ...]:
    """Every policy that can be asked for: those above, and whatever other selectors the library has."""
    return tuple(dict.fromkeys([*MEANINGS, *sparsity.SELECTORS]))


def meaning(name: str) -> str:
    """One line about a policy; of a selector without an entry here, the first line of its docstring."""
    return MEANINGS.get(name) or (sparsity.SELECTORS[name].__doc__ or "").strip().partition("\n")[0]


def with_policy(base: Config, name: str) -> Config:
    """`base` under the policy `name`. Block sizes and target stay, so all policies but "dense" share one token grid.

    `sparsity.implementation` is that of block-sparse attention; dense attention chooses its own.

    Raises:
        ValueError: for an unknown name.
    """
    check(name in names(), f"policy {name!r} must be one of {', '.join(names())}")
    if name == "dense":
        return dataclasses.replace(base, sparsity=config.Sparsity(policy="dense"))
    if name == "constant":
        return _changed(base, policy="light_forcing", base=None)
    if name == "window":
        return _window(base)
    return _changed(base, policy=name)


def densities(settings: Config) -> np.ndarray:
    """The share of the visible key blocks that the budget of every chunk allows, [chunk]; 1 where attention is dense."""
    lengths = video_chunks(settings)
    if settings.sparsity.dense:
        return np.ones(len(lengths))
    return _blocks(settings) / _blocks(_changed(settings, policy="full"))


def average(per_chunk: Sequence[float] | np.ndarray, settings: Config) -> float:
    """Densities [chunk] averaged over the key work of the chunks that have a past, as the target is; 1 where there are none."""
    work = (_blocks(_changed(settings, policy="full")) * np.asarray(video_chunks(settings)))[1:]
    return float((np.asarray(per_chunk)[1:] * work).sum() / work.sum()) if work.size else 1.0


def _window(base: Config) -> Config:
    """The smallest number of near frames, at least one, that reaches the budget of the others: it never has less."""
    budget, frames = 1 - base.sparsity.target, sum(video_chunks(base))
    sink = base.sparsity.sink_frames
    for near in range(1, frames + 1):
        settings = _changed(base, policy="window", near_frames=near, keep_frames=sink + near + 1)
        if average(densities(settings), settings) >= budget:
            break
    return settings


def _blocks(settings: Config) -> np.ndarray:
    return sparsity.chunk_budgets(video_chunks(settings), 0, Grid.of(settings), settings.sparsity, settings.cache).blocks


def _changed(settings: Config, **fields) -> Config:
    return dataclasses.replace(settings, sparsity=dataclasses.replace(settings.sparsity, **fields))
