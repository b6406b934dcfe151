"""The attention of a layer: dense against a plain softmax over the visible frames, sparse policies against dense."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import attention, config, sparsity
from lf_jax import cache as kv
from lf_jax.tokens import Grid
from pallas_kernels.selection import api, triton

MODEL = config.Model(dim=16, ffn_dim=8, heads=2, layers=2, dtype="float32")
CACHES = {
    "first chunk": (config.Cache(), 0),
    "all frames": (config.Cache(), 6),
    "ring": (config.Cache(window=8, sink=1), 12),
    "ring without a sink": (config.Cache(window=8), 12),
}
KEEPS_ALL = dict(keep_frames=30, sink_frames=9, near_frames=9)


def settings(policy: str) -> config.Sparsity:
    return config.Sparsity(policy=policy, block_q=8, block_k=8, **KEEPS_ALL)


def grid(policy: str, rows: int = 5) -> Grid:
    return Grid(rows=rows, columns=6, block_q=8, block_k=1 if policy == "dense" else 8)


def draw(key: int, frames: int, grid: Grid):
    shape = (2, frames * grid.frame_tokens, 2, 8)
    return [jax.random.normal(k, shape) for k in jax.random.split(jax.random.key(key), 3)]


def history(name: str, grid: Grid, sparse: bool):
    """A cache after some chunks of three frames, and layer 1's keys and values of every committed frame."""
    where, frames = CACHES[name]
    cache = kv.empty(MODEL, grid, where, sparse, 2, 12)
    keys, values = [], []
    for chunk in range(frames // 3):
        layers = [draw(10 * chunk + layer, 3, grid) for layer in range(2)]
        parts = [attention.chunk_kv(k, v, grid, pool=sparse) for _, k, v in layers]
        cache = kv.append(cache, jax.tree.map(lambda *x: jnp.stack(x), *parts), 3, 3)
        keys += jnp.split(layers[1][1], 3, axis=1)
        values += jnp.split(layers[1][2], 3, axis=1)
    return cache, keys, values


def expected(name: str, q, k, v, keys, values):
    """Plain softmax attention over the frames that are visible."""
    where, frames = CACHES[name]
    gone = max(0, frames + 3 - (where.window or 12))
    seen = [f for f in range(frames) if f < where.sink or f >= where.sink + gone]
    k = jnp.concatenate([keys[f] for f in seen] + [k], axis=1)
    v = jnp.concatenate([values[f] for f in seen] + [v], axis=1)
    return softmax_attention(q, k, v)


def softmax_attention(q, k, v):
    logits = jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(logits), v)


# 5 rows: 30 tokens a frame, padded to 32 where attention is sparse; 4 rows: 24, whole key blocks.
@pytest.mark.parametrize(("name", "rows"), [*((name, 5) for name in CACHES), ("ring", 4)])
@pytest.mark.parametrize("policy", ["dense", *sparsity.SELECTORS])
def test_every_policy_with_a_full_budget_is_dense(policy, name, rows):
    g = grid(policy, rows)
    cache, keys, values = history(name, g, policy != "dense")
    q, k, v = draw(99, 3, g)
    blocks = (cache.frames + 3) * g.frame_blocks
    out, new = run(q, k, v, cache, sparsity.Budget(jnp.int32(blocks), blocks), g, settings(policy))
    np.testing.assert_allclose(out, expected(name, q, k, v, keys, values), atol=1e-5)
    padded = np.asarray(new.k).reshape(2, 3, g.padded_frame, 2, 8)
    np.testing.assert_array_equal(padded[:, :, : g.frame_tokens].reshape(k.shape), k)
    assert not padded[:, :, g.frame_tokens :].any()
    assert (new.pooled is None) == (policy == "dense")


@partial(jax.jit, static_argnums=(5, 6))
def run(q, k, v, cache, budget, grid, settings):
    frames = q.shape[1] // grid.frame_tokens
    given = (None, None) if settings.dense else (sparsity.timeline(cache, frames, grid), budget)
    new = attention.chunk_kv(k, v, grid, pool=not settings.dense, implementation=settings.selection)
    return attention.self_attention(q, new, cache, jnp.int32(1), *given, grid, settings), new


def test_a_small_budget_is_not_dense():
    g = grid("topk")
    cache, keys, values = history("all frames", g, True)
    q, k, v = draw(99, 3, g)
    out, _ = run(q, k, v, cache, sparsity.Budget(jnp.int32(4), 12), g, settings("topk"))
    assert jnp.abs(out - expected("all frames", q, k, v, keys, values)).max() > 0.05


def test_a_dense_layer_may_use_a_padded_cache():
    g = grid("topk")
    cache, keys, values = history("ring", g, True)
    q, k, v = draw(99, 3, g)
    out, _ = run(q, k, v, cache, None, g, settings("dense"))
    np.testing.assert_allclose(out, expected("ring", q, k, v, keys, values), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("policy", "kernels"), [("light_forcing", "xla"), ("light_forcing", "interpreter"), ("oracle", "xla")])
