"""The parts that selectors are made of: what a chunk can see, pooled scores, the best blocks of every query block.

A selector is a pure function `selector(inputs: Inputs) -> BlockMap`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import cache as kv
from lf_jax import config
from lf_jax.arrays import Array, Bool, Float, Leaf
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.sparsity.growth import Budget
from lf_jax.tokens import Grid
from pallas_kernels import BlockMap, selection


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "past"], meta_fields=["cached", "frame_blocks"])
@dataclasses.dataclass(frozen=True)
class Timeline:
    """The key blocks of the cache and the chunk in the order of time, whatever slots their frames lie in.

    First the visible past, then the cache blocks out of sight, last the chunk. Selection works in this order, so the
    blocks it takes, and how it breaks ties, do not depend on where the ring stands.
    """

    blocks: Leaf  # [key block] int32: the number of the block in a `BlockMap`
    past: Leaf  # [] int32: visible past frames
    cached: int  # key blocks of the cache
    frame_blocks: int  # key blocks of a frame

    @property
    def current(self) -> int:
        """Key blocks of the chunk."""
        return self.blocks.shape[0] - self.cached

    @property
    def visible(self) -> Bool[Array, " key_block"]:
        block = jnp.arange(self.blocks.shape[0])
        return (block < self.past * self.frame_blocks) | (block >= self.cached)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "new", "cache", "layer", "time", "budget", "means"],
    meta_fields=["grid", "settings"],
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a selector gets: one layer of a chunk, and what the chunk may see and spend."""

    q: Leaf  # [b, t, head, head_dim], after qk-norm and RoPE
    new: ChunkKV  # of the layer
    cache: KVCache  # of all layers
    layer: Leaf  # [] int32: which of them
    time: Timeline
    budget: Budget
    grid: Grid
    settings: config.Sparsity
    means: Leaf = None  # [b, query_block, head, head_dim] float32: the mean query of every block, where it is known already

    def of_layer(self, name: str) -> Array:
        """The "k", "v" or "pooled" of the layer, [b, .., head, head_dim]: of the cache, then of the chunk, as blocks count."""
        past = jax.lax.dynamic_index_in_dim(getattr(self.cache, name), self.layer, keepdims=False)
        return jnp.concatenate([past, getattr(self.new, name)], axis=1)


Selector = Callable[[Inputs], BlockMap]


def timeline(cache: KVCache, frames: int, grid: Grid) -> Timeline:
    """What a chunk of `frames` frames that follows the cached ones can see; the same in all layers and steps."""
    frame = kv.visible(cache, frames)
    slot = jnp.argsort(jnp.where(frame < 0, jnp.iinfo(jnp.int32).max, frame)).astype(jnp.int32)
    cached = cache.frames * grid.frame_blocks
    past = (slot[:, None] * grid.frame_blocks + jnp.arange(grid.frame_blocks)).reshape(-1)
    chunk = cached + jnp.arange(frames * grid.frame_blocks)
    return Timeline(jnp.concatenate([past, chunk]).astype(jnp.int32), (frame >= 0).sum(), cached, grid.frame_blocks)


def live_tokens(grid: Grid) -> np.ndarray:
    """Live tokens of every key block of a frame, [key block] int."""
    return np.clip(grid.frame_tokens - np.arange(grid.frame_blocks) * grid.block_k, 0, grid.block_k)


def visible_tokens(inputs: Inputs) -> Float[Array, " key_block"]:
    """Live tokens of every key block in the order of time, 0 of blocks out of sight."""
    live = np.tile(live_tokens(inputs.grid), inputs.time.blocks.size // inputs.grid.frame_blocks)
    return jnp.where(inputs.time.visible, jnp.asarray(live, jnp.float32), 0.0)


def pool_keys(
    k: Float[Array, "b padded head e"], grid: Grid, implementation: str | None = None
) -> Float[Array, "b block head e"]:
    """The mean key of every block over its live tokens, in float32. No gradient flows through it."""
    sizes = np.tile(live_tokens(grid), k.shape[1] // grid.padded_frame).tolist()
    return selection.block_means(jax.lax.stop_gradient(k), sizes, grid.block_k, implementation=implementation)


def pool_queries(
    q: Float[Array, "b t head e"], block_q: int, implementation: str | None = None
) -> Float[Array, "b block head e"]:
    """The mean query of every block, in float32; the last block may be short."""
    whole, rest = divmod(q.shape[1], block_q)
    return selection.block_means(q, [block_q] * whole + [rest] * (rest > 0), block_q, implementation=implementation)


def mean_queries(inputs: Inputs) -> Float[Array, "b query_block head e"]:
    """The mean query of every query block, in float32."""
    if inputs.means is not None:
        return inputs.means
    return pool_queries(inputs.q, inputs.grid.block_q, inputs.settings.selection)


def block_scores(inputs: Inputs) -> Float[Array, "b head query_block key_block"]:
    """Mean query . mean key, in float32 without scale or softmax; key blocks in the order of `inputs.time`."""
    cache, slots = inputs.cache, inputs.cache.frames
    return selection.block_scores(
        mean_queries(inputs),
        inputs.new.pooled,
        inputs.time.blocks,
        past=cache.pooled if slots else None,
        layer=inputs.layer if slots else None,
        implementation=inputs.settings.selection,
    )


def best_blocks(inputs: Inputs, scores: Float[Array, "b head query_block key_block"], **frames: int) -> BlockMap:
    """The best visible blocks of every query block, as many as the budget says.

    Of equal scores the earlier frame wins, then the lower block. A chunk without a past keeps all its blocks.

    Args:
        scores: key blocks in the order of `inputs.time`.
        frames: `keep_frames`, `sink_frames`, `near_frames` of `pallas_kernels.selection.choose_blocks`, to choose among the
            blocks of some past frames only.

    Raises:
        ValueError: if the lists are too narrow for a chunk without a past.
    """
    time, grid = inputs.time, inputs.grid
    return selection.choose_blocks(
        scores,
        time.blocks,
        time.past,
        inputs.budget.blocks,
        cached=time.cached,
        width=inputs.budget.width,
        block_q=grid.block_q,
        block_k=grid.block_k,
        frame_tokens=grid.frame_tokens,
        implementation=inputs.settings.selection,
        **frames,
    )
