"""Block lists in the forms that kernels walk, made without a sort or a scatter: by comparing all with all and summing.

What an array holds behind the end of a list means nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse.types import BlockMap


def live_first(blocks: BlockMap, frame_tokens: int | None) -> tuple[jax.Array, jax.Array]:
    """Puts the blocks with dead tokens (the padding at the end of a frame) last, all else in the order it had.

    A kernel then masks only the tiles from the first such block on. Lists that say that they have this order are kept.

    Returns:
        index: [b, head, q_block, width] int32.
        whole: [b, head, q_block] int32, how many entries come before the first block with dead tokens.
    """
    if frame_tokens is None or frame_tokens % blocks.block_k == 0:
        return blocks.index, blocks.count
    if blocks.whole is not None:
        return blocks.index, blocks.whole
    frame_blocks = -(-frame_tokens // blocks.block_k)
    return _parted(blocks, blocks.index % frame_blocks != frame_blocks - 1)


def past_first(blocks: BlockMap, cached: int) -> tuple[jax.Array, jax.Array]:
    """Puts the blocks of the past, those below `cached`, before those of the chunk, all else in the order it had.

    Returns:
        index: [b, head, q_block, width] int32.
        old: [b, head, q_block] int32, how many entries name blocks of the past.
    """
    if cached == 0:
        return blocks.index, jnp.zeros_like(blocks.count)
    return _parted(blocks, blocks.index < cached)


def transpose(blocks: BlockMap, wanted: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The query blocks that name each of the wanted key blocks, ascending.

    With groups of more than one key block their lists are merged, and an entry is `query_block * 2**group + members`: bit g
    of the members tells whether the block's list names `wanted[:, g]`.

    Args:
        wanted: [n, group] int, key blocks; -1 for none.

    Returns:
        index: [b, head, n, q_block] int32.
        count: [b, head, n] int32.
    """
    b, heads, queries, width = blocks.index.shape
    group = wanted.shape[1]
    listed = jnp.arange(width) < blocks.count[..., None]
    names = (blocks.index[..., None] == wanted.reshape(-1)) & listed[..., None]  # [b, head, q_block, width, key block]
    visits = jnp.swapaxes(names.any(-2), -1, -2).reshape(b, heads, *wanted.shape, queries)
    some = visits.any(-2)
    entry = jnp.arange(queries, dtype=jnp.int32)
    if group > 1:
        bit = jnp.left_shift(1, jnp.arange(group, dtype=jnp.int32))
        entry = entry * 2**group + (visits * bit[:, None]).sum(-2, dtype=jnp.int32)
    earlier = jnp.cumsum(some, axis=-1, dtype=jnp.int32) - some
    return _placed(entry, jnp.where(some, earlier, -1)), some.sum(-1, dtype=jnp.int32)


def longest_first(count: jax.Array, most: int) -> jax.Array:
    """The last axis of `count`, numbers from 0 to `most`, falling; the place that each had is told as well.

    Returns:
        [..., n] int32: `place * (most + 1) + count`.
    """
    number = jnp.arange(count.shape[-1], dtype=jnp.int32)
    mine, other = count[..., :, None], count[..., None, :]
    before = (other > mine) | ((other == mine) & (number < number[:, None]))
    return _placed(number * (most + 1) + count, before.sum(-1, dtype=jnp.int32))


def _parted(blocks: BlockMap, front: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The listed entries that are flagged `front`, then the other listed ones; how many are in front."""
    number = jnp.arange(front.shape[-1])
    listed = number < blocks.count[..., None]
    mine, other = front[..., :, None], front[..., None, :]
    before = listed[..., None, :] & ((other > mine) | ((other == mine) & (number < number[:, None])))
    place = before.sum(-1, dtype=jnp.int32)
    return _placed(blocks.index, jnp.where(listed, place, -1)), (listed & front).sum(-1, dtype=jnp.int32)


def _placed(values: jax.Array, place: jax.Array) -> jax.Array:
    """out[place[i]] = values[i] along the last axis; places are distinct, what none has is 0."""
    here = place[..., None, :] == jnp.arange(place.shape[-1])[:, None]
    return jnp.where(here, values[..., None, :], 0).sum(-1, dtype=jnp.int32)
