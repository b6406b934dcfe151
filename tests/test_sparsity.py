"""Chunk-Aware Growth against numbers worked out by hand, and every selector against a loop over the raw tokens."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import attention, config, sparsity
from lf_jax import cache as kv
from lf_jax.sparsity.baselines import attention_mass
from lf_jax.sparsity.select import pool_queries
from lf_jax.tokens import Grid
from pallas_kernels import check_block_map
from pallas_kernels.selection import api, triton

SHORT = config.Sparsity(policy="light_forcing", target=0.88, base=0.98)
LONG = config.Sparsity(policy="light_forcing", target=0.85, base=0.95, keep_frames=3, sink_frames=1, near_frames=1)
WINDOW = config.Cache(window=12, sink=1, positions="relative")
GRID = Grid(rows=32, columns=48, block_q=64, block_k=64)  # 512x768: 24 key blocks a frame


# Short: f = 6, 9, ..., 21 and kv = f. sum kv = 81, so the numerator is 0.10 * 81 = 8.1; sum alpha kv = sum sqrt(f)
# = 2.449490 + 3 + 3.464102 + 3.872983 + 4.242641 + 4.582576 = 21.611791; beta = 8.1 / 21.611791 = 0.374795.
# s_1 = 0.98 - 0.374795 / 2.449490 = 0.826990, and so on; the budgets are the whole part of (1 - s_i) * 24 f_i.
def test_growth_of_the_released_short_setting():
    expected = (0.0, 0.826990, 0.855068, 0.871806, 0.883228, 0.891660, 0.898213)
    np.testing.assert_allclose(sparsity.chunk_sparsities((3,) * 7, SHORT, config.Cache()), expected, atol=1e-6)
    budget = sparsity.chunk_budgets((3,) * 7, 0, GRID, SHORT, config.Cache())
    assert budget.blocks.tolist() == [72, 24, 31, 36, 42, 46, 51]
    assert budget.blocks.dtype == np.int32 and budget.width == 72


# Long: f = 6, 9, ..., 63 and kv = min(f, 12). sum kv = 6 + 9 + 18 * 12 = 231, numerator 23.1; sum alpha kv
# = 2.449490 + 3 + 12 * (1/sqrt(12) + 1/sqrt(15) + ... + 1/sqrt(63)) = 43.755635; beta = 0.527932.
def test_growth_of_the_released_long_setting():
    expected = (
        0.0, 0.734473, 0.774023, 0.797599, 0.813689, 0.825565, 0.834796, 0.842236, 0.848399, 0.853613, 0.858099,
        0.862011, 0.865463, 0.868538, 0.871301, 0.873800, 0.876075, 0.878158, 0.880074, 0.881844, 0.883487,
    )  # fmt: skip
    np.testing.assert_allclose(sparsity.chunk_sparsities((3,) * 21, LONG, WINDOW), expected, atol=1e-6)
    budget = sparsity.chunk_budgets((3,) * 21, 0, GRID, LONG, WINDOW)
    assert budget.blocks.tolist() == [72, 38, 48, 58, 53, 50, 47, 45, 43, 42, 40, 39, 38, 37, 37, 36, 35, 35, 34, 34, 33]


def test_growth_keeps_the_key_work_of_a_constant_sparsity():
    for lengths in ((3,) * 7, (1,) + (3,) * 6, (1, 2, 5, 3)):
        frames = np.cumsum(lengths)
        work = np.asarray(lengths) * np.minimum(frames, 12)
        kept = 1 - np.asarray(sparsity.chunk_sparsities(lengths, SHORT, dataclasses.replace(WINDOW, window=12)))
        assert kept[0] == 1
        np.testing.assert_allclose((kept * work)[1:].sum(), (0.12 * work)[1:].sum(), rtol=1e-12)


def test_without_a_base_the_sparsity_is_constant():
    settings = dataclasses.replace(SHORT, base=None)
    assert sparsity.chunk_sparsities((3,) * 4, settings, config.Cache()) == (0.0, 0.88, 0.88, 0.88)


def test_growth_after_committed_frames_has_no_dense_chunk():
    # f = 6, 9: numerator 0.1 * 15, sum sqrt(f) = 5.449490, beta = 0.275255
    found = sparsity.chunk_sparsities((3, 3), SHORT, config.Cache(), start=3)
    np.testing.assert_allclose(found, (0.867628, 0.888248), atol=1e-6)


def test_growth_never_asks_for_more_than_everything():
    settings = dataclasses.replace(SHORT, target=0.0, base=0.9)
    found = sparsity.chunk_sparsities((1,) * 30, settings, config.Cache())
    assert found[1] == 0.0 and found[-1] > 0
    budget = sparsity.chunk_budgets((1,) * 30, 0, GRID, settings, config.Cache())
    assert budget.blocks[1] == 48  # all key blocks of two frames


def test_a_budget_is_at_least_one_block():
    settings = dataclasses.replace(SHORT, target=0.98, base=0.98)
    tiny = Grid(rows=1, columns=8, block_q=8, block_k=8)
    assert sparsity.chunk_budgets((1, 1), 0, tiny, settings, config.Cache()).blocks.tolist() == [1, 1]


def test_budgets_of_the_policies_that_take_whole_frames():
    window = dataclasses.replace(SHORT, policy="window")
    assert (sparsity.chunk_budgets((3,) * 4, 0, GRID, window, config.Cache()).blocks // 24).tolist() == [3, 6, 6, 6]
    full = dataclasses.replace(SHORT, policy="full")
    assert (sparsity.chunk_budgets((3,) * 6, 0, GRID, full, WINDOW).blocks // 24).tolist() == [3, 6, 9, 12, 12, 12]


# ---------------------------------------------------------------------------------------------------------------------
# Selectors. `Video` keeps the keys of every frame beside the cache; the loops below see only those.


class Video:
    def __init__(
        self, grid: Grid, window: int | None, sink: int, frames: int, chunk: int = 3, seed: int = 0, scale: float = 1.0
    ):
        self.grid, self.chunk = grid, chunk
        model = config.Model(dim=16, ffn_dim=8, heads=2, layers=2, dtype="float32")
        self.cache = kv.empty(model, grid, config.Cache(window=window, sink=sink), True, 1, frames + chunk)
        self.draw = np.random.default_rng(seed)
        self.keys, self.scale = [], scale  # one [token, head, e] a frame
        for _ in range(frames // chunk):
            new = [self.next_chunk() for _ in range(2)]  # of two layers; the second is the one looked at
            self.keys += list(np.asarray(new[1][0]).reshape(chunk, grid.frame_tokens, 2, 8))
            self.cache = kv.append(self.cache, jax.tree.map(lambda *x: jnp.stack(x), new[0][1], new[1][1]), chunk, chunk)
        (self.k, self.new), (self.q, _) = self.next_chunk(), self.next_chunk()
        self.current = list(np.asarray(self.k).reshape(chunk, grid.frame_tokens, 2, 8))

    def next_chunk(self):
        shape = (1, self.chunk * self.grid.frame_tokens, 2, 8)
        k = jnp.asarray(self.scale * self.draw.normal(size=shape), jnp.float32)
        return k, attention.chunk_kv(k, k, self.grid, pool=True)

    def visible(self) -> list[int]:
        """Past frames that the chunk sees: the sink and what is left of the window, oldest first."""
        end, slots = len(self.keys), self.cache.frames
        gone = max(0, end + self.chunk - slots)
        return [f for f in range(end) if f < self.cache.sink or f >= self.cache.sink + gone]

    def number(self, frame: int, block: int) -> int:
        """Of a block of a frame in a block map; frames count on into the chunk."""
        end, slots, sink = len(self.keys), self.cache.frames, self.cache.sink
        if frame >= end:
            slot = slots + frame - end
        else:
            slot = frame if frame < slots else sink + (frame - sink) % (slots - sink)
        return slot * self.grid.frame_blocks + block

    def inputs(self, settings: config.Sparsity, budget: int, width: int) -> sparsity.Inputs:
        time = sparsity.timeline(self.cache, self.chunk, self.grid)
        chosen = sparsity.Budget(jnp.int32(budget), width)
        return sparsity.Inputs(self.q, self.new, self.cache, jnp.int32(1), time, chosen, self.grid, settings)


def means(frame: np.ndarray, size: int) -> list[np.ndarray]:
    return [frame[i : i + size].mean(0) for i in range(0, len(frame), size)]


def brute_force(video: Video, settings: config.Sparsity, topk: int, two_stages: bool = True) -> dict:
    """Section 3.3 read aloud: {(head, query block): set of block numbers}."""
    past, end, size = video.visible(), len(video.keys), video.grid.block_k
    queries = means(np.asarray(video.q[0]), video.grid.block_q)
    pooled = {f: means(video.keys[f], size) for f in past}
    pooled |= {end + i: means(frame, size) for i, frame in enumerate(video.current)}
    every = [(f, j) for f in pooled for j in range(len(pooled[f]))]
    topk = max(1, min(len(every), topk))
    result = {}
    for (i, query), head in ((iq, h) for iq in enumerate(queries) for h in range(2)):
        candidates = every
        if two_stages and len(past) > settings.keep_frames:
            sink, near = past[: settings.sink_frames], past[len(past) - settings.near_frames :]
            middle = past[settings.sink_frames : len(past) - settings.near_frames]
            score = {f: query[head] @ video.keys[f].mean(0)[head] for f in middle}
            best = sorted(middle, key=lambda f: (-score[f], f))
            kept = best[: settings.keep_frames - len(sink) - len(near)] + sink + near
            candidates = [(f, j) for f, j in every if f in kept or f >= end]
        if not past:
            topk = len(candidates)
        best = sorted(candidates, key=lambda c: (-(query[head] @ pooled[c[0]][c[1]][head]), c))
        result[head, i] = {video.number(*c) for c in best[:topk]}
    return result


def as_sets(blocks, key_blocks: int) -> dict:
    check_block_map(blocks, key_blocks)
    index, count = np.asarray(blocks.index)[0], np.asarray(blocks.count)[0]
    return {at: set(index[at][: count[at]].tolist()) for at in np.ndindex(count.shape)}


def key_blocks(video: Video) -> int:
    return (video.cache.frames + video.chunk) * video.grid.frame_blocks


SMALL = Grid(rows=5, columns=6, block_q=8, block_k=8)  # 30 tokens: four key blocks, the last with six
HSA = config.Sparsity(policy="light_forcing", keep_frames=4, sink_frames=1, near_frames=1)
VIDEOS = {
    "no past": dict(window=None, sink=0, frames=0),
    "one stage": dict(window=None, sink=0, frames=3),
    "two stages": dict(window=None, sink=0, frames=12),
    "ring, sink 1": dict(window=10, sink=1, frames=15),
    "ring, sink 3": dict(window=11, sink=3, frames=21),
    "ring without a sink": dict(window=10, sink=0, frames=18),
    "chunks of two": dict(window=9, sink=1, frames=14, chunk=2),
}


@pytest.mark.parametrize("budget", [1, 9, 25, 999])  # 999: more than the 28 candidates of two stages
@pytest.mark.parametrize("name", VIDEOS)
def test_hierarchical_equals_brute_force(name, budget):
    video = _video(name)
    found = as_sets(_jitted(video, HSA, budget), key_blocks(video))
    assert found == brute_force(video, HSA, budget)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", VIDEOS)
def test_the_kernels_choose_the_same(name, monkeypatch):
    interpreted = (partial(kernel, interpret=True) for kernel in (triton.means, triton.scores, triton.choose))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreter", api.Implementation(lambda *call: None, *interpreted))
    video, settings = _video(name), dataclasses.replace(HSA, selection="interpreter")
    blocks = _jitted(video, settings, 9)
    assert as_sets(blocks, key_blocks(video)) == brute_force(video, HSA, 9)
    ends = np.asarray(blocks.index) % SMALL.frame_blocks == SMALL.frame_blocks - 1  # these blocks hold dead tokens
    listed = np.arange(blocks.index.shape[-1]) < np.asarray(blocks.count)[..., None]
    np.testing.assert_array_equal(blocks.whole, (listed & ~ends).sum(-1))


def test_more_budget_than_candidates_keeps_exactly_the_candidates():
    video = _video("two stages")
    blocks = _jitted(video, HSA, 999)
    assert (blocks.count == (HSA.keep_frames + 3) * SMALL.frame_blocks).all()


@pytest.mark.parametrize("name", ["no past", "ring, sink 1"])
def test_topk_equals_brute_force(name):
    video = _video(name)
    found = as_sets(_jitted(video, dataclasses.replace(HSA, policy="topk"), 9), key_blocks(video))
    assert found == brute_force(video, HSA, 9, two_stages=False)


def test_frames_of_480x832():
    grid = Grid(rows=30, columns=52, block_q=64, block_k=64)  # 1560 tokens: 25 key blocks, the last with 24
    video = Video(grid, window=12, sink=1, frames=12)
    settings = dataclasses.replace(HSA, keep_frames=6, near_frames=2)
    assert len(video.visible()) == 9 and video.q.shape[1] % 64  # two stages, and a short last query block
    found = sparsity.select(video.inputs(settings, 43, 75))
    assert as_sets(found, key_blocks(video)) == brute_force(video, settings, 43)


@pytest.mark.parametrize("name", VIDEOS)
def test_of_equal_scores_the_earliest_win(name):
    video = Video(SMALL, **VIDEOS[name], scale=0.0)
    assert as_sets(_jitted(video, HSA, 9), key_blocks(video)) == brute_force(video, HSA, 9)


def test_one_compilation_serves_all_chunks():
    settings = config.Sparsity(policy="light_forcing", keep_frames=4, sink_frames=1, near_frames=1, target=0.6, base=0.7)
    budgets = sparsity.chunk_budgets((3,) * 6, 0, SMALL, settings, config.Cache(window=10, sink=1))

    compiled = _select._cache_size()
    for chunk in range(6):
        video = Video(SMALL, window=10, sink=1, frames=3 * chunk)
        blocks = _select(video.inputs(settings, budgets.blocks[chunk], budgets.width))
        assert as_sets(blocks, key_blocks(video)) == brute_force(video, settings, int(budgets.blocks[chunk]))
    assert _select._cache_size() == compiled + 1


@pytest.mark.parametrize("name", ["no past", "one stage", "ring, sink 1"])
def test_window_takes_the_chunk_then_the_sink_then_the_newest(name):
    video = _video(name)
    settings = config.Sparsity(policy="window", keep_frames=6, sink_frames=1, near_frames=2)
    past, end = video.visible(), len(video.keys)
    order = [end, end + 1, end + 2, *past[:1], *reversed(past[1:][-2:])]
    for frames in (3, 4, 5, 6):
        found = as_sets(_jitted(video, settings, frames * SMALL.frame_blocks), key_blocks(video))
        expected = {video.number(f, j) for f in order[:frames] for j in range(SMALL.frame_blocks)}
        assert all(kept == expected for kept in found.values())


def test_full_takes_what_is_visible():
    video = _video("ring, sink 1")
    found = as_sets(_jitted(video, config.Sparsity(policy="full"), 999), key_blocks(video))
    frames = [*video.visible(), *(len(video.keys) + np.arange(3))]
    expected = {video.number(f, j) for f in frames for j in range(SMALL.frame_blocks)}
    assert all(kept == expected for kept in found.values())


def test_the_oracle_knows_the_attention():
    video = _video("ring, sink 1")
    past, end = video.visible(), len(video.keys)
    keys = np.concatenate([*(video.keys[f] for f in past), *video.current])  # [token, head, e]
    place = [video.number(f, t // 8) for f in [*past, *range(end, end + 3)] for t in range(30)]
    logits = np.einsum("the,she->hts", np.asarray(video.q[0]), keys) * 8**-0.5
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mass = np.zeros((2, 12, key_blocks(video)))
    for row, block in np.ndindex(90, len(place)):
        mass[:, row // 8, place[block]] += shares[:, row, block] / min(8, 90 - row // 8 * 8)
    inputs = video.inputs(config.Sparsity(policy="oracle"), 5, key_blocks(video))
    found = attention_mass(inputs)[0]
    np.testing.assert_allclose(found, mass[:, :, np.asarray(inputs.time.blocks)], atol=1e-6)
    chosen = as_sets(_jitted(video, config.Sparsity(policy="oracle"), 5), key_blocks(video))
    assert all(kept == set(np.argsort(-mass[at])[:5].tolist()) for at, kept in chosen.items())


def test_lists_too_narrow_for_a_first_chunk_are_refused():
    with pytest.raises(ValueError, match="width=11 must hold the 12 key blocks"):
        sparsity.select(_video("one stage").inputs(HSA, 3, width=11))


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="policy='best' must be 'dense', a function, or one of light_forcing, topk"):
        sparsity.select(_video("one stage").inputs(dataclasses.replace(HSA, policy="best"), 3, 12))


def test_a_function_of_ones_own_selects():
    video = _video("one stage")

    def mine(inputs):
        assert callable(inputs.settings.policy)
        return sparsity.SELECTORS["window"](inputs)

    settings = config.Sparsity(policy=mine, sink_frames=0, near_frames=1, keep_frames=2)
    assert (sparsity.select(video.inputs(settings, 999, 40)).count == 4 * SMALL.frame_blocks).all()


def test_pooling_divides_by_live_tokens():
    video = _video("one stage")
    expected = np.stack([m for frame in video.current for m in means(frame, 8)])
    np.testing.assert_allclose(video.new.pooled[0], expected, atol=1e-6)
    expected = np.stack(means(np.asarray(video.q[0]), 8))  # 90 tokens: the last of 12 blocks has two
    np.testing.assert_allclose(pool_queries(video.q, 8)[0], expected, atol=1e-6)


@cache
def _video(name: str) -> Video:
    return Video(SMALL, **VIDEOS[name])


_select = jax.jit(sparsity.select)


def _jitted(video: Video, settings: config.Sparsity, budget: int):
    return _select(video.inputs(settings, budget, key_blocks(video)))
