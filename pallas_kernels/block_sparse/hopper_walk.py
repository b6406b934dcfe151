"""How a Hopper thread block that holds 128 queries walks their block lists: shared by the forward and the query gradient.

The lists are walked in tiles. Query blocks of 128 have one list for both consumer warpgroups, and tiles of 128 keys; query
blocks of 64 have a *stream* of their own for each warpgroup, in tiles of 64 keys. A tile is filled with *pieces*: several
list entries where key blocks are smaller than a tile, a part of one where they are larger.

Thread blocks take items. The last wave of them rarely fills the GPU, so the heads that reach into it are cut along their
lists into `parts`, each an item of its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse import lists
from pallas_kernels.block_sparse.hopper_common import ROWS, SWIZZLED, Config, iota, live, stacked
from pallas_kernels.block_sparse.types import BlockMap, Past

QUERIES = 2 * ROWS  # of a thread block


@dataclasses.dataclass(frozen=True)
class Item:
    """What a thread block works on; traced numbers."""

    cut: Any  # whether it is a part
    number: Any  # among the parts
    part: Any  # of its list
    b: Any
    h: Any
    at: Any  # which 128 queries


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The tiles of one list that an item walks; traced numbers."""

    query_block: Any
    entries: Any  # of the whole list
    first: Any  # tile
    n: Any  # tiles


