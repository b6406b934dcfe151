"""The noise schedule against numbers taken from the original scheduler, and the conversions against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import flow


@pytest.mark.parametrize(
    "shift, want",
    [(5.0, (1000, 937.5, 833.3333333, 625)), (8.0, (1000, 960, 888.8888889, 727.2727273)), (1.0, (1000, 750, 500, 250))],
)
def test_warped_steps_are_the_released_ones(shift, want):
    assert flow.warp((1000, 750, 500, 250), shift) == pytest.approx(want, abs=1e-6)


def test_warp_maps_zero_to_zero_and_refuses_what_is_no_index():
    assert flow.warp((1000, 0), 5.0) == (1000, 0)
    for wrong in ((999.5,), (1001,), (-1,)):
        with pytest.raises(ValueError, match="timesteps="):
            flow.warp(wrong, 5.0)


@pytest.mark.parametrize("shift, lowest", [(5.0, 0.0049801), (8.0, 0.0079444)])
def test_grid_falls_from_one_to_the_lowest_level(shift, lowest):
    grid = flow.sigma_grid(shift)
    assert len(grid) == 1000 and grid[0] == 1.0 and np.all(np.diff(grid) < 0)
    assert grid[-1] == pytest.approx(lowest, abs=1e-7)


def test_nearest_sigma_is_exact_on_the_grid_and_never_zero():
    grid = flow.sigma_grid(5.0)
    on = jnp.asarray(grid * 1000, jnp.float32)
    np.testing.assert_allclose(flow.nearest_sigma(on, 5.0), grid, rtol=1e-6)
    assert float(flow.nearest_sigma(jnp.float32(0), 5.0)) == pytest.approx(0.0049801, abs=1e-7)  # the context of training
    off = np.array([13.0, 333.3, 999.0])
    want = [grid[np.abs(grid * 1000 - t).argmin()] for t in off]
    np.testing.assert_allclose(flow.nearest_sigma(jnp.asarray(off, jnp.float32), 5.0), want, rtol=1e-6)


def test_training_weights_have_mean_one_and_the_original_values():
    weights = flow.training_weights(5.0)
    assert weights[0] == 0
    assert weights[500] == pytest.approx(1.0249, abs=1e-4) and weights[-1] == pytest.approx(0.0319, abs=1e-4)
    assert weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_path_and_conversions(dtype):
    rng = np.random.default_rng(0)
    x0, noise = (jnp.asarray(rng.standard_normal((2, 3, 4)), dtype) for _ in range(2))
    sigma = jnp.asarray([0.25, 0.9375, 1.0], jnp.float32)[:, None]  # one a frame
    x = flow.add_noise(x0, noise, sigma)
    velocity = flow.training_target(x0, noise)
    assert x.dtype == velocity.dtype == dtype
    size = 1e-6 if dtype == jnp.float32 else 0.06
    s = np.asarray(sigma, np.float64)
    np.testing.assert_allclose(
        x.astype(jnp.float32), (1 - s) * np.asarray(x0, np.float64) + s * np.asarray(noise, np.float64), atol=size
    )
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (flow.velocity_to_x0(x, velocity, sigma), x0)), atol=size)
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (flow.x0_to_velocity(x, x0, sigma), velocity)), atol=4 * size)
    assert flow.velocity_to_x0(x, velocity, sigma).dtype == flow.x0_to_velocity(x, x0, sigma).dtype == dtype


def test_low_precision_inputs_are_combined_in_float32():
    """In bfloat16 arithmetic 1 - 0.00498 rounds to 0.996; the original computes with a float32 sigma."""
    x0, sigma = jnp.full((1,), 256.0, jnp.bfloat16), jnp.float32(0.0049801)[None]
    assert float(flow.add_noise(x0, jnp.zeros((1,), jnp.float32), sigma)[0]) == pytest.approx(254.725, abs=1e-3)
