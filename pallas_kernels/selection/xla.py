"""Selection in plain XLA: runs on any backend, and is what the kernels are checked against. Lists come best block first."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selection.types import Rule


def means(x, sizes, block):
    """See `api.block_means`."""
    b, tokens, *head = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, len(sizes) * block - tokens), (0, 0), (0, 0)))
    sizes = np.asarray(sizes)[:, None]
    share = (np.arange(block) < sizes) / sizes.astype(np.float32)  # one kernel, where a quotient of the sum takes two
    return (x.reshape(b, -1, block, *head) * share[..., None, None]).sum(2)


def scores(queries, keys, order, past, layer):
    """See `api.block_scores`; every argument is required."""
    if past is not None:
        cached = past.shape[2]
        old = jnp.moveaxis(past[layer, :, order[:cached]], 0, 1)
        keys = jnp.concatenate([old, keys[:, order[cached:] - cached]], axis=1)
    else:
        keys = keys[:, order]
    return jnp.einsum("bqhe,bkhe->bhqk", queries, keys, precision=jax.lax.Precision.HIGHEST)


def choose(scores, order, past_frames, budget, rule: Rule):
    """See `api.choose_blocks`. Returns the index, the count, and None: the lists are in no order of a kernel's."""
    current = order.shape[0] - rule.cached
    kept = kept_frames(scores[..., : rule.cached], past_frames, rule)
    chunk = jnp.ones((*kept.shape[:-1], current), bool)
    candidates = jnp.concatenate([jnp.repeat(kept, rule.frame_blocks, axis=-1), chunk], axis=-1)
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k holds -0 for less than 0
    _, best = jax.lax.top_k(jnp.where(candidates, scores, -jnp.inf), rule.width)
    frames = past_frames if rule.keep_frames is None else jnp.minimum(past_frames, rule.keep_frames)
    available = frames * rule.frame_blocks + current
    count = jnp.where(past_frames == 0, available, jnp.clip(budget, 1, jnp.minimum(available, rule.width)))
    return order[best], jnp.broadcast_to(count.astype(jnp.int32), best.shape[:-1]), None


def kept_frames(past_scores: jax.Array, past_frames: jax.Array, rule: Rule) -> jax.Array:
    """The past frames whose blocks a query block may visit, [b, head, query_block, frame] bool, in the order of time."""
    blocks = past_scores.reshape(*past_scores.shape[:-1], rule.cached // rule.frame_blocks, rule.frame_blocks)
    frame = jnp.arange(blocks.shape[-2])
    visible = frame < past_frames
    if rule.keep_frames is None:
        return jnp.broadcast_to(visible, blocks.shape[:-1])
    live = np.full(rule.frame_blocks, rule.block_k, np.float32)
    live[-1] -= rule.dead
    always = (frame < rule.sink_frames) | (frame >= past_frames - rule.near_frames)
    middle = jnp.where(always, -jnp.inf, (blocks * live).sum(-1))  # frames out of sight come after the near ones
    ahead = (middle[..., None, :] > middle[..., None]) | (
        (middle[..., None, :] == middle[..., None]) & (frame < frame[:, None])
    )
    chosen = ahead.sum(-1) < rule.keep_frames - rule.sink_frames - rule.near_frames
    return visible & (always | chosen)
