"""The ring of frames against a cache that is a Python list: frames are dropped from it, and copied, as the originals do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import cache as kv
from lf_jax import config, rope
from lf_jax.tokens import Grid

MODEL = config.Model(dim=12, heads=1, layers=2, dtype="float32")
GRID = Grid(rows=2, columns=2, block_q=4, block_k=3)  # 4 tokens a frame in 6 slots: blocks of 3 and 1 live tokens
LAYOUTS = [  # window, sink, frames of every chunk
    (None, 0, (3, 3, 3)),
    (5, 0, (2,) * 6),
    (7, 1, (3,) * 6),
    (6, 3, (3,) * 5),  # nothing but the sink is seen
    (12, 3, (3,) * 8),
    (8, 2, (1, 3, 3, 3, 3, 3)),
    (7, 3, (1, 3, 3, 3, 3)),  # the sink fills in the second chunk
]
append = jax.jit(kv.append, static_argnames=("frames", "next_frames"))


class ListCache:
    """Frames as (number, raw keys [layer, token, e], values) in a list."""

    def __init__(self, window, sink):
        self.window, self.sink, self.frames = window, sink, []

    def seen(self, coming):
        """The past frames that a chunk of `coming` frames attends to."""
        if self.window is None or len(self.frames) + coming <= self.window:
            return list(self.frames)
        rest = self.frames[self.sink :]
        return self.frames[: self.sink] + rest[len(rest) - (self.window - self.sink - coming) :]


def raw_frames(start, count):
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        yield number, rng.standard_normal((2, 4, 12)), rng.standard_normal((2, 4, 12))


def rotated(raw, position):
    """Keys [layer, token, e] of one frame at a frame position."""
    return np.asarray(rope.rotate(jnp.asarray(raw, jnp.float32)[:, :, None], rope.angles(jnp.int32(position), 1, 2, 2, 12)))[
        :, :, 0
    ]


def chunk_kv(frames):
    k, v = (np.concatenate([np.pad(part, ((0, 0), (0, 2), (0, 0))) for part in parts], axis=1)
            for parts in ([rotated(raw, n) for n, raw, _ in frames], [v for *_, v in frames]))  # fmt: skip
    pooled = np.stack([k[:, j * 3 : j * 3 + 3].sum(1) / min(3, 4 - j % 2 * 3) for j in range(2 * len(frames))], axis=1)
    return kv.ChunkKV(*(jnp.asarray(a, jnp.float32)[:, None, :, None] for a in (k, v, pooled)))


def run(window, sink, lengths, positions):
    """Yields before every chunk: the list, the ring, the frames of the chunk and their keys."""
    settings = config.Cache(window, sink, positions)
    ring, copy = kv.empty(MODEL, GRID, settings, True, 1, sum(lengths)), ListCache(window, sink)
    for i, length in enumerate(lengths):
        frames = list(raw_frames(sum(lengths[:i]), length))
        new = chunk_kv(frames)
        yield copy, ring, frames, new
        ring = append(ring, new, length, lengths[i + 1] if i + 1 < len(lengths) else length)
        copy.frames += frames


@pytest.mark.parametrize("window, sink, lengths", LAYOUTS)
def test_eviction_equals_a_rolling_copy(window, sink, lengths):
    for copy, ring, frames, new in run(window, sink, lengths, "absolute"):
        wanted = copy.seen(len(frames))
        number = np.array(kv.visible(ring, len(frames)))
        assert sorted(number[number >= 0]) == [n for n, *_ in wanted]
        number[np.asarray(kv.slots(ring, len(frames)))] = [n for n, *_ in frames]
        everything = {n: (raw, v) for n, raw, v in wanted + frames}
        for layer in range(2):
            view = kv.dense_view(ring, jnp.int32(layer), jax.tree.map(lambda a, layer=layer: a[layer], new), len(frames))
            k, v, length = (np.asarray(a) for a in view)
            assert length == 6 * len(everything) and np.all(number[: len(everything)] >= 0)  # the filled slots are a prefix
            for slot, n in enumerate(number[: len(everything)]):
                np.testing.assert_allclose(k[0, slot * 6 : slot * 6 + 4, 0], rotated(everything[n][0], n)[layer], atol=1e-6)
                np.testing.assert_array_equal(v[0, slot * 6 : slot * 6 + 4, 0], everything[n][1][layer].astype(np.float32))
                if n < frames[0][0]:
                    means = ring.pooled[layer, 0, 2 * slot : 2 * slot + 2, 0]
                    np.testing.assert_allclose(means[0], rotated(everything[n][0], n)[layer, :3].mean(0), atol=1e-6)
                    np.testing.assert_allclose(means[1], rotated(everything[n][0], n)[layer, 3], atol=1e-6)


@pytest.mark.parametrize("window, sink, lengths", [layout for layout in LAYOUTS if layout[1]])
def test_relative_positions_equal_rotating_the_whole_window_anew(window, sink, lengths):
    """Scores of ours, rotated once at absolute positions, and of raw keys rotated at 0, 1, 2, ... for every chunk."""
    moved = 0
    for copy, ring, frames, _ in run(window, sink, lengths, "relative"):
        seen = copy.seen(len(frames))
        query = np.random.default_rng(99).standard_normal((2, 4, 12))
        number = list(np.asarray(kv.visible(ring, len(frames))))
        for place, (n, raw, _) in enumerate(seen):
            slot = number.index(n)
            ours = rotated(query, frames[0][0]), np.asarray(ring.k[:, 0, slot * 6 : slot * 6 + 4, 0])
            want = rotated(query, len(seen)), rotated(raw, place)
            scores, wanted = (np.einsum("lqe,lke->lqk", q, k) for q, k in (ours, want))
            np.testing.assert_allclose(scores, wanted, atol=2e-5)
            means = np.einsum("lqe,le->lq", ours[0], np.asarray(ring.pooled[:, 0, 2 * slot, 0]))
            np.testing.assert_allclose(means, wanted[:, :, :3].mean(-1), atol=2e-5)
            moved += place < sink and n != frames[0][0] - len(seen) + place
    assert moved > 0  # the sink did have to move


def test_append_writes_in_place_when_donated():
    donating = jax.jit(partial(kv.append, frames=3, next_frames=3), donate_argnums=0)
    ring = kv.empty(MODEL, GRID, config.Cache(), True, 1, 6)
    new = chunk_kv(list(raw_frames(0, 3)))
    before, where = ring, ring.k.unsafe_buffer_pointer()
    after = donating(ring, new)
    assert before.k.is_deleted() and after.k.unsafe_buffer_pointer() == where
    assert int(after.end) == 3


def test_only_what_is_needed_is_kept():
    dense = kv.empty(MODEL, GRID, config.Cache(7, 1), False, 2, 21)
    assert dense.pooled is None and dense.sink_k is None and dense.k.shape == (2, 2, 7 * 6, 1, 12)
    sparse = kv.empty(MODEL, GRID, config.Cache(7, 1, "relative"), True, 2, 21)
    assert sparse.pooled.shape == (2, 2, 7 * 2, 1, 12) and sparse.pooled.dtype == jnp.float32
    assert sparse.sink_k.shape == (2, 2, 6, 1, 12) and sparse.sink_pooled.shape == (2, 2, 2, 1, 12)
    assert kv.empty(MODEL, GRID, config.Cache(), False, 2, 21).k.shape[2] == 21 * 6


@pytest.mark.parametrize("sparse", [False, True])
def test_a_cache_without_slots_counts_and_keeps_nothing(sparse):
    none = kv.empty(MODEL, GRID, config.Cache(), sparse, 1, 0)
    new = chunk_kv(list(raw_frames(0, 3)))
    assert kv.slots(none, 3).shape == kv.visible(none, 3).shape == (0,)
    layer = jax.tree.map(lambda a: a[1], new)
    k, v, length = kv.dense_view(none, jnp.int32(1), layer, 3)
    np.testing.assert_array_equal(k, layer.k)
    np.testing.assert_array_equal(v, layer.v)
    assert int(length) == 3 * 6
    after = append(none, new, 3, 3)
    assert int(after.end) == 3 and after.k.size == after.v.size == 0 and (after.pooled is not None) is sparse
