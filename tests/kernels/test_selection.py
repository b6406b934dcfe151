"""Selection against a loop in numpy: in XLA, in the Pallas interpreter, and as it is on a GPU.

Scores are small whole numbers, which float32 adds and multiplies exactly in any order, so that every choice must be equal.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from pallas_kernels import BlockMap, check_block_map, platform
from pallas_kernels.selection import api, block_means, block_scores, choose_blocks, explain, triton, xla
from pallas_kernels.selection.types import Rule

# pytest shows every deprecation, whatever filter the module has set
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

MODES = ["xla", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)]
ROWS = (1, 2, 3)  # batch, heads, query blocks


def kernels(mode: str):
    if mode == "xla":
        return xla.scores, xla.choose
    interpret = mode == "interpreter"
    return functools.partial(triton.scores, interpret=interpret), functools.partial(triton.choose, interpret=interpret)


@functools.partial(jax.jit, static_argnums=0)
def scored(mode, queries, keys, order, past, layer):
    return kernels(mode)[0](queries, keys, order, past, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def chosen(mode, rule: Rule, scores, order, past_frames, budget):
    return kernels(mode)[1](scores, order, past_frames, budget, rule)


def whole_numbers(draw, *shape) -> np.ndarray:
    return draw.integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("cached", "chunk", "queries"), [(6, 3, 5), (0, 7, 17), (70, 20, 33)])
def test_scores_are_products_in_the_order_asked_for(mode, cached, chunk, queries):
    draw, (b, heads, e) = np.random.default_rng(0), (2, 2, 32)
    q, k = whole_numbers(draw, b, queries, heads, e), whole_numbers(draw, b, chunk, heads, e)
    past = whole_numbers(draw, 3, b, cached, heads, e)
    order = np.concatenate([draw.permutation(cached), cached + draw.permutation(chunk)]).astype(np.int32)
    stack = (past, jnp.int32(1)) if cached else (None, None)
    found = scored(mode, q, k, order, *stack)
    keys = np.concatenate([past[1], k], axis=1)[:, order]
    np.testing.assert_array_equal(found, np.einsum("bqhe,bkhe->bhqk", q, keys))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("tokens", "block", "sizes"), [(24, 8, (8, 8, 8)), (21, 8, (8, 8, 5)), (24, 6, (6, 2, 6, 2)), (1, 64, (1,))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_means_are_of_the_tokens_that_count(mode, tokens, block, sizes, dtype):
    x = jnp.asarray(whole_numbers(np.random.default_rng(0), 2, tokens, 3, 32), dtype)
    run = {"xla": xla.means, "gpu": triton.means, "interpreter": functools.partial(triton.means, interpret=True)}[mode]
    expected = [np.asarray(x, np.float64)[:, i * block :][:, :size].mean(1) for i, size in enumerate(sizes)]
    np.testing.assert_allclose(run(x, sizes, block), np.stack(expected, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "sizes", "message"),
    [
        (24, (8, 8), "must have 16 to 16 tokens"),
        (15, (8, 8), "must have 16"),
        (16, (8, 9), "must lie in 1..8"),
        (16, (8, 0), "1..8"),
    ],
)
def test_means_of_blocks_that_do_not_fit_are_refused(tokens, sizes, message):
    with pytest.raises(ValueError, match=message):
        block_means(jnp.zeros((1, tokens, 1, 16)), sizes, 8)


# frames of the past and of the chunk, blocks of a frame
RULES = {
    "whole blocks": (Rule(6 * 4, 36, 4, 8, 0, 4, 1, 1), 9),
    "dead tokens": (Rule(7 * 5, 50, 5, 8, 3, 3, 1, 1), 10),
    "narrow lists": (Rule(8 * 2, 6, 2, 8, 1, 5, 2, 0), 11),
    "one stage": (Rule(4 * 3, 18, 3, 8, 2, None, 0, 0), 6),
    "no past": (Rule(0, 10, 5, 8, 0, 3, 1, 1), 2),
}


def brute_force(rule: Rule, scores, order, past: int, budget: int) -> list[int]:
    """The numbers of the blocks of one list, in the order of time, those with dead tokens last."""
    size, first = rule.frame_blocks, rule.cached // rule.frame_blocks
    blocks = {f: [(f, j) for j in range(size)] for f in [*range(past), *range(first, len(scores) // size)]}
    score = {(f, j): float(scores[f * size + j]) for f in blocks for j in range(size)}
    kept = list(range(past))
    if rule.keep_frames is not None and past > rule.keep_frames:
        live = [rule.block_k] * (size - 1) + [rule.block_k - rule.dead]
        total = {f: sum(score[f, j] * live[j] for j in range(size)) for f in kept}
        middle = kept[rule.sink_frames : past - rule.near_frames]
        best = sorted(middle, key=lambda f: (-total[f], f))[: rule.keep_frames - rule.sink_frames - rule.near_frames]
        kept = [f for f in kept if f in best or f not in middle]
    candidates = [block for f in blocks if f in kept or f >= first for block in blocks[f]]
    count = len(candidates) if past == 0 else max(1, min(budget, rule.width, len(candidates)))
    best = sorted(candidates, key=lambda block: (-score[block], block))[:count]
    listed = sorted(best, key=lambda block: (rule.dead > 0 and block[1] == size - 1, block))
    return [int(order[f * size + j]) for f, j in listed]


def check(mode, rule: Rule, scores, order, past: int, budget: int):
    index, count, whole = (None if x is None else np.asarray(x) for x in chosen(mode, rule, scores, order, past, budget))
    check_block_map(BlockMap(index, count, 8, rule.block_k), scores.shape[-1])
    assert index.shape == (*scores.shape[:3], rule.width)
    for at in np.ndindex(count.shape):
        expected, found = brute_force(rule, scores[at], order, past, budget), index[at][: count[at]].tolist()
        if mode == "xla":
            assert sorted(found) == sorted(expected)
            continue
        assert found == expected and not index[at][count[at] :].any()
        if rule.dead:
            lasts = set(order[rule.frame_blocks - 1 :: rule.frame_blocks].tolist())
            assert whole[at] == sum(block not in lasts for block in found)
    assert (whole is None) == (mode == "xla" or rule.dead == 0)


def scene(name: str, seed: int, spread: int):
    """A rule, scores -spread..spread, and block numbers in no order."""
    rule, frames = RULES[name]
    draw, every = np.random.default_rng(seed), frames * rule.frame_blocks
    scores = draw.integers(-spread, spread + 1, (*ROWS, every)).astype(np.float32)
    scores *= np.where(draw.random(scores.shape) < 0.5, 1, -1)  # zeros of both signs
    order = np.concatenate([draw.permutation(rule.cached), rule.cached + draw.permutation(every - rule.cached)])
    return rule, scores.astype(np.float32), order.astype(np.int32)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(RULES)), seed=st.integers(0, 1000), spread=st.sampled_from([0, 1, 5, 1000]), data=st.data())
def test_the_choice_equals_brute_force(mode, name, seed, spread, data):
    rule, scores, order = scene(name, seed, spread)
    past = data.draw(st.integers(0, rule.cached // rule.frame_blocks), "past frames")
    budget = data.draw(st.integers(0, scores.shape[-1] + 1), "budget")
    check(mode, rule, scores, order, past, budget)


@pytest.mark.parametrize("mode", MODES)
def test_zeros_of_both_signs_are_equal(mode):
    rule, scores, order = scene("whole blocks", 0, 0)
    assert np.signbit(scores).any() and not np.signbit(scores).all()
    check(mode, rule, scores, order, 6, 7)


@pytest.mark.parametrize("mode", MODES)
def test_scores_of_any_size_are_told_apart(mode):
    rule, scores, order = scene("whole blocks", 3, 9)
    signs = np.sign(scores)
    draw = np.random.default_rng(4)
    scores = signs * np.ldexp(1 + draw.integers(0, 2, scores.shape) * 2.0**-23, draw.integers(-120, 120, scores.shape))
    check(mode, rule, scores.astype(np.float32), order, 4, 5)  # one stage: frames are not added up


def test_lists_are_sound_whatever_the_scores():
    rule, scores, order = scene("dead tokens", 5, 9)
    scores[..., ::3], scores[..., 1::3] = np.nan, np.inf
    for budget in (1, 20, 99):
        index, count, _ = chosen("interpreter", rule, scores, order, 7, budget)
        check_block_map(BlockMap(index, count, 8, 8), scores.shape[-1])
        assert (count == max(1, min(budget, 3 * 5 + 15))).all()


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.gpu
def test_full_size(warps):
    """18 past frames and 3 of 1560 tokens: the kernels, compiled, equal XLA."""
    draw, frames, size = np.random.default_rng(6), 18, 49
    q, k = (jnp.asarray(whole_numbers(draw, 1, n, 12, 128)) for n in (37, 3 * size))
    past = jnp.asarray(whole_numbers(draw, 2, 1, frames * size, 12, 128))
    order = jnp.arange((frames + 3) * size, dtype=jnp.int32)
    scores = scored("gpu", q, k, order, past, jnp.int32(1))
    np.testing.assert_array_equal(scores, scored("xla", q, k, order, past, jnp.int32(1)))
    rule = Rule(frames * size, 147, size, 32, 8, 6, 1, 2)
    index, count, _ = jax.jit(functools.partial(triton.choose, rule=rule, warps=warps))(scores, order, jnp.int32(18), 123)
    expected, _, _ = chosen("xla", rule, scores, order, 18, 123)
    assert (count == 123).all()
    np.testing.assert_array_equal(np.sort(index[..., :123]), np.sort(expected[..., :123]))


@pytest.mark.gpu
def test_scores_that_round_choose_alike():
    """Sums in another order move a score by a few units in its last place, so hardly any block changes places."""
    q, k, past = (
        jax.random.normal(jax.random.key(i), (*lead, 12, 128)) for i, lead in enumerate(((1, 72), (1, 72), (2, 1, 432)))
    )
    order, rule = jnp.arange(504, dtype=jnp.int32), Rule(432, 72, 24, 64, 0, 6, 1, 2)

    def listed(mode):
        scores = scored(mode, q, k, order, past, jnp.int32(1))
        index, count, _ = chosen(mode, rule, scores, order, 18, 51)
        return (index[..., :51, None] == order).any(-2), count

    (found, count), (expected, _) = listed("gpu"), listed("xla")
    assert (count == 51).all() and (found.sum(-1) == 51).all()
    assert (found != expected).sum() < 2e-3 * found.sum()


@pytest.mark.parametrize(("size", "block_k", "dead"), [(24, 64, 0), (49, 32, 8)])
def test_the_kernels_lower_for_a_gpu_at_full_size(size, block_k, dead):
    rule = Rule(18 * size, 150, size, block_k, dead, 6, 1, 2)

    def select(q, keys, order, past, number):
        queries = triton.means(q, (64,) * 72, 64)
        return triton.choose(triton.scores(queries, keys, order, past, number), order, number, number, rule)

    means = [jax.ShapeDtypeStruct((*lead, 12, 128), jnp.float32) for lead in ((1, 4608), (1, 3 * size), (30, 1, 18 * size))]
    order, number = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((21 * size,), ()))
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(select).trace(*means[:2], order, means[2], number).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("gpu$xla.gpu.triton") == 3


CALL = dict(cached=16, width=8, block_q=8, block_k=8, frame_tokens=30)


def choose(scores=(1, 2, 3, 24), blocks=24, **call):
    return choose_blocks(jnp.zeros(scores), jnp.arange(blocks), jnp.int32(2), jnp.int32(5), **(CALL | call))


def test_the_public_call_chooses_what_runs_here():
    assert explain(128, 21, 24)["xla"] is None
    blocks = choose(implementation="xla")
    assert blocks.index.shape == (1, 2, 3, 8) and (blocks.count == 5).all() and (blocks.block_q, blocks.block_k) == (8, 8)
    np.testing.assert_array_equal(choose(width=99).index.shape, (1, 2, 3, 24))
    means = jnp.ones((1, 3, 2, 16))
    np.testing.assert_array_equal(block_scores(means, means, jnp.arange(3)), jnp.full((1, 2, 3, 3), 16.0))


@pytest.mark.skipif(platform.device().nvidia, reason="of machines without an NVIDIA GPU")
def test_a_named_implementation_runs_or_raises():
    for call in (choose, lambda **name: block_scores(jnp.ones((1, 3, 2, 16)), jnp.ones((1, 3, 2, 16)), jnp.arange(3), **name)):
        with pytest.raises(NotImplementedError, match="selection with implementation='triton': needs an NVIDIA GPU"):
            call(implementation="triton")
        with pytest.raises(ValueError, match="implementation='sort' must be one of triton, xla, or None"):
            call(implementation="sort")


def test_reasons_of_the_kernels(monkeypatch):
    hopper = SimpleNamespace(compute_capability=(9, 0), kind="NVIDIA H200", backend="gpu")
    monkeypatch.setattr(platform, "device", lambda: hopper)
    assert explain(128, 21, 24) == {"triton": None, "xla": None} == explain(None, 63, 49)
    assert explain(40, 21, 24)["triton"] == "head_dim must be a power of two of at least 16, received 40"
    assert "received 200 of 24" in explain(128, 200, 24)["triton"] and "received 100 of 100" in explain(128, 100, 100)["triton"]
    hopper.compute_capability = (7, 0)
    assert explain(128, 21, 24)["triton"] == "needs compute capability 8.x, 9.x or 12.x, NVIDIA H200 has 7.0"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(scores=(1, 2, 24)), r"scores must be float32 \[b, head, query_block, key_block\], received float32 \(1, 2, 24\)"),
        (dict(blocks=23), r"order.shape=\(23,\) must name 24 key blocks"),
        (dict(scores=(1, 2, 3, 22), blocks=22), "22 key blocks must be whole frames of 4"),
        (dict(cached=14), "cached=14 must be whole frames of 4 in 24"),
        (dict(cached=24), "cached=24 must be whole frames of 4 in 24"),
        (dict(width=7), "width=7 must hold the 8 key blocks of a first chunk"),
        (dict(keep_frames=2, sink_frames=1, near_frames=1), "keep_frames=2 must exceed sink_frames=1 [+] near_frames=1"),
    ],
)
def test_wrong_choices_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        choose(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(keys=(1, 3, 2, 8)), r"keys.shape=\(1, 3, 2, 8\) must be \[1, key_block, 2, 16\]"),
        (dict(past=(5, 1, 4, 3, 16)), r"past.shape=\(5, 1, 4, 3, 16\) must be \[layer, 1, key_block, 2, 16\]"),
        (dict(blocks=8), r"order.shape=\(8,\) must name 7 key blocks"),
        (dict(layer=None), "past and layer go together"),
        (dict(dtype=jnp.bfloat16), "queries must be float32, received bfloat16"),
    ],
)
def test_wrong_scores_are_refused(call, message):
    arguments = dict(keys=(1, 3, 2, 16), past=(5, 1, 4, 2, 16), blocks=7, layer=jnp.int32(0), dtype=jnp.float32) | call
    queries, past = jnp.ones((1, 6, 2, 16), arguments["dtype"]), jnp.ones(arguments["past"])
    with pytest.raises(ValueError, match=message):
        block_scores(queries, jnp.ones(arguments["keys"]), jnp.arange(arguments["blocks"]), past=past, layer=arguments["layer"])


def test_every_implementation_is_documented():
    for name in api.IMPLEMENTATIONS:
        assert f'"{name}"' in block_scores.__doc__
