"""Chunk-Aware Growth: how many key blocks the query blocks of every chunk may visit (Light Forcing, section 3.2).

Host arithmetic, done once a run: early chunks carry their error into all later ones, so they stay denser.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from lf_jax import config
from lf_jax.arrays import Leaf
from lf_jax.tokens import Grid
from pallas_kernels import tuned


@partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["width"])
@dataclasses.dataclass(frozen=True)
class Budget:
    """How many key blocks a query block may visit. The count is traced and the width static: one compilation a run."""

    blocks: Leaf  # [] int32, or [chunk] int32 as the xs of a scan over chunks
    width: int  # entries of a block list: the largest budget of the run


def chunk_sparsities(
    lengths: Sequence[int], settings: config.Sparsity, cache: config.Cache, start: int = 0
) -> tuple[float, ...]:
    """The fraction of key blocks that every chunk leaves out (Light Forcing, section 3.2).

    Over the chunks i that have a past, with f_i frames up to and including chunk i, kv_i = min(f_i, window) and
    alpha_i = 1/sqrt(f_i), the noise level that generation has reached:

        s_i = base - alpha_i * beta,   beta = sum((base - target) * kv_i) / sum(alpha_i * kv_i)

    so that their total key work equals that of a constant sparsity `target`. A chunk without a past is dense and no
    part of the sums. The paper's chunks are equally long; of others, each term counts in proportion to its chunk's
    length, which keeps the key work equal.

    Args:
        lengths: latent frames of every chunk of the run.
        start: frames committed before the run. To continue a run as if it had never stopped, take the tail of the
            whole run's result instead.

    Returns:
        One number a chunk, 0 where the growth would call for less than nothing.
    """
    target = settings.target
    base = target if settings.base is None else settings.base
    frames = [start + int(f) for f in np.cumsum(lengths)]
    sparse = [(f, length / max(lengths)) for f, length in zip(frames, lengths, strict=True) if f > length]
    work = {f: share * min(f, cache.window or f) for f, share in sparse}
    alpha = {f: 1 / math.sqrt(f) for f in work}
    growth = sum((1 - target) * kv for kv in work.values()) - sum((1 - base) * kv for kv in work.values())
    beta = growth / sum(alpha[f] * kv for f, kv in work.items()) if work else 0.0
    return tuple(max(0.0, base - alpha[f] * beta) if f in alpha else 0.0 for f in frames)


def chunk_budgets(lengths: Sequence[int], start: int, grid: Grid, settings: config.Sparsity, cache: config.Cache) -> Budget:
    """The key blocks that a query block may visit, for every chunk: at least 1, at most the K that are visible.

    `int((1 - s_i) * K)` under Chunk-Aware Growth; with `attention="auto"` all K from the share on at which this device gains
    nothing by selecting (`pallas_kernels.tuned.break_even`; where nobody measured it, K of K). The policies "window" and
    "full" take all they are made for.

    Args:
        lengths, start: as in `chunk_sparsities`.

    Returns:
        Budgets [chunk], and a width that also holds a first chunk of any of these lengths.

    Raises:
        ValueError: if what was measured on this device cannot be read.
    """
    frames = [min(start + int(f), cache.window or start + int(f)) for f in np.cumsum(lengths)]  # visible, chunk included
    visible = [f * grid.frame_blocks for f in frames]
    if settings.policy == "full":
        blocks = visible
    elif settings.policy == "window":
        always = settings.sink_frames + settings.near_frames
        blocks = [min(f, always + n) * grid.frame_blocks for f, n in zip(frames, lengths, strict=True)]
    else:
        sparsities = chunk_sparsities(lengths, settings, cache, start)
        blocks = [max(1, min(k, int((1 - s) * k))) for s, k in zip(sparsities, visible, strict=True)]
        if settings.attention == "auto":
            share = tuned.break_even(grid.block_q, grid.block_k) or 1.0
            blocks = [k if kept >= share * k else kept for kept, k in zip(blocks, visible, strict=True)]
    width = max(*blocks, max(lengths) * grid.frame_blocks)
    return Budget(np.asarray(blocks, np.int32), width)
