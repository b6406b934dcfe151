"""Rotary embedding against the definition, written here with complex numbers in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import rope


def turned(x, frames, rows, columns):
    """x [t, e] at positions [t] on three axes: e/2 complex numbers, each axis with exponents of its own."""
    pairs = x.shape[-1] // 2
    each = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angle = [np.outer(n, 1e4 ** -(2 * np.arange(p) / (2 * p))) for n, p in zip((frames, rows, columns), each, strict=True)]
    z = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * np.concatenate(angle, axis=1))
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def test_pairs_of_the_released_heads():
    assert rope.axis_pairs(128) == (22, 21, 21)
    assert rope.axis_pairs(6) == (1, 1, 1)


@pytest.mark.parametrize("head_dim", [6, 16, 128])
@pytest.mark.parametrize("start, size", [(0, 2e-6), (17, 4e-6), (1000, 1.5e-4)])  # float32 angles lose digits as frames pass
def test_rotation_equals_the_definition(head_dim, start, size):
    f, h, w = np.meshgrid(start + np.arange(2), np.arange(3), np.arange(4), indexing="ij")
    x = np.random.default_rng(0).standard_normal((24, head_dim))
    got = rope.rotate(jnp.asarray(x, jnp.float32)[:, None], rope.angles(jnp.int32(start), 2, 3, 4, head_dim))
    np.testing.assert_allclose(got[:, 0], turned(x, f.ravel(), h.ravel(), w.ravel()), atol=size)


def test_low_precision_inputs_are_rotated_in_float32():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 1, 16)), jnp.bfloat16)
    angle = rope.angles(jnp.int32(40), 1, 2, 3, 16)
    got = rope.rotate(x, angle)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rope.rotate(x.astype(jnp.float32), angle).astype(jnp.bfloat16))


@pytest.mark.parametrize("by", [0, 1, 9, -4])
def test_shifting_equals_rotating_at_the_new_place(by):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 12, 3, 16)), jnp.float32)
    start, late = (rope.rotate(x, rope.angles(jnp.int32(s), 2, 2, 3, 16)) for s in (5, 5 + by))
    shifted = rope.shift_frames(start, jnp.int32(by))
    np.testing.assert_allclose(shifted, late, atol=5e-6)
    # a mean over tokens of one frame shifts like its tokens: what the pooled sink relies on
    np.testing.assert_allclose(rope.shift_frames(start[:, :6].mean(1, keepdims=True), jnp.int32(by)),
                               late[:, :6].mean(1, keepdims=True), atol=5e-6)  # fmt: skip


def test_scores_depend_on_differences_of_frames_only():
    rng = np.random.default_rng(3)
    q, k = (jnp.asarray(rng.standard_normal((6, 1, 16)), jnp.float32) for _ in range(2))

    def scores(at_q, at_k):
        q_, k_ = (rope.rotate(x, rope.angles(jnp.int32(at), 1, 2, 3, 16)) for x, at in ((q, at_q), (k, at_k)))
        return jnp.einsum("qhe,khe->qk", q_, k_)

    np.testing.assert_allclose(scores(8, 3), scores(25, 20), atol=2e-5)
    assert float(jnp.abs(scores(8, 3) - scores(8, 4)).max()) > 0.1
