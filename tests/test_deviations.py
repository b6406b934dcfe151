"""Where we compute in float32 what the PyTorch originals compute in float64: how far apart, as docs/parity.md says."""

import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import flow, layers, rope


def relative(ours, exact):
    return np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(("timestep", "most"), [(0.0, 1e-12), (625.0, 1e-5), (833.3333, 1e-5), (937.5, 1e-5), (1000.0, 1e-5)])
def test_features_of_a_timestep(timestep, most):
    angle = np.float64(np.float32(timestep)) * 10000.0 ** (-np.arange(128) / 128)
    exact = np.concatenate([np.cos(angle), np.sin(angle)])
    assert relative(layers.sinusoid(jnp.float32(timestep), 256), exact) <= most


@pytest.mark.parametrize(("start", "most"), [(0, 3e-7), (18, 3e-7), (200, 2e-6), (1000, 1e-5)])
def test_rotary_embedding_at_frame(start, most):
    frames, rows, columns, e = 3, 30, 52, 128
    x = np.random.default_rng(0).normal(size=(1, frames * rows * columns, 1, e)).astype(np.float32)
    ours = rope.rotate(jnp.asarray(x), rope.angles(jnp.int32(start), frames, rows, columns, e))
    places = np.stack(np.meshgrid(start + np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(
        -1, 3
    )
    pairs = (22, 21, 21)
    angle = np.concatenate([places[:, i : i + 1] * 10000.0 ** (-np.arange(p) / p) for i, p in enumerate(pairs)], 1)
    turned = (x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    assert relative(ours, np.stack([turned.real, turned.imag], -1).reshape(x.shape)) <= most


def test_clean_latents_from_a_velocity():
    x, v = np.random.default_rng(1).normal(size=(2, 100_000)).astype(np.float32)
    exact = x.astype(np.float64) - 0.9375 * v.astype(np.float64)
    assert relative(flow.velocity_to_x0(jnp.asarray(x), jnp.asarray(v), jnp.float32(0.9375)), exact) <= 1e-7
