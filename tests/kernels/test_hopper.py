"""The Hopper kernels, forward and gradients, against the float32 reference, and the lists that they walk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.block_sparse import hopper, lists, reference
from pallas_kernels.block_sparse.hopper_common import Config
from pallas_kernels.block_sparse.hopper_walk import Walk
from pallas_kernels.block_sparse.types import BlockMap, Past


@dataclasses.dataclass(frozen=True)
class Case:
    b: int = 1
    tq: int = 128
    heads: int = 2
    e: int = 64
    past: int = 1  # frames
    chunk: int = 1  # frames
    frame: int = 128  # live tokens of one
    block_q: int = 128
    block_k: int = 64
    width: int = 3
    least: int = 0  # entries of a list at least
    ordered: bool = False  # lists have blocks with dead tokens last, and say so
    layers: int = 2
    past_gradient: bool = False
    parts: int = 1
    multiprocessors: int = 2

    @property
    def padded(self):
        return -(-self.frame // self.block_k) * self.block_k


CASES = {
    "past frozen": Case(),
    "past": Case(past_gradient=True),
    "no past, head dimension 128": Case(past=0, chunk=2, e=128, least=1),
    "ragged, dead tokens, merged lists, a cut wave, batch 2": Case(
        b=2, tq=200, heads=3, past=2, frame=72, block_k=32, width=7, parts=3, multiprocessors=5, past_gradient=True
    ),
    "workers of many tiles of keys, some of which no query names": Case(
        b=2, tq=200, heads=3, past=2, frame=72, block_k=32, width=3, multiprocessors=1, past_gradient=True
    ),
    "lists in order": Case(tq=64, heads=1, chunk=2, frame=72, block_k=32, width=8, least=2, ordered=True),
    "64 queries to a list": Case(tq=200, frame=200, block_q=64, width=6, parts=2, multiprocessors=3),
    "64 queries, 128 keys": Case(tq=192, frame=200, block_q=64, block_k=128, width=3, least=2, past_gradient=True),
    "parts that begin with dead keys, parts that have no others": Case(
        tq=64, heads=1, past=2, chunk=2, frame=136, block_q=64, block_k=128, width=8, least=8, parts=11
    ),
    "empty lists": Case(width=1, least=0, heads=4),
}


def arguments(case: Case, seed: int = 0):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)

    head, tk, slots = (case.heads, case.e), case.chunk * case.padded, case.past * case.padded
    q, dout = normal(case.b, case.tq, *head), normal(case.b, case.tq, *head)
    k, v = normal(case.b, tk, *head), normal(case.b, tk, *head)
    past = None
    if case.past:
        stacked = (case.layers, case.b, slots, *head)
        past = Past(normal(*stacked), normal(*stacked), jnp.int32(case.layers - 1))
    shape = (case.b, case.heads, -(-case.tq // case.block_q))
    order = np.argsort(draw.random((*shape, (tk + slots) // case.block_k)), axis=-1)
    count = draw.integers(case.least, case.width + 1, shape)
    index, whole = order[..., : case.width], None
    if case.ordered:
        listed, frame = np.arange(case.width) < count[..., None], case.padded // case.block_k
        kind = np.where(listed, index % frame == frame - 1, 2)
        index = np.take_along_axis(index, np.argsort(kind, axis=-1, kind="stable"), axis=-1)
        whole = jnp.asarray((kind == 0).sum(-1), jnp.int32)
    index, count = jnp.asarray(index, jnp.int32), jnp.asarray(count, jnp.int32)
    return q, k, v, past, BlockMap(index, count, case.block_q, case.block_k, whole), dout


def attend(function, case: Case, seed: int = 0, dtype=None):
    """(out, lse) of `function(q, k, v, blocks, past, scale, frame_tokens)` and the gradients of q, k, v and the past."""
    q, k, v, past, blocks, dout = arguments(case, seed)
    dlse = jnp.asarray(np.random.default_rng(seed).standard_normal((case.b, case.heads, case.tq)), jnp.float32)
    scale, frame_tokens = 0.7 * case.e**-0.5, None if case.frame == case.padded else case.frame
    q, k, v, dout = (x.astype(dtype or x.dtype) for x in (q, k, v, dout))
    old = past and tuple(x.astype(dtype or x.dtype) for x in (past.k, past.v))

    @jax.jit
    def run(q, k, v, old, dout, dlse):
        def call(q, k, v, old):
            seen = old if case.past_gradient else jax.lax.stop_gradient(old)
            return function(q, k, v, blocks, old and Past(*seen, past.layer), scale, frame_tokens)

        (out, lse), pull = jax.vjp(call, q, k, v, old)
        empty = lse == -jnp.inf  # the log-sum-exp of nothing has no gradient
        *own, dpast = pull((dout, jnp.where(empty, 0, dlse)))
        return (out, jnp.where(empty, 0, lse), empty), (*own, dpast if case.past_gradient else None)

    return run(q, k, v, old, dout, dlse)


def check(case: Case, config: Config, seed: int = 0):
    def kernels(*arrays):
        return hopper.attention(*arrays, config=config)

    (out, lse, empty), gradients = attend(kernels, case, seed)
    (wanted, wanted_lse, nothing), wanted_gradients = attend(reference.attention, case, seed, jnp.float32)
    np.testing.assert_array_equal(empty, nothing)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    assert_close((out, gradients), (wanted, wanted_gradients))


def assert_close(got, wanted):
    """Relative L2; the operands of the products are bfloat16, which alone gives 2.4e-3."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for have, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert have.shape == want.shape and have.dtype == jnp.bfloat16
        error = jnp.linalg.norm(have.astype(jnp.float32) - want)
        assert error <= 3e-3 * jnp.linalg.norm(want), float(error / jnp.linalg.norm(want))


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name, interpret):
    case = CASES[name]
    check(case, Config(parts=case.parts, multiprocessors=case.multiprocessors, interpret=interpret))


