"""Selectors to compare with: one-stage top-k, sink and window, everything, and the true attention mass."""

import jax
import jax.numpy as jnp

from lf_jax import config
from lf_jax.arrays import Array, Float, Int
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.sparsity.growth import Budget
from lf_jax.sparsity.select import Timeline, block_scores, live_tokens, timeline, top_blocks
from lf_jax.tokens import Grid
from pallas_kernels import BlockMap


def topk(
    q: Float[Array, "b t head e"],
    new: ChunkKV,
    cache: KVCache,
    layer: Int[Array, ""],
    budget: Budget,
    grid: Grid,
    settings: config.Sparsity,
) -> BlockMap:
    """A selector: the best blocks by pooled score among all that are visible (one stage)."""
    time = timeline(new, cache, grid)
    return _best_visible(block_scores(q, new, cache, layer, time, grid), budget, time, grid)


def window(
    q: Float[Array, "b t head e"],
    new: ChunkKV,
    cache: KVCache,
    layer: Int[Array, ""],
    budget: Budget,
    grid: Grid,
    settings: config.Sparsity,
) -> BlockMap:
    """A selector: the chunk, the sink frames and the near frames, in this order as far as the budget goes."""
    time = timeline(new, cache, grid)
    frame = jnp.arange(cache.frames)
    sink, near = frame < settings.sink_frames, frame >= time.past - settings.near_frames
    rank = jnp.where(sink, float(cache.frames), frame.astype(jnp.float32))  # newest first after the sink
    rank = jnp.concatenate([jnp.repeat(rank, grid.frame_blocks), jnp.full(time.current, cache.frames + 1.0)])
    available = jnp.minimum(time.past, settings.sink_frames + settings.near_frames) * grid.frame_blocks + time.current
    scores = jnp.broadcast_to(rank, (*_rows(q, grid), rank.shape[0]))
    return top_blocks(scores, time.of_frames(sink | near), available, budget, time, grid)


def full(
    q: Float[Array, "b t head e"],
    new: ChunkKV,
    cache: KVCache,
    layer: Int[Array, ""],
    budget: Budget,
    grid: Grid,
    settings: config.Sparsity,
) -> BlockMap:
    """A selector: every visible block, in the order of time, as far as the budget goes: dense attention as lists."""
    time = timeline(new, cache, grid)
    return _best_visible(jnp.zeros((*_rows(q, grid), time.blocks.shape[0])), budget, time, grid)


def oracle(
    q: Float[Array, "b t head e"],
    new: ChunkKV,
    cache: KVCache,
    layer: Int[Array, ""],
    budget: Budget,
    grid: Grid,
    settings: config.Sparsity,
) -> BlockMap:
    """A selector: the blocks that hold the most attention, computed densely. Shows how much a better choice could gain.

    Costs dense attention and a copy of one layer's keys.
    """
    time = timeline(new, cache, grid)
    return _best_visible(attention_mass(q, new, cache, layer, time, grid), budget, time, grid)


def attention_mass(
    q: Float[Array, "b t head e"], new: ChunkKV, cache: KVCache, layer: Int[Array, ""], time: Timeline, grid: Grid
) -> Float[Array, "b head query_block key_block"]:
    """Softmax probability that the tokens of a query block give to each key block, mean over tokens; float32.

    Key blocks in the order of `time`; the rows add up to 1.
    """
    b, t, head, e = q.shape
    keys = jnp.concatenate([jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False), new.k], axis=1)
    keys = keys.reshape(b, -1, grid.block_k, head, e)[:, time.blocks]
    token_lives = jnp.arange(grid.block_k) < jnp.asarray(live_tokens(grid))[:, None]  # [block of a frame, token]
    visible = time.of_frames(jnp.ones(cache.frames, bool))
    attended = visible[:, None] & jnp.tile(token_lives, (visible.shape[0] // grid.frame_blocks, 1))
    pad = -t % grid.block_q
    queries = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, -1, grid.block_q, head, e)
    query_lives = (jnp.arange(t + pad) < t).reshape(-1, grid.block_q)

    def mass(block: tuple[Array, Array]) -> Array:
        rows, lives = block
        logits = jnp.einsum("bthe,bkjhe->bhtkj", rows, keys, preferred_element_type=jnp.float32) * e**-0.5
        logits = jnp.where(attended, logits, -jnp.inf)
        share = jax.nn.softmax(logits, axis=(-2, -1)).sum(-1)
        return jnp.einsum("bhtk,t->bhk", share, lives / lives.sum())

    return jnp.moveaxis(jax.lax.map(mass, (jnp.moveaxis(queries, 1, 0), query_lives)), 0, 2)


def _best_visible(scores: Array, budget: Budget, time: Timeline, grid: Grid) -> BlockMap:
    visible = time.of_frames(jnp.ones(time.cached // grid.frame_blocks, bool))
    return top_blocks(scores, visible, time.past * grid.frame_blocks + time.current, budget, time, grid)


def _rows(q: Array, grid: Grid) -> tuple[int, int, int]:
    """Batch, heads and query blocks."""
    return q.shape[0], q.shape[2], -(-q.shape[1] // grid.block_q)
