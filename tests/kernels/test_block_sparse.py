"""Block-sparse attention: the reference against a loop, and every implementation against the reference."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMap, Past, block_sparse_attention
from pallas_kernels.block_sparse import api


@dataclasses.dataclass(frozen=True)
class Case:
    b: int = 2
    tq: int = 20  # three blocks of 8, the last one short
    heads: int = 2
    e: int = 8
    layers: int = 3
    cached: int = 6  # key blocks of the past, 0: no past
    chunk: int = 3
    block_q: int = 8
    block_k: int = 4
    width: int = 5
    count: int | None = None  # None: random from 0 to the width
    frame_tokens: int | None = None
    size: float = 1.0  # of the queries
    dtype: str = "float32"


CASES = {
    "random": Case(),
    "one source": Case(cached=0, width=3),
    "nothing": Case(count=0),
    "single block": Case(width=1, count=1),
    "full": Case(width=9, count=9),
    "padded frames": Case(frame_tokens=10, count=5),  # three blocks of 4, the third with two live tokens
    "whole query blocks": Case(tq=16),
    "short query block": Case(tq=3),
    "equal scores": Case(size=0.0),
    "large logits": Case(size=300.0),
    "block sizes swapped": Case(block_q=4, block_k=8),
}


def arguments(case: Case, seed: int = 0):
    """(q, k, v, blocks, past) with what the lists do not use filled with numbers that mean nothing."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), case.dtype)

    head, tk = (case.heads, case.e), case.chunk * case.block_k
    q = normal(case.b, case.tq, *head) * jnp.asarray(case.size, case.dtype)
    k, v = normal(case.b, tk, *head), normal(case.b, tk, *head)
    past = None
    if case.cached:
        shape = (case.layers, case.b, case.cached * case.block_k, *head)
        past = Past(normal(*shape), normal(*shape), jnp.int32(case.layers - 1))
    rows = (case.b, case.heads, -(-case.tq // case.block_q))
    index = draw.permuted(np.broadcast_to(np.arange(case.cached + case.chunk), (*rows, case.cached + case.chunk)), axis=-1)
    index = index[..., : case.width].astype(np.int32)
    count = draw.integers(0, case.width + 1, rows) if case.count is None else np.full(rows, case.count)
    index = np.where(np.arange(case.width) < count[..., None], index, draw.choice([-7, 10**6], index.shape))
    blocks = BlockMap(jnp.asarray(index, jnp.int32), jnp.asarray(count, jnp.int32), case.block_q, case.block_k)
    return q, k, v, blocks, past


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(case: Case, implementation: str | None, q, k, v, blocks, past):
    return block_sparse_attention(
        q,
        k,
        v,
        blocks,
        scale=case.e**-0.5,
        past=past,
        frame_tokens=case.frame_tokens,
        return_lse=True,
        implementation=implementation,
    )


def loop(case: Case, q, k, v, blocks, past):
    """One query at a time, in float64, from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if past is not None:
        layer = int(past.layer)
        k = np.concatenate([np.asarray(past.k[layer], np.float64), k], axis=1)
        v = np.concatenate([np.asarray(past.v[layer], np.float64), v], axis=1)
    out, lse = np.zeros(q.shape), np.full((case.b, case.heads, case.tq), -np.inf)
    frame = case.frame_tokens and -(-case.frame_tokens // case.block_k) * case.block_k
    for b, t, h in np.ndindex(case.b, case.tq, case.heads):
        row = (b, h, t // case.block_q)
        tokens = []
        for block in np.asarray(blocks.index)[row][: int(blocks.count[row])]:
            tokens += [n for n in range(block * case.block_k, (block + 1) * case.block_k)]
        tokens = [n for n in tokens if frame is None or n % frame < case.frame_tokens]
        if tokens:
            logits = k[b, tokens, h] @ q[b, t, h] * case.e**-0.5
            weights = np.exp(logits - logits.max())
            out[b, t, h] = weights @ v[b, tokens, h] / weights.sum()
            lse[b, h, t] = logits.max() + np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_a_loop(name):
    case = CASES[name]
    given = arguments(case)
    out, lse = attend(case, "reference", *given)
    expected, expected_lse = loop(case, *given)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_xla_equals_the_reference(name):
    case = CASES[name]
    given = arguments(case, seed=1)
    out, lse = attend(case, "xla", *given)
    expected, expected_lse = attend(case, "reference", *given)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert out.dtype == given[0].dtype and lse.dtype == jnp.float32


def test_an_empty_list_gives_zero_and_minus_infinity():
    case = CASES["nothing"]
    out, lse = attend(case, "xla", *arguments(case))
    assert not out.any() and (lse == -jnp.inf).all()


def test_sixteen_bits():
    case = Case(dtype="bfloat16", count=5)
    given = arguments(case)
    out, _ = attend(case, "xla", *given)
    expected, _ = attend(case, "reference", *given)
    assert out.dtype == jnp.bfloat16
    error = jnp.linalg.norm((out - expected).astype(jnp.float32)) / jnp.linalg.norm(expected.astype(jnp.float32))
    assert error < 8e-3


@pytest.mark.parametrize("name", ["padded frames", "large logits"])
def test_gradients_equal_those_of_the_reference(name):
    case = CASES[name]
    q, k, v, blocks, past = arguments(case)
    weights = jax.random.normal(jax.random.key(5), q.shape)

    def loss(arrays, implementation):
        q, k, v, kv = arrays
        old = past and Past(*kv, past.layer)
        out, lse = attend(case, implementation, q, k, v, blocks, old)
        return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

    arrays = (q, k, v, past and (past.k, past.v))
    found, expected = (jax.jit(jax.grad(loss), static_argnums=1)(arrays, name) for name in ("xla", "reference"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(st.data())
def test_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    block_k, frames, cached_frames = draw(1, 4), draw(1, 2), draw(0, 2)
    frame_tokens = data.draw(st.none() | st.integers(1, 9))
    frame_blocks = 1 if frame_tokens is None else -(-frame_tokens // block_k)
    cached, chunk = cached_frames * frame_blocks, frames * frame_blocks
    case = Case(
        b=draw(1, 2),
        tq=draw(1, 9),
        heads=draw(1, 2),
        e=4,
        layers=draw(1, 2),
        cached=cached,
        chunk=chunk,
        block_q=draw(1, 5),
        block_k=block_k,
        width=draw(1, cached + chunk),
        frame_tokens=frame_tokens,
    )
    given = arguments(case, seed=draw(0, 9))
    out, lse = attend(case, "xla", *given)
    expected, expected_lse = loop(case, *given)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_layer_and_the_lists_are_traced():
    case = Case()
    q, k, v, blocks, past = arguments(case)
    call = jax.jit(lambda past, blocks: attend(case, "xla", q, k, v, blocks, past)[0])
    for layer in range(case.layers):
        at = dataclasses.replace(past, layer=jnp.int32(layer))
        lists = dataclasses.replace(blocks, count=jnp.minimum(blocks.count, layer))
        np.testing.assert_allclose(call(at, lists), attend(case, "reference", q, k, v, lists, at)[0], atol=1e-5)
    assert call._cache_size() == 1


def test_xla_never_takes_a_layer_out_of_the_cache():
    """Neither the lowered program nor the compiled one holds an array of a layer's size beside its inputs."""
    case = Case(b=1, cached=4096, chunk=3, layers=3, width=4, count=4)
    q, k, v, blocks, past = arguments(case)
    lowered = jax.jit(lambda past: attend(case, "xla", q, k, v, blocks, past)).lower(past)
    layer_bytes = past.k.nbytes // case.layers
    assert lowered.compile().memory_analysis().temp_size_in_bytes < layer_bytes / 4
    jaxpr = jax.make_jaxpr(lambda past: attend(case, "xla", q, k, v, blocks, past))(past)
    sizes = {
        (eqn.primitive.name, var.aval.size) for eqn in every_equation(jaxpr.jaxpr) for var in eqn.outvars if var.aval.shape
    }
    large = {(name, size) for name, size in sizes if size >= past.k.size // case.layers}
    assert large and all(name == "reshape" and size == past.k.size for name, size in large)  # views of the whole stack


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from every_equation(getattr(inner, "jaxpr", inner))


def test_without_a_name_xla_runs():
    case = Case()
    given = arguments(case)
    np.testing.assert_array_equal(attend(case, None, *given)[0], attend(case, "xla", *given)[0])


def test_lse_only_on_request():
    case = Case()
    q, k, v, blocks, past = arguments(case)
    out = block_sparse_attention(q, k, v, blocks, scale=1.0, past=past)
    assert out.shape == q.shape


def test_a_named_implementation_runs_or_raises(monkeypatch):
    case = Case()
    given = arguments(case)
    cannot = api.Implementation(lambda *_: "needs another machine", api.xla.attention, automatic=True)
    monkeypatch.setattr(
        api, "IMPLEMENTATIONS", {"other": cannot, **{name: api.IMPLEMENTATIONS[name] for name in ("xla", "reference")}}
    )
    with pytest.raises(NotImplementedError, match="implementation='other': needs another machine"):
        attend(case, "other", *given)
    assert api.explain(given[0], given[3], given[4]) == {"other": "needs another machine", "xla": None, "reference": None}
    with pytest.raises(ValueError, match="'fast' must be one of other, xla, reference, or None"):
        attend(case, "fast", *given)
