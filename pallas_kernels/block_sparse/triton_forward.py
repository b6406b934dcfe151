"""Block-sparse attention forward, Triton-lowered Pallas: for GPUs without a kernel of their own (8.x, 12.x), a baseline on 9.0.

A program serves one tile of queries of one head: it walks the list of their block, tile of keys by tile of keys, with the
usual running maximum and sum. Two things are not usual:

* The keys come from two places, the stacked cache and the chunk. Lists are reordered once (`lists.past_first`), and a
  program runs one loop for each source. A choice within the loop would keep the compiler from loading ahead.
* Tiles may be smaller than blocks (`Config`), so that any block size fits any GPU's shared memory and registers.

jax 0.11 deprecates this lowering. This file and `triton_backward.py` depend on nothing but `lists` and `types`, and nothing
but the table in `api.py` on them: they go as a pair.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import platform, triton
from pallas_kernels.block_sparse import lists
from pallas_kernels.block_sparse.types import BlockMap, Past

LOG2E = math.log2(math.e)
SHARED_MEMORY = {(8, 0): 163, (8, 7): 163, (9, 0): 227}  # KiB that a program may use; 99 on all other devices


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is cut up; powers of two. The results do not depend on it beyond rounding."""

    rows: int  # tokens that a program holds, at most a block of them
    columns: int  # tokens of a step of its loop, at most a block of them
    warps: int
    stages: int  # steps whose loads are in flight


def reason(q: Any, blocks: BlockMap, past: Past | None, return_lse: bool) -> str | None:
    """Why these kernels cannot run such a call on the default device; None if they can."""
    return triton.reason() or unsupported(q, blocks)


def unsupported(q: Any, blocks: BlockMap) -> str | None:
    """What of a call these kernels cannot do on any device; None if nothing."""
    e = q.shape[-1]
    if e not in (16, 32, 64, 128):
        return f"head_dim must be 16, 32, 64 or 128, received {e}"
    for name, size in (("block_q", blocks.block_q), ("block_k", blocks.block_k)):
        if size < 16 or size & (size - 1):
            return f"{name} must be a power of two of at least 16, received {size}"
    return None


