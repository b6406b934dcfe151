"""Block lists in the forms that kernels walk, made without a sort or a scatter: each is one comparison and one sum."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.types import BlockMap


def live_first(blocks: BlockMap, frame_tokens: int | None) -> tuple[jax.Array, jax.Array]:
    """Puts the blocks with dead tokens (the padding at the end of a frame) last, all else in the order it had.

    A kernel then masks only the tiles from the first such block on.

    Returns:
        index: [b, head, q_block, width] int32; zero where the list is over, so that every entry names a block.
        whole: [b, head, q_block] int32, how many entries come before the first block with dead tokens.
    """
    listed = jnp.arange(blocks.index.shape[-1]) < blocks.count[..., None]
    if frame_tokens is None or frame_tokens % blocks.block_k == 0:
        return jnp.where(listed, blocks.index, 0), blocks.count
    frame_blocks = -(-frame_tokens // blocks.block_k)
    last = blocks.index % frame_blocks == frame_blocks - 1
    return _parted(blocks.index, listed & ~last, listed & last)


def past_first(blocks: BlockMap, cached: int) -> tuple[jax.Array, jax.Array]:
    """Puts the blocks of the past, those below `cached`, before those of the chunk, all else in the order it had.

    Returns:
        index: [b, head, q_block, width] int32; zero where the list is over, so that every entry names a block.
        old: [b, head, q_block] int32, how many entries name blocks of the past.
    """
    listed = jnp.arange(blocks.index.shape[-1]) < blocks.count[..., None]
    if cached == 0:
        return jnp.where(listed, blocks.index, 0), jnp.zeros_like(blocks.count)
    old = blocks.index < cached
    return _parted(blocks.index, listed & old, listed & ~old)


def transpose(blocks: BlockMap, first: int, number: int, group: int = 1) -> tuple[jax.Array, jax.Array]:
    """The query blocks that name each of the key blocks `first` to `first + number - 1`, ascending.

    With `group` above 1 the lists of that many neighbouring key blocks are merged, and an entry is
    `query_block * 2**group + members`: bit g of the members tells whether the block's list names key block g of the
    group. A last group may be incomplete.

    Returns:
        index: [b, head, number / group, q_block] int32, zero where a list is over.
        count: [b, head, number / group] int32.
    """
    b, heads, queries, width = blocks.index.shape
    listed = jnp.arange(width) < blocks.count[..., None]
    groups = -(-number // group)
    wanted = first + jnp.arange(groups * group)
    wanted = jnp.where(wanted < first + number, wanted, -1)  # no list names what is beyond the end
    names = (blocks.index[..., None] == wanted) & listed[..., None]  # [b, head, q_block, width, key block]
    visits = jnp.swapaxes(names.any(-2), -1, -2).reshape(b, heads, groups, group, queries)
    some = visits.any(-2)
    entry = jnp.arange(queries, dtype=jnp.int32)
    if group > 1:
        bit = jnp.left_shift(1, jnp.arange(group, dtype=jnp.int32))
        entry = entry * 2**group + (visits * bit[:, None]).sum(-2, dtype=jnp.int32)
    return _placed(jnp.broadcast_to(entry, some.shape), _earlier(some), some, queries), some.sum(-1, dtype=jnp.int32)


def _earlier(flags: jax.Array) -> jax.Array:
    """How many flags are set before each one, along the last axis."""
    return jnp.cumsum(flags, axis=-1, dtype=jnp.int32) - flags


def _parted(values: jax.Array, front: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values flagged `front`, then those flagged `back`, then zeros, along the last axis; how many are in front."""
    number = front.sum(-1, dtype=jnp.int32)
    place = jnp.where(front, _earlier(front), number[..., None] + _earlier(back))
    return _placed(values, place, front | back, values.shape[-1]), number


def _placed(values: jax.Array, place: jax.Array, used: jax.Array, width: int) -> jax.Array:
    """out[place[i]] = values[i] for all used i, along the last axis; places are distinct, what none has is 0."""
    here = (place[..., None, :] == jnp.arange(width)[:, None]) & used[..., None, :]
    return jnp.where(here, values[..., None, :], 0).sum(-1, dtype=jnp.int32)
