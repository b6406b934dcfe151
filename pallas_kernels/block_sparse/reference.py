"""Block-sparse attention as its definition reads: one dense mask, one softmax, float32. What every kernel must equal.

Shares no code and no default with the other implementations. Holds all logits at once: for tests.
"""

import jax.numpy as jnp


def attention(q, k, v, blocks, past, scale, frame_tokens):
    """See `api.block_sparse_attention`; every argument is required. Returns (out, lse)."""
    if past is not None:
        k = jnp.concatenate([past.k[past.layer], k], axis=1)
        v = jnp.concatenate([past.v[past.layer], v], axis=1)
    mask = token_mask(blocks, q.shape[1], k.shape[1], frame_tokens)
    logits = scale * jnp.einsum("bqhe,bkhe->bhqk", q.astype(jnp.float32), k.astype(jnp.float32), precision="highest")
    logits = jnp.where(mask, logits, -jnp.inf)
    attends = mask.any(-1)
    top = jnp.where(attends, logits.max(-1), 0.0)
    weight = jnp.where(mask, jnp.exp(logits - top[..., None]), 0.0)
    total = jnp.where(attends, weight.sum(-1), 1.0)
    out = jnp.einsum("bhqk,bkhe->bqhe", weight / total[..., None], v.astype(jnp.float32), precision="highest")
    return out.astype(q.dtype), jnp.where(attends, top + jnp.log(total), -jnp.inf)


def token_mask(blocks, queries, keys, frame_tokens):
    """Which query token attends to which key token, [b, head, queries, keys] bool."""
    listed = jnp.arange(blocks.index.shape[-1]) < blocks.count[..., None]
    every_block = jnp.arange(keys // blocks.block_k)
    visits = ((blocks.index[..., None] == every_block) & listed[..., None]).any(-2)  # [b, head, query block, key block]
    by_query = jnp.repeat(visits, blocks.block_q, axis=2)[:, :, :queries]
    by_token = jnp.repeat(by_query, blocks.block_k, axis=3)
    if frame_tokens is None:
        return by_token
    padded = -(-frame_tokens // blocks.block_k) * blocks.block_k
    return by_token & (jnp.arange(keys) % padded < frame_tokens)