def test_gradients_pass_the_attention_but_not_the_choice(policy, kernels, monkeypatch):
    interpreted = (partial(kernel, interpret=True) for kernel in (triton.means, triton.scores, triton.choose))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "interpreter", api.Implementation(lambda *call: None, *interpreted))
    g, chosen = grid(policy), dataclasses.replace(settings(policy), selection=kernels)
    cache, keys, values = history("all frames", g, True)
    weights = draw(7, 3, g)[0]

    def loss(qkv, cache, budget):
        return (run(*qkv, cache, sparsity.Budget(budget, 36), g, chosen)[0] * weights).sum()

    def dense(qkv, keys, values):
        return (expected("all frames", *qkv, keys, values) * weights).sum()

    qkv = draw(99, 3, g)
    of_qkv, of_cache = jax.grad(loss, argnums=(0, 1), allow_int=True)(qkv, cache, jnp.int32(36))
    expected_qkv, expected_keys = jax.grad(dense, argnums=(0, 1))(qkv, keys, values)
    for found, true in zip(of_qkv, expected_qkv, strict=True):
        np.testing.assert_allclose(found, true, atol=1e-5)
    filled = of_cache.k[1, :, : 6 * g.padded_frame].reshape(2, 6, g.padded_frame, 2, 8)[:, :, : g.frame_tokens]
    np.testing.assert_allclose(filled, jnp.stack(expected_keys, axis=1), atol=1e-5)
    assert not of_cache.pooled.any() and not of_cache.k[0].any()


def test_cross_attention_reads_every_row():
    q, k, v = draw(3, 1, grid("dense"))
    np.testing.assert_allclose(
        attention.cross_attention(q, k[:, :7], v[:, :7]), softmax_attention(q, k[:, :7], v[:, :7]), atol=1e-6
    )


def test_dense_attention_in_parts_equals_the_whole(monkeypatch):
    q, k, v = draw(3, 1, grid("dense"))
    whole = attention.dense_attention(q, k, v, jnp.int32(11))
    np.testing.assert_allclose(whole, softmax_attention(q, k[:, :11], v[:, :11]), atol=1e-6)
    monkeypatch.setattr(attention, "ROWS", 8)  # four parts, the last one short
    np.testing.assert_allclose(attention.dense_attention(q, k, v, jnp.int32(11)), whole, atol=1e-6)
    weighted = [
        jax.grad(lambda q, f=f: (f(q) * v).sum())(q)
        for f in (partial(attention.dense_attention, k=k, v=v), partial(softmax_attention, k=k, v=v))
    ]
    np.testing.assert_allclose(*weighted, atol=1e-5)


def test_a_named_dense_implementation_runs_or_raises():
    q, k, v = draw(3, 1, grid("dense"))
    with pytest.raises(NotImplementedError, match="implementation='cudnn': needs"):  # no NVIDIA GPU, or not in 32 bits
        attention.dense_attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="'flash' must be one of cudnn, xla, or None"):
        attention.dense_attention(q, k, v, implementation="flash")


@pytest.mark.gpu
def test_cudnn_equals_xla():
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(3, 4, Grid(8, 8, 8, 1)))
    q, k, v = (jnp.tile(x, (1, 1, 1, 8)) for x in (q, k, v))
    for length in (None, jnp.int32(100)):
        found = attention.dense_attention(q, k, v, length, implementation="cudnn").astype(jnp.float32)
        true = softmax_attention(*(x.astype(jnp.float32)[:, : x.shape[1] if x is q else length] for x in (q, k, v)))
        assert jnp.linalg.norm(found - true) / jnp.linalg.norm(true) < 1e-2


def test_wrong_calls_are_refused():
    g = grid("topk")
    cache, *_ = history("first chunk", g, True)
    q, k, v = draw(1, 1, g)
    new = attention.chunk_kv(k, v, g, pool=True)
    with pytest.raises(ValueError, match="q has 29 tokens, expected a multiple of grid.frame_tokens=30"):
        attention.self_attention(q[:, :-1], new, cache, jnp.int32(0), None, None, g, settings("dense"))
    with pytest.raises(ValueError, match="policy 'topk' needs a timeline, received None"):
        attention.self_attention(q, new, cache, jnp.int32(0), None, None, g, settings("topk"))
    with pytest.raises(ValueError, match="policy 'topk' needs a budget, received None"):
        time = sparsity.timeline(cache, 1, g)
        attention.self_attention(q, new, cache, jnp.int32(0), time, None, g, settings("topk"))


@pytest.mark.parametrize("policy, names", [("topk", "hopper, triton, xla, reference"), ("dense", "cudnn, xla")])
def test_the_kernel_named_in_the_settings_is_the_one_that_runs(policy, names):
    g = grid(policy)
    cache, *_ = history("first chunk", g, policy != "dense")
    q, k, v = draw(1, 1, g)
    named = dataclasses.replace(settings(policy), implementation="unheard of")
    with pytest.raises(ValueError, match=f"'unheard of' must be one of {names}, or None"):
        run(q, k, v, cache, sparsity.Budget(jnp.int32(4), 12), g, named)
