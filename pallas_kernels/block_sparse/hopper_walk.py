"""How a Hopper thread block that holds 128 queries walks their block lists: shared by the forward and the query gradient.

The lists are walked in tiles. Query blocks of 128 have one list for both consumer warpgroups, and tiles of 128 keys; query
blocks of 64 have a *stream* of their own for each warpgroup, in tiles of 64 keys. A tile is filled with *pieces*: several
list entries where key blocks are smaller than a tile, parts of one where they are not.

Thread blocks take items, one after the other. The last wave of them rarely fills the GPU, so what it holds is cut along the
lists into `parts`, each an item of its own, and joined afterwards (`hopper_join`).
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.block_sparse import lists
from pallas_kernels.block_sparse.hopper_common import QUERIES, ROWS, SWIZZLED, Config, stacked
from pallas_kernels.block_sparse.types import BlockMap, Past

PIECE = 32  # keys that one copy brings: several copies to a tile come sooner than one
MOST_PARTS = 8
START = 320  # keys that a thread block walks in the time that it takes to go from one item to the next
JOIN = 256  # keys that it walks in the time of a join


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
        self.pieces, self.subs = self.tile // PIECE, self.block_k // PIECE  # pieces to a tile, to a block
        self.padded = frame_tokens is not None and frame_tokens % self.block_k > 0  # whether there are dead tokens
        self.halves = self.tile == QUERIES and self.block_k <= ROWS  # half a tile may be of use: the tensor cores take 64 keys
        past_k, past_v, layer, slots = stacked(past, k, v)
        self.cached = slots // self.block_k
        self.arrays = (k, v, past_k, past_v, layer, index, blocks.count, whole)
        self.tiles = -(-self.tq // QUERIES)
        self.cut, self.parts = _cut(self.batch * self.heads * self.tiles, self.width * self.block_k, self.tile, config)
        self.uncut = self.batch * self.heads * self.tiles - self.cut

    @property
    def cut_items(self) -> int:
        return self.cut * self.parts

    @property
    def items(self) -> int:
        return self.uncut + self.cut_items

    @property
    def blocks(self) -> int:
        """Thread blocks, which take the items in turns."""
        return min(self.items, self.config.multiprocessors)

    def scratch(self) -> tuple[Any, ...]:
        """k_s, v_s, k_full, v_full, k_free, v_free: the tiles in flight and their barriers."""
        slots = self.streams * self.config.stages
        moving = plgpu.SMEM((slots, self.tile, self.e), self.dtype, transforms=SWIZZLED)
        full = plgpu.Barrier(num_barriers=slots, num_arrivals=self.pieces)
        free = plgpu.Barrier(num_barriers=slots, num_arrivals=2 // self.streams)
        return moving, moving, full, full, free, free

    def item(self, index: Any) -> Item:
        cut, number = index >= self.uncut, index - self.uncut
        place = self.place(lax.select(cut, self.uncut + lax.div(number, self.parts), index))
        return Item(cut, number, lax.select(cut, lax.rem(number, self.parts), 0), *place)

    def place(self, index: Any) -> tuple[Any, Any, Any]:
        """b, head and which 128 queries, of an item that is not cut or of the whole of one that is."""
        head = lax.div(index, self.tiles)
        return lax.div(head, self.heads), lax.rem(head, self.heads), lax.rem(index, self.tiles)

    def entries(self, item: Item, stream: Any, count: Any) -> Any:
        """Length of the item's list; 0 where the second stream lies behind the last query."""
        block = item.at * self.streams + stream
        return lax.select(block < self.query_blocks, count[item.b, item.h, lax.min(block, self.query_blocks - 1)], 0)

    def stretch(self, item: Item, stream: Any, entries: Any) -> Stretch:
        here = lax.min(item.at * self.streams + stream, self.query_blocks - 1)
        total = lax.div(entries * self.block_k + self.tile - 1, self.tile)
        first = lax.select(item.cut, lax.div(item.part * total, self.parts), 0)
        last = lax.select(item.cut, lax.div((item.part + 1) * total, self.parts), total)
        return Stretch(here, entries, first, last - first)

    def half(self, stretch: Stretch) -> Any:
        """1 where the last tile, and not the first, is filled to a half at most, else 0; `clean` never counts it."""
        keys = stretch.entries * self.block_k - (stretch.first + stretch.n - 1) * self.tile
        return lax.convert_element_type((stretch.n > 1) & (keys <= self.tile // 2), jnp.int32)

    def slot(self, stream: Any, i: Any) -> Any:
        return stream * self.config.stages + lax.rem(i, self.config.stages)

    def whole(self, item: Item, stretch: Stretch, whole: Any) -> Any:
        """Entries of the stretch's list before the first with dead tokens."""
        return lax.min(whole[item.b, item.h, stretch.query_block], stretch.entries) if self.padded else stretch.entries

    def clean(self, stretch: Stretch, whole: Any, least: int) -> Any:
        """Tiles before the first that needs a mask, `least` at least."""
        return lax.max(lax.min(lax.div(whole * self.block_k, self.tile) - stretch.first, stretch.n), least)

    def masked(self, scores: jax.Array, i: Any, stretch: Stretch, whole: Any) -> jax.Array:
        """Scores of tile i, -inf where there is no key: behind the list, and in the dead tokens of its last blocks."""
        begin = (stretch.first + i) * self.tile
        column = mosaic.iota(scores.shape, 1, self.config)
        keep = column < stretch.entries * self.block_k - begin
        if self.padded:  # told by arithmetic alone: to read the list here would stop everything
            place = column + begin if self.block_k > self.tile else column  # up to whole blocks
            alive = place & (self.block_k - 1) < self.frame_tokens % self.block_k
            keep &= alive | (column < whole * self.block_k - begin)
        return jnp.where(keep, scores, -jnp.inf)

    def produce(self, first: Any, every: int, arrays: tuple[Any, ...], k_s, v_s, k_full, v_full, k_free, v_free) -> None:
        """The producer warpgroup: two warps of it to a list start the copies, tile after tile, one the keys and one the values.
        The items first, first + every and so on are walked without a pause: the tiles of the next are on their way while an
        item ends."""
        k, v, past_k, past_v, layer, index, count, _ = arrays
        keys, values = (past_k, k, k_s, k_full, k_free), (past_v, v, v_s, v_full, v_free)

        def run(stream: int, copied: tuple[Any, ...]) -> None:
            old, new, to, full, free = copied

            def walk(turn, done):
                """The tiles of an item, before which `done` others were copied."""
                item = self.item(first + turn * every)
                stretch, row = self.stretch(item, stream, self.entries(item, stream, count)), layer[0] * self.batch + item.b
                listed = index.at[item.b, item.h, stretch.query_block]

                def names(tile):
                    """The entries that fill a tile; numbers without meaning behind the end of the list."""
                    return tuple(listed[lax.min(self._entry(tile, p)[0], self.width - 1)] for p in range(self.pieces))

                def fetch(to, barrier, block, begin):
                    """Starts the copy of a piece: of the cache, or behind it of the chunk."""

                    @pl.when(block < self.cached)
                    def _():
                        here = pl.ds(block * self.block_k + begin, PIECE)
                        plgpu.copy_gmem_to_smem(old.at[row, here, item.h], to, barrier)

                    @pl.when(block >= self.cached)
                    def _():
                        here = pl.ds((block - self.cached) * self.block_k + begin, PIECE)
                        plgpu.copy_gmem_to_smem(new.at[item.b, here, item.h], to, barrier)

                def step(i, named):
                    s, tile = self.slot(stream, done + i), stretch.first + i
                    following = names(tile + 1)  # early, so that no copy waits for the number that tells its address
                    pl.when(done + i >= self.config.stages)(lambda: plgpu.barrier_wait(free.at[s]))
                    for p, block in enumerate(named):
                        place, begin = self._entry(tile, p)
                        block = lax.select(place < stretch.entries, block, named[0])  # behind the end any block will do
                        fetch(to.at[s, pl.ds(p * PIECE, PIECE)], full.at[s], block, begin)
                    return following

                # The first of a list that is not cut does not wait for the length of it.
                start = lax.cond(item.cut, lambda: names(stretch.first), lambda: names(0))
                lax.fori_loop(0, stretch.n, step, start)
                return done + stretch.n

            done = lax.fori_loop(0, mosaic.turns(self.items, first, every), walk, jnp.int32(0))

            @pl.loop(lax.max(done - self.config.stages, 0), done)  # no arrival may be left that nobody saw
            def _(i):
                plgpu.barrier_wait(free.at[self.slot(stream, i)])

        @plgpu.warp_map
        def per_warp(warp):
            for number, (stream, copied) in enumerate(itertools.product(range(self.streams), (keys, values))):
                pl.when(warp == number)(functools.partial(run, stream, copied))

    def _entry(self, i: Any, p: int) -> tuple[Any, Any]:
        """Position in the list, and first key within the block, of piece p of tile i."""
        number = i * self.pieces + p
        return (lax.div(number, self.subs), lax.rem(number, self.subs) * PIECE) if self.subs > 1 else (number, 0)


def _cut(items: int, keys: int, tile: int, config: Config) -> tuple[int, int]:
    """How many items are cut, those of a last wave that does not fill the GPU, and into how many parts each.

    Args:
        items: before any is cut.
        keys: of the longest list.
        tile: keys of a tile.
    """
    cut, fits = items % config.multiprocessors, config.multiprocessors
    tried = range(1, MOST_PARTS + 1) if config.parts is None else (config.parts,)

    def duration(parts: int) -> int:
        """Of the last wave and the join, in keys walked."""
        part = -(-keys // (parts * tile)) * tile + START
        return -(-cut * parts // fits) * part + (JOIN if parts > 1 else 0)

    parts = min(tried, key=duration)
    return (cut, parts) if parts > 1 else (0, 1)
