"""Hierarchical Sparse Attention: choose frames, then blocks within them (Light Forcing, section 3.3)."""

import jax.numpy as jnp

from lf_jax import config
from lf_jax.arrays import Array, Bool, Float, Int
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.sparsity.growth import Budget
from lf_jax.sparsity.select import Timeline, block_scores, live_tokens, timeline, top_blocks
from lf_jax.tokens import Grid
from pallas_kernels import BlockMap


def light_forcing(
    q: Float[Array, "b t head e"],
    new: ChunkKV,
    cache: KVCache,
    layer: Int[Array, ""],
    budget: Budget,
    grid: Grid,
    settings: config.Sparsity,
) -> BlockMap:
    """A selector. Up to `keep_frames` past frames: the best blocks of all. More: the best blocks of the chunk, the sink
    and near frames, and the middle frames that suit the query block best, `keep_frames` past frames in all.

    The budget may exceed the candidates of the second case, which the paper leaves open: then all of them are kept.
    """
    time = timeline(new, cache, grid)
    scores = block_scores(q, new, cache, layer, time, grid)
    candidates = time.of_frames(kept_frames(scores, time, grid, settings))
    available = jnp.minimum(time.past, settings.keep_frames) * grid.frame_blocks + time.current
    return top_blocks(scores, candidates, available, budget, time, grid)


def kept_frames(
    scores: Float[Array, "b head query_block key_block"], time: Timeline, grid: Grid, settings: config.Sparsity
) -> Bool[Array, "b head query_block slots"]:
    """The past frames whose blocks a query block may visit; frames in the order of time.

    A frame's score is the mean query times the mean key of the frame. Being linear, it is the mean of its blocks'
    scores; here every block weighs as much as it has live tokens, so that the mean is that of the frame's tokens.
    """
    past = scores[..., : time.cached].reshape(*scores.shape[:-1], -1, grid.frame_blocks)
    frame_scores = (past * (live_tokens(grid) / grid.frame_tokens).astype(jnp.float32)).sum(-1)
    frame = jnp.arange(frame_scores.shape[-1])
    always = (frame < settings.sink_frames) | (frame >= time.past - settings.near_frames)
    middle = jnp.where(always, -jnp.inf, frame_scores)  # frames out of sight come after the near ones
    ahead = (middle[..., None, :] > middle[..., None]) | (
        (middle[..., None, :] == middle[..., None]) & (frame < frame[:, None])
    )
    chosen = ahead.sum(-1) < settings.keep_frames - settings.sink_frames - settings.near_frames
    return always | chosen | (time.past <= settings.keep_frames)
