"""Skipping the choice of blocks where there is none."""

import jax
import jax.numpy as jnp

from lf_jax.sparsity.select import Inputs, Selector
from pallas_kernels import BlockMap
from pallas_kernels.block_sparse import lists


def unless_everything(choose: Selector, inputs: Inputs) -> BlockMap:
    """`choose(inputs)`; or where the budget holds all that the chunk sees, lists of all of it without calling that.

    The lists are in the order of time, but for blocks with dead tokens, which come last if `choose` puts them there
    (`BlockMap.whole`).
    """
    time, grid, budget = inputs.time, inputs.grid, inputs.budget
    like = jax.eval_shape(choose, inputs)
    past = time.past * time.frame_blocks
    seen, width = past + time.current, like.index.shape[-1]

    def everything() -> BlockMap:
        entry = jnp.arange(width)
        place = jnp.where(entry < past, entry, time.cached + entry - past)
        index = time.blocks[jnp.minimum(place, time.blocks.size - 1)].reshape(1, 1, 1, width)
        whole = None
        if like.whole is not None:
            blocks = BlockMap(index, seen.astype(jnp.int32).reshape(1, 1, 1), grid.block_q, grid.block_k)
            index, whole = lists.live_first(blocks, grid.frame_tokens)
            whole = jnp.broadcast_to(whole, like.count.shape)
        count = jnp.full(like.count.shape, seen, jnp.int32)
        return BlockMap(jnp.broadcast_to(index, like.index.shape), count, grid.block_q, grid.block_k, whole)

    unchosen = ((budget.blocks >= seen) | (time.past == 0)) & (seen <= width)
    return jax.lax.cond(unchosen, everything, lambda: choose(inputs))
