"""SLA's linear branch: what the block lists leave out, read by linear attention (arXiv 2509.24006).

Plain XLA: the sums of every key block, then for every query block the sum over the blocks that it does not visit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Bool, Float
from lf_jax.sparsity.select import Inputs, live_tokens
from pallas_kernels import BlockMap


def linear_attention(inputs: Inputs, blocks: BlockMap) -> Float[Array, "b t head e"]:
    """Linear attention of the query blocks to the visible key blocks that `blocks` does not list for them.

        o_i = phi(q_i) H / (phi(q_i) z),  H = sum_j phi(k_j)^T v_j,  z = sum_j phi(k_j),  phi = softmax over the features

    with j over the tokens of these blocks; 0 where there are none. In float32, rounded once. The paper sorts the blocks that
    are not attended to into marginal ones and negligible ones, which it leaves out altogether. Here all are marginal, as in
    the code that its authors first released.
    """
    q, grid = inputs.q, inputs.grid
    b, t, head, e = q.shape
    keys, values = (inputs.of_layer(name).astype(jnp.float32).reshape(b, -1, grid.block_k, head, e) for name in ("k", "v"))
    lives = np.arange(grid.block_k) < np.tile(live_tokens(grid), keys.shape[1] // grid.frame_blocks)[:, None]
    features = jax.nn.softmax(keys, axis=-1) * lives[:, :, None, None]
    products = jnp.einsum("bkjhe,bkjhf->bhkef", features, values)
    left = left_out(inputs, blocks).astype(jnp.float32)
    numerators = jnp.einsum("bhqk,bhkef->bhqef", left, products)
    totals = jnp.einsum("bhqk,bkhe->bhqe", left, features.sum(2))

    queries = jnp.pad(jax.nn.softmax(q.astype(jnp.float32), axis=-1), ((0, 0), (0, -t % grid.block_q), (0, 0), (0, 0)))
    queries = queries.reshape(b, -1, grid.block_q, head, e)
    total = jnp.einsum("bqthe,bhqe->bqth", queries, totals)
    out = jnp.einsum("bqthe,bhqef->bqthf", queries, numerators) / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(b, -1, head, e)[:, :t].astype(q.dtype)


def left_out(inputs: Inputs, blocks: BlockMap) -> Bool[Array, "b head query_block key_block"]:
    """The visible blocks that are not listed; key blocks as `BlockMap` numbers them, not in the order of time."""
    time, (*rows, width) = inputs.time, blocks.index.shape
    listed = (jnp.arange(width) < blocks.count[..., None]).reshape(-1, width)
    row = jnp.arange(listed.shape[0])[:, None]
    times = jnp.zeros((listed.shape[0], time.blocks.size), jnp.int32).at[row, blocks.index.reshape(-1, width)].add(listed)
    visible = jnp.zeros(time.blocks.size, bool).at[time.blocks].set(time.visible)
    return visible & (times == 0).reshape(*rows, -1)
