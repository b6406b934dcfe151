"""Gradients of block-sparse attention for Hopper (compute capability 9.0), Mosaic GPU: two deterministic kernels.

With p = exp(scale * q k^T - lse), dp = dout v^T and ds = p * (dp - delta), delta = rowsum(dout * out):

    dq = scale * ds k        `hopper_queries`: a thread block holds 128 queries and walks their lists, as the forward does
    dv = p^T dout            `hopper_keys`: a warpgroup holds 64 keys and walks the queries that name them, the map
    dk = scale * ds^T q      transposed (`lists.transpose`)

Both recompute the scores, seven products where one kernel would need five: the price of a sum in a fixed order, with
no atomics and nothing read back. Most training needs no gradient of the cached past; then `hopper_keys` has only the
chunk's own keys to serve, which saves more.

The scores of `hopper_keys` are made transposed, keys down and queries across. So p^T and ds^T come out of the tensor cores
in the registers where the next products take their left operand, and never pass through shared memory.

Lists of keys differ in length by far more than lists of queries, so `hopper_keys` is persistent: items sorted by length are
dealt out to and fro over all consumer warpgroups of the GPU, each of which runs its items on its own, with its own
copies. While one of a multiprocessor's pair stores a result and waits for its next keys, the other computes.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.hopper_common import LOG2E, ROWS, BackwardConfig
from pallas_kernels.block_sparse.hopper_keys import keys
from pallas_kernels.block_sparse.hopper_queries import queries
from pallas_kernels.block_sparse.types import BlockMap, Past


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past: Past | None,
    blocks: BlockMap,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    frame_tokens: int | None,
    past_gradient: bool,
    config: BackwardConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Gradients of `api.block_sparse_attention`, whose arguments, `out` and `lse` these are.

    Args:
        q, out, dout: [b, tq, head, e], bfloat16 or float16, e 64 or 128.
        k, v: [b, tk, head, e].
        lse: [b, head, tq] float32, natural logarithm.
        blocks: block_q 64 or 128, block_k 32, 64 or 128.
        past_gradient: whether the keys and values of the past have a gradient too; where not, it costs nothing.

    Returns:
        dq, dk, dv in the shapes of q, k, v, and the gradient of the one layer of the past that was read, two arrays
        [b, s, head, e], or None. A key that no list names, and a dead one, has gradient 0.

    Raises:
        NotImplementedError: for a dtype, head dimension or block size that the kernels are not made for.
    """
    _check(q, blocks)
    tq = q.shape[1]
    padded = -(-tq // (2 * ROWS)) * 2 * ROWS
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    # of the padding and of rows that attend to nothing (lse -inf) the products are zero and 2**-0 is finite
    stats = jnp.stack([jnp.where(lse == -jnp.inf, 0, lse * LOG2E), delta], axis=2)
    stats = jnp.pad(stats, ((0, 0), (0, 0), (0, 0), (0, padded - tq)))
    shape = dict(scale=scale, frame_tokens=frame_tokens, config=config)
    dq = queries(q, dout, stats, k, v, past, blocks, **shape)
    dk, dv, dpast = keys(q, dout, stats, k, v, past, blocks, past_gradient=past_gradient and past is not None, **shape)
    return dq, dk, dv, dpast


def _check(q: jax.Array, blocks: BlockMap) -> None:
    rules = {
        f"{q.dtype=} must be bfloat16 or float16": q.dtype in (jnp.bfloat16, jnp.float16),
        f"{q.shape[3]=}, the head dimension, must be 64 or 128": q.shape[3] in (64, 128),
        f"{blocks.block_q=} must be 64 or 128": blocks.block_q in (64, 128),
        f"{blocks.block_k=} must be 32, 64 or 128": blocks.block_k in (32, 64, 128),
    }
    for rule, holds in rules.items():
        if not holds:
            raise NotImplementedError(f"gradient of block-sparse attention for Hopper: {rule}")