class Walk:
    """The geometry of a call: static numbers, and the arrays that the kernels walk."""

    def __init__(self, q: jax.Array, k: jax.Array, v: jax.Array, blocks: BlockMap, past: Past | None, frame_tokens, config):
        self.batch, self.tq, self.heads, self.e = q.shape
        self.dtype, self.block_k, self.frame_tokens, self.config = q.dtype, blocks.block_k, frame_tokens, config
        index, whole = lists.live_first(blocks, frame_tokens)
        self.query_blocks, self.width = index.shape[2:]
        self.streams = QUERIES // blocks.block_q
        self.tile = QUERIES // self.streams
        self.piece = min(self.block_k, self.tile)
        self.pieces, self.subs = self.tile // self.piece, self.block_k // self.piece  # pieces to a tile, to a block
        past_k, past_v, rows, slots = stacked(past, k, v)
        self.cached = slots // self.block_k
        self.arrays = (k, v, past_k, past_v, rows, index, blocks.count, whole)
        self.tiles = -(-self.tq // QUERIES)
        self.cut_heads = _cut_heads(self.batch, self.heads, self.tiles, config)
        self.parts = config.parts if self.cut_heads else 1
        self.uncut = (self.batch * self.heads - self.cut_heads) * self.tiles

    @property
    def cut_items(self) -> int:
        return self.cut_heads * self.tiles * self.parts

    @property
    def grid(self) -> dict[str, Any]:
        return {"grid": (self.uncut + self.cut_items,), "grid_names": ("item",)}

    def scratch(self) -> tuple[Any, ...]:
        """k_s, v_s, k_full, v_full, k_free, v_free: the tiles in flight and their barriers."""
        slots = self.streams * self.config.stages
        moving = plgpu.SMEM((slots, self.tile, self.e), self.dtype, transforms=SWIZZLED)
        full = plgpu.Barrier(num_barriers=slots, num_arrivals=self.pieces)
        free = plgpu.Barrier(num_barriers=slots, num_arrivals=2 // self.streams)
        return moving, moving, full, full, free, free

    def item(self) -> Item:
        index = lax.axis_index("item")
        cut, number = index >= self.uncut, index - self.uncut
        block = lax.select(cut, self.uncut + lax.div(number, self.parts), index)
        head = lax.div(block, self.tiles)
        part = lax.select(cut, lax.rem(number, self.parts), 0)
        return Item(cut, number, part, lax.div(head, self.heads), lax.rem(head, self.heads), lax.rem(block, self.tiles))

    def stretch(self, item: Item, stream: Any, count: Any) -> Stretch:
        block = item.at * self.streams + stream
        here = lax.min(block, self.query_blocks - 1)  # a second stream may lie behind the last query
        entries = lax.select(block < self.query_blocks, count[item.b, item.h, here], 0)
        total = lax.div(entries * self.block_k + self.tile - 1, self.tile)
        first = lax.select(item.cut, lax.div(item.part * total, self.parts), 0)
        last = lax.select(item.cut, lax.div((item.part + 1) * total, self.parts), total)
        return Stretch(here, entries, first, last - first)

    def slot(self, stream: Any, i: Any) -> Any:
        return stream * self.config.stages + lax.rem(i, self.config.stages)

    def clean(self, item: Item, stretch: Stretch, whole: Any, least: int) -> Any:
        """Tiles before the first that needs a mask, `least` at least."""
        keys = whole[item.b, item.h, stretch.query_block] * self.block_k
        return lax.max(lax.min(lax.div(keys, self.tile) - stretch.first, stretch.n), least)

    def masked(self, scores: jax.Array, i: Any, item: Item, stretch: Stretch, index: Any) -> jax.Array:
        """Scores of tile i, -inf where the list is over and on dead tokens."""
        column, keep = iota(scores.shape, 1, self.config), None
        for p in range(self.pieces):
            place, begin = self._entry(stretch.first + i, p)
            block = index[item.b, item.h, stretch.query_block, lax.min(place, self.width - 1)]
            alive = lax.min(live(block, self.block_k, self.frame_tokens) - begin, self.piece)
            alive = lax.select(place < stretch.entries, alive, 0)
            inside = (column >= p * self.piece) & (column < p * self.piece + alive)
            keep = inside if keep is None else keep | inside
        return jnp.where(keep, scores, -jnp.inf)

    def produce(self, item: Item, arrays: tuple[Any, ...], k_s, v_s, k_full, v_full, k_free, v_free) -> None:
        """The producer warpgroup: a warp for each stream starts the copies, tile after tile."""
        k, v, past_k, past_v, rows, index, count, _ = arrays

        def run(stream: int) -> None:
            stretch, row = self.stretch(item, stream, count), rows[item.b]

            def fetch(old, new, to, barrier, block, begin):
                """Starts the copy of a piece: of the cache, or behind it of the chunk."""

                @pl.when(block < self.cached)
                def _():
                    here = pl.ds(block * self.block_k + begin, self.piece)
                    plgpu.copy_gmem_to_smem(old.at[row, here, item.h], to, barrier)

                @pl.when(block >= self.cached)
                def _():
                    here = pl.ds((block - self.cached) * self.block_k + begin, self.piece)
                    plgpu.copy_gmem_to_smem(new.at[item.b, here, item.h], to, barrier)

            @pl.loop(0, stretch.n)
            def _(i):
                s = self.slot(stream, i)
                places = [self._entry(stretch.first + i, p) for p in range(self.pieces)]
                listed = index.at[item.b, item.h, stretch.query_block]
                named = [(listed[lax.min(place, stretch.entries - 1)], begin) for place, begin in places]
                for old, new, to, full, free in ((past_k, k, k_s, k_full, k_free), (past_v, v, v_s, v_full, v_free)):
                    pl.when(i >= self.config.stages)(lambda free=free: plgpu.barrier_wait(free.at[s]))
                    for p, (block, begin) in enumerate(named):
                        fetch(old, new, to.at[s, pl.ds(p * self.piece, self.piece)], full.at[s], block, begin)

            @pl.loop(lax.max(stretch.n - self.config.stages, 0), stretch.n)  # no arrival may be left that nobody saw
            def _(i):
                plgpu.barrier_wait(k_free.at[self.slot(stream, i)])
                plgpu.barrier_wait(v_free.at[self.slot(stream, i)])

        @plgpu.warp_map
        def per_warp(warp):
            for stream in range(self.streams):
                pl.when(warp == stream)(lambda stream=stream: run(stream))

    def put_back(self, whole: jax.Array, joined: jax.Array) -> jax.Array:
        """Writes the joined heads [cut head, tile, 128, ...] over the last ones of `whole` [b, tq, head, ...]."""
        rows = joined.reshape(self.cut_heads, self.tiles * QUERIES, *joined.shape[3:])[:, : self.tq].swapaxes(0, 1)
        # Without the barrier XLA fuses the kernel with this write, whose data come from the same kernel: a cycle.
        whole = lax.optimization_barrier(whole)
        return whole.at[self.batch - 1, :, self.heads - self.cut_heads :].set(rows.astype(whole.dtype))

    def _entry(self, i: Any, p: int) -> tuple[Any, Any]:
        """Position in the list, and first key within the block, of piece p of tile i."""
        number = i * self.pieces + p
        return (lax.div(number, self.subs), lax.rem(number, self.subs) * self.piece) if self.subs > 1 else (number, 0)


def _cut_heads(batch: int, heads: int, tiles: int, config: Config) -> int:
    """How many heads of the last batch row are cut: those that reach into the last, partly filled wave."""
    if config.parts == 1:
        return 0
    rest = batch * heads * tiles % config.multiprocessors
    return min(-(-rest // tiles), heads)
