"""The parts that selectors are made of: what a chunk can see, pooled scores, the best blocks of every query block.

A selector is a pure function

    selector(q, new, cache, layer, budget, grid, settings) -> BlockMap

of the queries [b, t, head, e] and the `ChunkKV` of one layer of a chunk, the cache and the layer's number in it, the
chunk's `Budget`, the token grid and the `config.Sparsity`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import cache as kv
from lf_jax import config
from lf_jax.arrays import Array, Bool, Float, Int
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.sparsity.growth import Budget
from lf_jax.tokens import Grid
from pallas_kernels import BlockMap

Selector = Callable[[Array, ChunkKV, KVCache, Array, Budget, Grid, config.Sparsity], BlockMap]


class Timeline(NamedTuple):
    """The key blocks of the cache and the chunk in the order of time, whatever slots their frames lie in.

    First the visible past, then the cache blocks out of sight, last the chunk. Selection works in this order, so the
    blocks it takes, and how it breaks ties, do not depend on where the ring stands.
    """

    blocks: Array  # [key block] int32: the number of the block in a `BlockMap`
    past: Array  # [] int32: visible past frames
    cached: int  # key blocks of the cache
    frame_blocks: int  # key blocks of a frame

    @property
    def current(self) -> int:
        """Key blocks of the chunk."""
        return self.blocks.shape[0] - self.cached

    def of_frames(self, kept: Bool[Array, "*lead slots"]) -> Bool[Array, "*lead blocks"]:
        """The blocks of the chunk and of the `kept` frames of the past, of which frame 0 is the first one visible."""
        kept &= jnp.arange(kept.shape[-1]) < self.past
        chunk = jnp.ones((*kept.shape[:-1], self.current), bool)
        return jnp.concatenate([jnp.repeat(kept, self.frame_blocks, axis=-1), chunk], axis=-1)


def timeline(new: ChunkKV, cache: KVCache, grid: Grid) -> Timeline:
    frame = kv.visible(cache, new.k.shape[1] // grid.padded_frame)
    slot = jnp.argsort(jnp.where(frame < 0, jnp.iinfo(jnp.int32).max, frame)).astype(jnp.int32)
    cached = cache.frames * grid.frame_blocks
    past = (slot[:, None] * grid.frame_blocks + jnp.arange(grid.frame_blocks)).reshape(-1)
    chunk = cached + jnp.arange(new.k.shape[1] // grid.block_k)
    return Timeline(jnp.concatenate([past, chunk]).astype(jnp.int32), (frame >= 0).sum(), cached, grid.frame_blocks)


def live_tokens(grid: Grid) -> np.ndarray:
    """Live tokens of every key block of a frame, [key block] int."""
    return np.clip(grid.frame_tokens - np.arange(grid.frame_blocks) * grid.block_k, 0, grid.block_k)


def pool_keys(k: Float[Array, "b padded head e"], grid: Grid) -> Float[Array, "b block head e"]:
    """The mean key of every block over its live tokens, in float32. The dead tokens of `k` must be zero."""
    b, _, head, e = k.shape
    blocks = k.astype(jnp.float32).reshape(b, -1, grid.frame_blocks, grid.block_k, head, e)
    return (blocks.sum(3) / live_tokens(grid)[:, None, None]).reshape(b, -1, head, e)


def pool_queries(q: Float[Array, "b t head e"], block_q: int) -> Float[Array, "b block head e"]:
    """The mean query of every block, in float32; the last block may be short."""
    b, t, head, e = q.shape
    blocks = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, -t % block_q), (0, 0), (0, 0))).reshape(b, -1, block_q, head, e)
    tokens = np.minimum(block_q, t - np.arange(blocks.shape[1]) * block_q)
    return blocks.sum(2) / tokens[:, None, None]


def block_scores(
    q: Float[Array, "b t head e"], new: ChunkKV, cache: KVCache, layer: Int[Array, ""], time: Timeline, grid: Grid
) -> Float[Array, "b head query_block key_block"]:
    """Mean query . mean key, in float32 without scale or softmax; key blocks in the order of `time`."""
    past = jnp.moveaxis(cache.pooled[layer, :, time.blocks[: time.cached]], 0, 1)
    keys = jnp.concatenate([past, new.pooled], axis=1)
    queries = pool_queries(q, grid.block_q)
    return jnp.einsum("bqhe,bkhe->bhqk", queries, keys, precision=jax.lax.Precision.HIGHEST)


def top_blocks(
    scores: Float[Array, "b head query_block key_block"],
    candidates: Bool[Array, "*lead key_block"],
    available: Int[Array, ""],
    budget: Budget,
    time: Timeline,
    grid: Grid,
) -> BlockMap:
    """The best blocks of every query block, as many as the budget says, or all candidates where there are fewer.

    Of equal scores the earlier frame wins, then the lower block. A chunk without a past keeps all its blocks.

    Args:
        candidates: blocks that may be taken, broadcast against `scores`.
        available: how many they are, the same for every query block.

    Raises:
        ValueError: if the lists are too narrow for a chunk without a past.
    """
    config.check(budget.width >= time.current, f"{budget.width=} must hold the {time.current} key blocks of a first chunk")
    _, best = jax.lax.top_k(jnp.where(candidates, scores, -jnp.inf), min(budget.width, scores.shape[-1]))
    count = jnp.where(time.past == 0, available, jnp.clip(budget.blocks, 1, jnp.minimum(available, budget.width)))
    count = jnp.broadcast_to(count.astype(jnp.int32), best.shape[:-1])
    return BlockMap(time.blocks[best], count, grid.block_q, grid.block_k)