def choose(q: jax.Array, held: int, walked: int, most_rows: int, tensors: int) -> Config:
    """The largest tiles that fit the default device.

    Args:
        q: for head_dim and dtype.
        held, walked: tokens of the blocks that are cut into rows and columns.
        most_rows: more than that do not fit the registers.
        tensors: how many tensors a program holds `rows` of; it walks two.
    """
    capability = platform.device().compute_capability
    limit = 1024 * (SHARED_MEMORY.get(capability, 99) - 3)  # the rest is for reductions
    token = q.shape[-1] * q.dtype.itemsize
    rows, columns = min(held, most_rows * 2 // q.dtype.itemsize), min(walked, 64)
    # What compiled programs ask for: a step's tiles leave shared memory for its products, except where those read it
    # themselves (9.0), for float32, and in the backward, which also needs them transposed.
    done = 1 if tensors == 1 and q.dtype.itemsize == 2 and capability != (9, 0) else 0
    stages = 3
    while (tensors * rows + 2 * (stages - done) * columns) * token > limit and (stages, columns) != (2, 16):
        stages, columns = (2, columns) if stages == 3 else (3, max(columns // 2, 16))
    return Config(rows, columns, warps=8 if rows > 64 else 4, stages=stages)


class Source(NamedTuple):
    """One of the two places that keys come from, as a stack of layers."""

    k: Any  # [layer, b, s, head, e]; within a kernel, a reference [layer, s, e]
    v: Any
    layer: Any  # int32 [1]; within a kernel, a reference to it


class Walk(NamedTuple):
    """Block lists in the order of the sources, and how a kernel finds its own."""

    index: Any  # [b, head, q_block, width] int32; within a kernel, a reference [width]
    old: Any  # [b, head, q_block] int32: entries that name blocks of the past, which come first; a reference []
    count: Any  # [b, head, q_block] int32: all entries; a reference []


def sources(k: jax.Array, v: jax.Array, past: Past | None) -> list[Source]:
    """The past, if there is one, and the chunk."""
    chunk = Source(k[None], v[None], jnp.zeros(1, jnp.int32))
    return [chunk] if past is None else [Source(past.k, past.v, past.layer.astype(jnp.int32).reshape(1)), chunk]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: BlockMap,
    past: Past | None,
    *,
    scale: float,
    frame_tokens: int | None,
    config: Config,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(out [b, tq, head, e], lse [b, head, tq]) of `api.block_sparse_attention`, whose arguments the first are.

    Args:
        config: its `rows` are queries, its `columns` keys.
        interpret: run on any device, slowly, through the Pallas interpreter.

    Raises:
        ValueError: if jax can no longer lower Pallas kernels to Triton.
    """
    b, tq, heads, e = q.shape
    rows = config.rows
    shape = Shape(blocks, config, past, frame_tokens)

    def kernel(walk, places, q_ref, out_ref, lse_ref):
        keep = kept(tq, rows, pl.program_id(0) * rows, rows)
        queries = load(q_ref, keep)

        def step(carry, k_tile, v_tile, live):
            out, top, total = carry
            logits = dot(queries, k_tile, 1, 1) * (scale * LOG2E)
            if live is not None:
                logits = jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < live, logits, -jnp.inf)
            peak = jnp.maximum(top, logits.max(1))
            fade = jnp.exp2(top - peak)
            weight = jnp.exp2(logits - peak[:, None])
            out = out * fade[:, None] + dot(weight.astype(v_tile.dtype), v_tile, 1, 0)
            return out, peak, total * fade + weight.sum(1)

        start = jnp.zeros((rows, e), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32)
        out, top, total = shape.steps(step, start, walk, places)
        some = total > 0
        out = out / jnp.where(some, total, 1.0)[:, None]
        plt.store(out_ref, out.astype(out_ref.dtype), mask=None if keep is None else keep[:, None])
        plt.store(lse_ref, jnp.where(some, top / LOG2E + jnp.log(total), -jnp.inf), mask=keep)

    places = sources(k, v, past)
    tile, row = query_specs(rows, e)
    return call(
        kernel,
        grid=(pl.cdiv(tq, rows), heads, b),
        in_specs=[shape.walk_specs(), [source_specs(place) for place in places], tile],
        out_specs=[tile, row],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, heads, tq), jnp.float32)],
        config=config,
        interpret=interpret,
    )(shape.walk(), places, q)


class Shape:
    """What a kernel that holds queries and walks keys has to know about the lists."""

    def __init__(self, blocks: BlockMap, config: Config, past: Past | None, frame_tokens: int | None):
        self.blocks, self.config, self.frame_tokens = blocks, config, frame_tokens
        self.cached = 0 if past is None else past.k.shape[2] // blocks.block_k
        self.tiles = blocks.block_q // config.rows  # of queries to a list

    def walk(self) -> Walk:
        index, old = lists.past_first(self.blocks, self.cached)
        return Walk(index, old, self.blocks.count)

    def walk_specs(self) -> Walk:
        number = pl.BlockSpec((None, None, None), lambda i, h, b: (b, h, lax.div(i, self.tiles)))
        width = self.blocks.index.shape[-1]
        return Walk(pl.BlockSpec((None, None, None, width), lambda i, h, b: (b, h, lax.div(i, self.tiles), 0)), number, number)

    def steps(self, step: Callable, carry: Any, walk: Walk, places: list[Source]) -> Any:
        """Folds `step(carry, k_tile, v_tile, live)` over the list; live: tokens of the tile before the dead ones."""
        size, columns = self.blocks.block_k, self.config.columns
        old, count = walk.old[...], walk.count[...]
        bounds = [(old, count, self.cached)] if len(places) == 1 else [(0, old, 0), (old, count, self.cached)]
        for place, (first, last, offset) in zip(places, bounds, strict=True):
            layer = place.layer[0]

            def visit(carry, block, part, place=place, layer=layer, offset=offset):
                start = pl.multiple_of((block - offset) * size + part * columns, columns)
                at = (layer, pl.ds(start, columns), slice(None))
                return step(carry, place.k[at], place.v[at], live_tokens(block, part * columns, size, self.frame_tokens))

            carry = visits(visit, carry, walk.index, first, last, size // columns)
        return carry


def visits(visit: Callable, carry: Any, index_ref: Any, first: Any, last: Any, parts: int) -> Any:
    """Folds `visit(carry, block, part)` over entries first..last-1 of a list, each in `parts` parts.

    The next entry is read one step early, so that no load waits for the number that tells its address.
    """

    def body(i, state):
        carry, block = state
        following = index_ref[jnp.minimum(lax.div(i + 1, parts), index_ref.shape[0] - 1)]
        return visit(carry, block, lax.rem(i, parts)), following

    start = index_ref[jnp.minimum(first, index_ref.shape[0] - 1)]
    return lax.fori_loop(first * parts, last * parts, body, (carry, start))[0]


def live_tokens(block: Any, before: Any, size: int, frame_tokens: int | None) -> Any:
    """Tokens of a key block, from its token `before` on, that come before its dead ones; None if it has no dead ones."""
    if frame_tokens is None or frame_tokens % size == 0:
        return None
    return frame_tokens - lax.rem(block, -(-frame_tokens // size)) * size - before


def kept(tokens: int, unit: int, start: Any, rows: int) -> jax.Array | None:
    """Which rows of a tile exist; None, all of them, if the tiles cut up whole units of so many tokens."""
    return None if tokens % unit == 0 else start + jnp.arange(rows) < tokens


def load(ref: Any, keep: jax.Array | None) -> jax.Array:
    """A tile, zero where it is not kept."""
    if keep is None:
        return ref[...]
    return plt.load(ref, mask=keep[:, None] if len(ref.shape) == 2 else keep, other=0)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Sums over one axis of each, in float32; of float32 without rounding them to TF32 first, as would be the default."""
    axes, precision = (((axis_a,), (axis_b,)), ((), ())), "highest" if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def query_specs(rows: int, e: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Of a tile of queries [rows, e] and of a number for each [rows], on a grid (tile, head, batch)."""
    tile = pl.BlockSpec((None, rows, None, e), lambda i, h, b: (b, i, h, 0))
    return tile, pl.BlockSpec((None, None, rows), lambda i, h, b: (b, h, i))


def source_specs(place: Source) -> Source:
    """A whole stack of one head and batch row: a kernel reads of it what its lists name."""
    layers, _, tokens, _, e = place.k.shape
    stack = pl.BlockSpec((layers, None, tokens, None, e), lambda i, h, b: (0, b, 0, h, 0))
    return Source(stack, stack, pl.BlockSpec((1,), lambda i, h, b: (0,)))


def call(kernel: Callable, *, config: Config, **options: Any) -> Callable:
    """`pl.pallas_call` through Triton. The first grid axis is the fastest, so programs of a head run side by side."""
    params = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    return pl.pallas_call(kernel, compiler_params=params, **options)
