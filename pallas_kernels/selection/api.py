"""The public calls: check their arguments, pick an implementation, run it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.types import BlockMap
from pallas_kernels.choice import choose, require
from pallas_kernels.selection import triton, xla
from pallas_kernels.selection.types import Rule


class Implementation(NamedTuple):
    reason: Callable[..., str | None]  # (head_dim, frames, frame_blocks) -> why it cannot run that here; None if it can
    means: Callable[..., jax.Array]  # (x, sizes, block) -> means
    scores: Callable[..., jax.Array]  # (queries, keys, order, past, layer) -> scores
    choose: Callable[..., tuple]  # (scores, order, past_frames, budget, rule) -> index, count, whole or None


# In order of preference.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(triton.reason, triton.means, triton.scores, triton.choose),
    "xla": Implementation(lambda *call: None, xla.means, xla.scores, xla.choose),
}


def block_means(x: jax.Array, sizes: Sequence[int], block: int, *, implementation: str | None = None) -> jax.Array:
    """The mean of every block of `block` neighbouring tokens, in float32.

    Args:
        x: [b, t, head, e].
        sizes: tokens that count of each block, its first ones; the last block may lack the others.
        implementation: as in `block_scores`.

    Returns:
        [b, len(sizes), head, e] float32.

    Raises:
        ValueError: for sizes that do not fit the tokens, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    require(all(0 < size <= block for size in sizes), f"{sizes=} must lie in 1..{block}, the tokens of a block")
    least, most = (len(sizes) - 1) * block + sizes[-1], len(sizes) * block
    require(least <= x.shape[1] <= most, f"{x.shape=} must have {least} to {most} tokens for {len(sizes)} blocks of {block}")
    return _chosen(implementation, x.shape[3], 1, 1).means(x, tuple(sizes), block)


def block_scores(
    queries: jax.Array,
    keys: jax.Array,
    order: jax.Array,
    *,
    past: jax.Array | None = None,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Products of mean queries and mean keys in float32, without scale or softmax.

    Args:
        queries: [b, query_block, head, e] float32, the mean query of every block.
        keys: [b, key_block, head, e] float32, the mean key of every block of the chunk.
        order: [key_block] int32: the numbers of all key blocks, of the past and of the chunk, as in a `BlockMap`. First
            those of the past, in any order, then those of the chunk.
        past: [layer, b, key_block, head, e] float32, the same of the cache, of all layers; None where there is none.
        layer: [] int32, which of them.
        implementation: "triton" (compute capability 8.x, 9.x, 12.x) or "xla" (any backend): a named one runs or raises. None
            takes the first that can run the call.

    Returns:
        [b, head, query_block, key_block] float32, key blocks as in `order`.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    b, _, heads, e = queries.shape
    cached = 0 if past is None else past.shape[2]
    require(keys.shape[:1] + keys.shape[2:] == (b, heads, e), f"{keys.shape=} must be [{b}, key_block, {heads}, {e}]")
    require((past is None) == (layer is None), "past and layer go together")
    if past is not None:
        require(past.shape[1:] == (b, cached, heads, e), f"{past.shape=} must be [layer, {b}, key_block, {heads}, {e}]")
    every = cached + keys.shape[1]
    require(order.shape == (every,), f"{order.shape=} must name {every} key blocks")
    for name, array in (("queries", queries), ("keys", keys), ("past", past)):
        require(array is None or array.dtype == jnp.float32, f"{name} must be float32, received {getattr(array, 'dtype', '')}")
    return _chosen(implementation, e, 1, 1).scores(queries, keys, order, past, layer)


def choose_blocks(
    scores: jax.Array,
    order: jax.Array,
    past_frames: jax.Array,
    budget: jax.Array,
    *,
    cached: int,
    width: int,
    block_q: int,
    block_k: int,
    frame_tokens: int,
    keep_frames: int | None = None,
    sink_frames: int = 0,
    near_frames: int = 0,
    implementation: str | None = None,
) -> BlockMap:
    """The best key blocks of every query block, as many as the budget says: of all that are in sight, or of some frames.

    With `keep_frames`, and more than that many past frames in sight, a query block has these candidates only: the blocks of
    the chunk, of the first `sink_frames`, of the last `near_frames`, and of as many of the frames between as make
    `keep_frames` in all, the best by the sum of the scores of their live tokens. Where the budget exceeds the candidates it
    gets them all, and without a past the whole chunk. Of equal scores the earlier wins (0 and -0 are equal).

    Args:
        scores: [b, head, query_block, key_block] float32, in the order of time: the past that is in sight, the past that
            is not, the chunk; whole frames.
        order: [key_block] int32, the numbers of these blocks.
        past_frames: [] int32, frames of the past that are in sight.
        budget: [] int32, key blocks of a query block; what is below 1 counts as 1.
        cached: key blocks of the past, in sight or not.
        width: entries of a list, more than there are blocks count as so many.
        block_q, block_k: tokens of a query block and of a key block.
        frame_tokens: live tokens of a frame, whose last key block may hold fewer than `block_k`.
        implementation: as in `block_scores`.

    Returns:
        The lists; their order is the implementation's own.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    blocks, frame_blocks = scores.shape[-1], -(-frame_tokens // block_k)
    require(
        scores.ndim == 4 and scores.dtype == jnp.float32,
        f"scores must be float32 [b, head, query_block, key_block], received {scores.dtype} {scores.shape}",
    )
    require(order.shape == (blocks,), f"{order.shape=} must name {blocks} key blocks")
    require(blocks % frame_blocks == 0, f"{blocks} key blocks must be whole frames of {frame_blocks}")
    require(
        0 <= cached < blocks and cached % frame_blocks == 0, f"{cached=} must be whole frames of {frame_blocks} in {blocks}"
    )
    require(width >= blocks - cached, f"{width=} must hold the {blocks - cached} key blocks of a first chunk")
    require(
        keep_frames is None or keep_frames > sink_frames + near_frames,
        f"{keep_frames=} must exceed {sink_frames=} + {near_frames=}",
    )
    dead = frame_blocks * block_k - frame_tokens
    rule = Rule(cached, min(width, blocks), frame_blocks, block_k, dead, keep_frames, sink_frames, near_frames)
    choose = _chosen(implementation, None, blocks // frame_blocks, frame_blocks).choose
    index, count, whole = choose(scores, order, past_frames, budget, rule)
    return BlockMap(index, count, block_q, block_k, whole)


def explain(head_dim: int | None, frames: int, frame_blocks: int) -> dict[str, str | None]:
    """Every implementation in the order of choice: why it cannot run such calls on this machine, or None if it can.

    Args:
        head_dim: of queries and keys; None where scores come from elsewhere.
        frames, frame_blocks: frames of a row of scores, and key blocks of each.
    """
    return {name: choice.reason(head_dim, frames, frame_blocks) for name, choice in IMPLEMENTATIONS.items()}


def _chosen(name: str | None, *call: Any) -> Implementation:
    return IMPLEMENTATIONS[choose("selection", name, explain(*call))]
