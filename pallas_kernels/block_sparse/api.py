"""The public call: checks its arguments, picks an implementation, runs it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import hopper, reference, triton_backward, triton_forward, xla
from pallas_kernels.block_sparse.types import BlockMap, Past
from pallas_kernels.choice import choose, require

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Implementation(NamedTuple):
    reason: Callable[..., str | None]  # (q, blocks, past, return_lse) -> why it cannot run this call here; None if it can
    run: Callable[..., tuple[jax.Array, jax.Array]]  # (q, k, v, blocks, past, scale, frame_tokens) -> (out, lse)
    automatic: bool  # whether `implementation=None` may choose it


def _always(q: Any, blocks: BlockMap, past: Past | None, return_lse: bool) -> None:
    """Runs every call, everywhere."""


# In order of preference.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "hopper": Implementation(hopper.reason, hopper.attention, automatic=True),
    "triton": Implementation(triton_forward.reason, triton_backward.attention, automatic=True),
    "xla": Implementation(_always, xla.attention, automatic=True),
    "reference": Implementation(_always, reference.attention, automatic=False),
}


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: BlockMap,
    *,
    scale: float,
    past: Past | None = None,
    frame_tokens: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention in which every query block attends to its own list of key blocks.

    out = softmax(scale * q k^T) v over the tokens of the listed blocks; differentiable in q, k, v and the past. A past that
    is a constant of the differentiated function, or under `jax.lax.stop_gradient`, makes the gradients cheaper.

    Args:
        q: [b, tq, head, e], any number of queries; block i holds rows `i * block_q` on, and the last may be short.
        k, v: [b, tk, head, e], the chunk's own keys; tk is a multiple of `blocks.block_k`.
        blocks: the lists. Blocks of the past come first, then those of the chunk (see `BlockMap`).
        scale: factor on the dot products, usually 1/sqrt(e).
        past: cached keys and values of all layers and the layer to read.
        frame_tokens: live tokens of a frame whose keys are padded up to whole blocks; k and the past consist of such
            frames. The dead tokens at the end of each are not attended to. None: every token is live.
        return_lse: also return the log-sum-exp of every query.
        implementation: "hopper" (Mosaic GPU, compute capability 9.0), "triton" (8.x, 9.0, 12.x), "xla" (any backend; one query
            block at a time) or "reference" (dense and in float32, for tests): a named one runs or raises. None takes the
            first of these, but for "reference", that can run the call.

    Returns:
        [b, tq, head, e] in the dtype of q, zero where a list is empty. With `return_lse` also [b, head, tq] float32,
        natural logarithm, -inf where a list is empty.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    _check(q, k, v, blocks, past, frame_tokens)
    chosen = _choose(q, blocks, past, return_lse, implementation)
    out, lse = IMPLEMENTATIONS[chosen].run(q, k, v, blocks, past, scale, frame_tokens)
    return (out, lse) if return_lse else out


def explain(q: Any, blocks: BlockMap, past: Past | None = None, return_lse: bool = False) -> dict[str, str | None]:
    """Every implementation in the order of choice: why it cannot run such a call on this machine, or None if it can.

    Takes arrays or `jax.ShapeDtypeStruct`s.
    """
    return {name: choice.reason(q, blocks, past, return_lse) for name, choice in IMPLEMENTATIONS.items()}


def check_block_map(blocks: BlockMap, key_blocks: int, frame_tokens: int | None = None) -> None:
    """Checks the values of a block map, which kernels trust: counts, ranges, distinct entries, and with the `frame_tokens` of
    a call that `whole` keeps its word. Not under `jax.jit`.

    Raises:
        ValueError: naming the first list that breaks a rule.
    """
    index, count = np.asarray(blocks.index), np.asarray(blocks.count)
    width = index.shape[-1]
    used = np.arange(width) < count[..., None]
    ordered = np.sort(np.where(used, index, key_blocks + np.arange(width)), axis=-1)  # unused entries differ from all
    broken = {
        f"count outside 0..{width}": (count < 0) | (count > width),
        f"index outside 0..{key_blocks - 1}": (used & ((index < 0) | (index >= key_blocks))).any(-1),
        "the same block twice": (ordered[..., 1:] == ordered[..., :-1]).any(-1),
    }
    if blocks.whole is not None:
        whole, size = np.asarray(blocks.whole), blocks.block_k
        broken["whole outside 0..count"] = (whole < 0) | (whole > count)
        if frame_tokens is not None and frame_tokens % size:
            short = index % -(-frame_tokens // size) == frame_tokens // size
            broken["dead tokens among the first `whole`"] = (short & (np.arange(width) < whole[..., None])).any(-1)
    for rule, where in broken.items():
        if where.any():
            at = tuple(int(i) for i in np.argwhere(where)[0])
            raise ValueError(f"blocks[b, head, query block = {at}]: {rule}; {index[at]=}, {count[at]=}")


def _choose(q: jax.Array, blocks: BlockMap, past: Past | None, return_lse: bool, name: str | None) -> str:
    can = explain(q, blocks, past, return_lse)
    automatic = {n: reason for n, reason in can.items() if IMPLEMENTATIONS[n].automatic}
    return choose("block-sparse attention", name, can, automatic)


def _check(q: Any, k: Any, v: Any, blocks: BlockMap, past: Past | None, frame_tokens: int | None) -> None:
    size_q, size_k = blocks.block_q, blocks.block_k
    require(size_q > 0 and size_k > 0, f"{blocks.block_q=} and {blocks.block_k=} must be positive")
    require(q.ndim == 4 and q.size > 0, f"{q.shape=} must be [b, tq, head, e], nothing empty")
    b, tq, heads, e = q.shape
    require(q.dtype in DTYPES, f"{q.dtype=} must be float32, bfloat16 or float16")
    require(k.shape == v.shape, f"{k.shape=} and {v.shape=} must be equal")
    require(k.ndim == 4 and k.shape[:1] + k.shape[2:] == (b, heads, e), f"{k.shape=} must be [{b}, tk, {heads}, {e}] as q is")
    require(k.dtype == q.dtype and v.dtype == q.dtype, f"{k.dtype=} and {v.dtype=} must equal {q.dtype=}")
    frame, unit = size_k, f"{blocks.block_k=}"
    if frame_tokens is not None:
        require(frame_tokens > 0, f"{frame_tokens=} must be positive")
        frame = -(-frame_tokens // size_k) * size_k
        unit = f"{frame}, a frame of {frame_tokens=} padded to {blocks.block_k=}"
    require(k.shape[1] > 0 and k.shape[1] % frame == 0, f"{k.shape[1]=} keys must be a positive multiple of {unit}")
    rows = (b, heads, -(-tq // size_q))
    require(blocks.index.ndim == 4 and blocks.index.shape[:3] == rows, f"{blocks.index.shape=} must be {(*rows, 'width')}")
    require(blocks.index.shape[3] > 0, f"{blocks.index.shape=} must have a width of at least 1")
    require(blocks.count.shape == rows, f"{blocks.count.shape=} must be {rows}")
    numbers = {"index": blocks.index, "count": blocks.count}
    if blocks.whole is not None:
        require(blocks.whole.shape == rows, f"{blocks.whole.shape=} must be {rows}")
        numbers["whole"] = blocks.whole
    for name, array in numbers.items():
        require(array.dtype == jnp.int32, f"blocks.{name} must be int32, received {array.dtype}")
    keys = k.shape[1]
    if past is not None:
        require(past.k.ndim == 5, f"{past.k.shape=} must be [layer, {b}, s, {heads}, {e}] as q is")
        layers, slots = past.k.shape[0], past.k.shape[2]
        require(past.k.shape == past.v.shape, f"{past.k.shape=} and {past.v.shape=} must be equal")
        require(past.k.shape == (layers, b, slots, heads, e), f"{past.k.shape=} must be [layer, {b}, s, {heads}, {e}] as q is")
        require(past.k.dtype == past.v.dtype == q.dtype, f"{past.k.dtype=} and {past.v.dtype=} must equal {q.dtype=}")
        require(slots % frame == 0, f"{slots=} of the past must be a multiple of {unit}")
        require(jnp.ndim(past.layer) == 0, f"past.layer must be a scalar, received shape {jnp.shape(past.layer)}")
        keys += slots
    width, most = blocks.index.shape[3], keys // size_k
    require(width <= most, f"lists of {width} blocks are wider than the {most} key blocks there are")