def test_the_cases_cover_what_they_name():
    """Lists that are empty and full, dead keys, and a wave that is cut."""
    counts = np.concatenate([np.ravel(arguments(case)[4].count) for case in CASES.values()])
    assert (counts == 0).any() and (counts == 7).any()
    cut = CASES["ragged, dead tokens, merged lists, a cut wave, batch 2"]
    assert cut.b * cut.heads * 2 % cut.multiprocessors and cut.padded > cut.frame


@pytest.mark.parametrize("block_q, block_k, past_gradient", [(128, 64, True), (128, 32, False), (64, 128, True)])
def test_full_size_lowers_without_a_gpu(block_q, block_k, past_gradient):
    """Shared memory, shapes and layouts are checked on the way."""
    frame, tq, heads, e = 1560, 4680, 12, 128
    padded = -(-frame // block_k) * block_k
    array = jax.ShapeDtypeStruct
    q, k = array((1, tq, heads, e), jnp.bfloat16), array((1, 3 * padded, heads, e), jnp.bfloat16)
    old = array((30, 1, 9 * padded, heads, e), jnp.bfloat16)
    rows = (1, heads, -(-tq // block_q))
    past = Past(old, old, array((), jnp.int32))

    def attend(q, k, v, past):
        return hopper.attention(q, k, v, blocks, past if past_gradient else jax.lax.stop_gradient(past), 0.1, frame)

    def run(*arguments):
        out, pull = jax.vjp(attend, *arguments)
        return out, pull(out)

    blocks = BlockMap(jnp.zeros((*rows, 40), jnp.int32), jnp.zeros(rows, jnp.int32), block_q, block_k)
    text = jax.jit(run).trace(q, k, k, past).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 5  # three kernels, and two that join parts


@pytest.mark.parametrize("block_q", [128, 64])
@pytest.mark.parametrize("tq", [1, 129, 200])
def test_any_number_of_queries_lowers_without_a_gpu(tq, block_q):
    """The interpreter takes rows that a tile's copy does not."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    rows = 2, 2, -(-tq // block_q)
    blocks = BlockMap(jnp.zeros((*rows, 2), jnp.int32), jnp.zeros(rows, jnp.int32), block_q, 64)

    def run(q, k, v):
        (out, lse), pull = jax.vjp(lambda q, k, v: hopper.attention(q, k, v, blocks, None, 0.1, None), q, k, v)
        return out, lse, pull((out, lse))

    traced = jax.jit(run).trace(array((2, tq, 2, 64)), array((2, 128, 2, 64)), array((2, 128, 2, 64)))
    out, lse, gradients = traced.out_info
    assert out.shape == gradients[0].shape == (2, tq, 2, 64) and lse.shape == (2, 2, tq)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.custom_call @mosaic_gpu") >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("block_q", [128, 64])
@pytest.mark.parametrize("block_k", [128, 64, 32])
@pytest.mark.parametrize("e", [128, 64])
@pytest.mark.parametrize("frame", [256, 200])
def test_on_the_gpu(block_q, block_k, e, frame):
    case = Case(b=2, tq=3 * frame, heads=3, e=e, past=3, chunk=3, frame=frame, block_q=block_q, block_k=block_k)
    case = dataclasses.replace(case, width=4 * case.padded // block_k, past_gradient=True)
    for config in (
        Config(),
        Config(parts=1, multiprocessors=3),
        Config(parts=2, stages=1, key_stages=1),
    ):
        check(case, config)


@pytest.mark.gpu
def test_repeats_to_the_bit_at_full_size():
    case = Case(tq=4608, heads=12, e=128, past=9, chunk=3, frame=1536, width=35, least=35, past_gradient=True)
    first, second = (attend(lambda *x: hopper.attention(*x), case) for _ in range(2))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, second)))


@pytest.mark.parametrize("change", [{"block_q": 32}, {"block_k": 16}, {"e": 32}, {"dtype": "float32"}])
def test_what_the_kernels_are_not_made_for(change):
    change = dict(change)
    dtype = change.pop("dtype", "bfloat16")
    q, _, _, _, blocks, _ = arguments(dataclasses.replace(Case(past=0, width=1), **change))
    assert "needs" in hopper.unfit(q.astype(dtype), blocks)
    assert hopper.unfit(*(arguments(Case())[i] for i in (0, 4))) is None


@pytest.mark.parametrize(
    "tokens, heads, keys, config, cut",
    [
        (4608, 12, 3840, Config(multiprocessors=132), (36, 3)),  # three parts of each fill 108 places
        (4680, 12, 3936, Config(multiprocessors=132), (48, 2)),  # halves fill 96 places, thirds would take two rounds
        (4608, 11, 3840, Config(multiprocessors=132), (0, 1)),  # three full waves
        (4608, 40, 3840, Config(multiprocessors=132), (0, 1)),  # the last wave is nearly full
        (4608, 12, 384, Config(multiprocessors=132), (0, 1)),  # too short to be worth a join
        (4608, 12, 384, Config(multiprocessors=132, parts=4), (36, 4)),
        (4608, 12, 3840, Config(multiprocessors=132, parts=1), (0, 1)),
        (100, 2, 3840, Config(multiprocessors=132), (2, 8)),
    ],
)
def test_the_last_wave_is_cut_so_that_it_ends_soonest(tokens, heads, keys, config, cut):
    array = jax.ShapeDtypeStruct
    q, k = array((1, tokens, heads, 128), jnp.bfloat16), array((1, 2 * keys, heads, 128), jnp.bfloat16)
    rows = (1, heads, -(-tokens // 128))
    blocks = BlockMap(array((*rows, keys // 32), jnp.int32), array(rows, jnp.int32), 128, 32)
    walk = Walk(q, k, k, blocks, None, None, config)
    assert (walk.cut, walk.parts) == cut
    assert walk.items == walk.uncut + walk.cut_items and walk.uncut == heads * rows[2] - cut[0]
    assert walk.blocks == min(walk.items, 132)


def test_config_checks_itself():
    for name in ("stages", "parts", "key_stages", "multiprocessors"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            Config(**{name: 0})


def test_config_takes_the_multiprocessors_of_the_device(monkeypatch):
    assert Config().multiprocessors == (platform.device().multiprocessors or 132)
    monkeypatch.setattr(platform, "device", lambda: platform.Device("gpu", "NVIDIA H100 PCIe", (9, 0), 1, 114))
    assert Config().multiprocessors == 114 and hash(Config()) == hash(Config(multiprocessors=114))


def key_blocks(first, number, group):
    """Neighbours in groups, the last of which may be incomplete."""
    return np.pad(first + np.arange(number), (0, -number % group), constant_values=-1).reshape(-1, group)


def random_map(seed, b=2, heads=2, queries=5, width=6, key_blocks=9):
    draw = np.random.default_rng(seed)
    index = np.argsort(draw.random((b, heads, queries, key_blocks)), axis=-1)[..., :width].astype(np.int32)
    count = draw.integers(0, width + 1, (b, heads, queries)).astype(np.int32)
    return index, count, BlockMap(jnp.asarray(index), jnp.asarray(count), 128, 32)


@pytest.mark.parametrize("first, number, group", [(0, 9, 1), (4, 5, 1), (0, 9, 2), (3, 6, 2), (2, 1, 2)])
def test_transposed_lists(first, number, group):
    index, count, blocks = random_map(first + group)
    lists_of, lengths = jax.jit(functools.partial(lists.transpose, wanted=key_blocks(first, number, group)))(blocks)
    assert lists_of.shape == (2, 2, -(-number // group), 5)
    for b, h, j in np.ndindex(*lengths.shape):
        wanted = []
        for i in range(5):
            named = set(index[b, h, i, : count[b, h, i]].tolist())
            keys = [first + j * group + g for g in range(group) if j * group + g < number]
            members = sum(2**g for g, key in enumerate(keys) if key in named)
            if members:
                wanted.append(i if group == 1 else i * 2**group + members)
        assert lists_of[b, h, j, : lengths[b, h, j]].tolist() == wanted
        assert not lists_of[b, h, j, lengths[b, h, j] :].any()


def test_blocks_with_dead_tokens_go_last():
    index, count, blocks = random_map(1)
    ordered, whole = jax.jit(functools.partial(lists.live_first, frame_tokens=80))(blocks)  # three blocks of 32, 16 dead tokens
    for at in np.ndindex(*count.shape):
        listed = index[at][: count[at]].tolist()
        short = [j for j in listed if j % 3 == 2]
        assert ordered[at].tolist()[: count[at]] == [j for j in listed if j % 3 != 2] + short
        assert whole[at] == count[at] - len(short)


@pytest.mark.parametrize("frame_tokens", [None, 96])
def test_without_dead_tokens_lists_stay(frame_tokens):
    index, count, blocks = random_map(2)
    ordered, whole = lists.live_first(blocks, frame_tokens)
    assert ordered is blocks.index and whole is blocks.count


def test_lists_that_have_the_order_stay():
    index, count, blocks = random_map(2)
    blocks = dataclasses.replace(blocks, whole=jnp.asarray(count // 2))
    ordered, whole = lists.live_first(blocks, 80)
    assert ordered is blocks.index and whole is blocks.whole
    assert lists.live_first(blocks, 96)[1] is blocks.count  # whatever the field says: there is nothing to mask


def test_longest_first():
    count = np.random.default_rng(3).integers(0, 5, (2, 3, 40))
    work = jax.jit(functools.partial(lists.longest_first, most=4))(jnp.asarray(count, jnp.int32))
    np.testing.assert_array_equal(work // 5, np.argsort(-count, axis=-1, kind="stable"))
    np.testing.assert_array_equal(work % 5, -np.sort(-count, axis=-1))
