"""Block-sparse attention in plain XLA: runs on any backend, and is differentiable.

One query block at a time gathers the key blocks of its list from the cache and from the chunk, so memory grows with
one list, not with the queries. The gather addresses the stacked cache by layer: a layer is never sliced out. (XLA's CPU
backend gathers 16-bit floats as float32 and converts the cache for it: on CPUs run float32.)
"""

from functools import partial

import jax
import jax.numpy as jnp


def attention(q, k, v, blocks, past, scale, frame_tokens):
    """See `api.block_sparse_attention`; every argument is required. Returns (out, lse)."""
    b, tq, heads, e = q.shape
    size_q, size_k = blocks.block_q, blocks.block_k
    width = blocks.index.shape[-1]
    cached = 0 if past is None else past.k.shape[2] // size_k
    # Sums in float32; of float32 without rounding them to TF32 first, as would be the default on GPUs.
    precision = "highest" if q.dtype == jnp.float32 else None
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)

    def gather(new, old, index):
        """The listed blocks, [b, head, width * block_k, e]."""
        batch, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[None, :, None]
        chunk = new.reshape(b, -1, size_k, heads, e)
        taken = chunk[batch, jnp.clip(index - cached, 0, chunk.shape[1] - 1), :, head]
        if cached:
            cache = old.reshape(old.shape[0], b, cached, size_k, heads, e)
            from_cache = cache[past.layer, batch, jnp.clip(index, 0, cached - 1), :, head]
            taken = jnp.where((index < cached)[..., None, None], from_cache, taken)
        return taken.reshape(b, heads, width * size_k, e)

    @jax.checkpoint
    def attend(block):
        rows, index, count = block  # [b, block_q, head, e], [b, head, width], [b, head]
        keys = gather(k, past and past.k, index)
        values = gather(v, past and past.v, index)
        mask = jnp.arange(width)[:, None] < count[..., None, None]  # [b, head, width, 1]
        if frame_tokens is not None:
            frame_blocks = -(-frame_tokens // size_k)
            token = (index % frame_blocks * size_k)[..., None] + jnp.arange(size_k)
            mask &= token < frame_tokens
        mask = jnp.broadcast_to(mask, (b, heads, width, size_k)).reshape(b, heads, 1, width * size_k)
        logits = einsum("bqhe,bhke->bhqk", rows, keys) * scale
        logits = jnp.where(mask, logits, -jnp.inf)
        some = (count > 0)[..., None]  # a row that attends to nothing has no maximum and no logarithm
        top = jax.lax.stop_gradient(jnp.where(some, logits.max(-1), 0.0))
        weight = jnp.where(mask, jnp.exp(logits - top[..., None]), 0.0)
        total = jnp.where(some, weight.sum(-1), 1.0)
        out = einsum("bhqk,bhke->bhqe", weight.astype(v.dtype), values)
        out = jnp.moveaxis(out / total[..., None], 1, 2).astype(q.dtype)
        return out, jnp.where(some, top + jnp.log(total), -jnp.inf)

    rows = jnp.pad(q, ((0, 0), (0, -tq % size_q), (0, 0), (0, 0))).reshape(b, -1, size_q, heads, e)
    each = jnp.moveaxis(rows, 1, 0), jnp.moveaxis(blocks.index, 2, 0), jnp.moveaxis(blocks.count, 2, 0)
    out, lse = jax.lax.map(attend, each)  # [query block, b, block_q, head, e], [query block, b, head, block_q]
    out = jnp.moveaxis(out, 0, 1).reshape(b, -1, heads, e)[:, :tq]
    return out, jnp.moveaxis(lse, 0, 2).reshape(b, heads, -1)[..., :tq]
