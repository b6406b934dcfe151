"""Flow matching: the straight path x = (1 - sigma) x0 + sigma noise, and the shifted noise schedule of Wan2.1.

A network told the timestep t = 1000 sigma predicts the velocity noise - x0. Self-Forcing's scheduler looks sigma up as
the nearest of 1000 grid points; its sampler only ever asks for exact grid points, so here sigma is t / 1000 at
inference, and `nearest_sigma` is for the two places where it is not the same: training at arbitrary t, and t = 0, which
the grid does not contain.

Arithmetic is float32. Self-Forcing converts between velocity and x0 in float64 and rounds to the dtype of the model:
for float32 inputs the two differ by at most 2 units in the last place of the larger operand, for bfloat16 inputs the
rounded results are the same but for about one value in 40,000, which rounds to the neighbour.
"""

import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Float
from lf_jax.config import check

TRAIN_STEPS = 1000  # grid points of the training schedule, and the timestep of pure noise


def shifted(sigma: np.ndarray, shift: float) -> np.ndarray:
    """Sends evenly spaced noise levels towards the noisy end: shift s / (1 + (shift - 1) s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_grid(shift: float, steps: int = TRAIN_STEPS) -> np.ndarray:
    """`steps` falling noise levels from 1 to just above 0, float64 (sigma_min = 0 with one extra step, left out)."""
    return shifted(np.linspace(1, 0, steps + 1)[:-1], shift)


def warp(timesteps: tuple[float | int, ...], shift: float) -> tuple[float, ...]:
    """The timesteps that stand where `timesteps` would in an unshifted schedule (Self-Forcing, `warp_denoising_step`).

    (1000, 750, 500, 250) becomes (1000, 937.5, 833.33, 625) at shift 5.

    Raises:
        ValueError: if a timestep is not a whole number within 0..1000, because it is used as an index.
    """
    check(all(t == int(t) and 0 <= t <= TRAIN_STEPS for t in timesteps), f"{timesteps=} must be whole numbers within 0..1000")
    grid = np.append(sigma_grid(shift), 0.0) * TRAIN_STEPS
    return tuple(float(grid[TRAIN_STEPS - int(t)]) for t in timesteps)


def nearest_sigma(timestep: Float[Array, "*n"], shift: float) -> Float[Array, "*n"]:
    """The noise level of the grid point nearest to `timestep`; the first of two that are equally near."""
    sigmas = jnp.asarray(sigma_grid(shift), jnp.float32)
    return sigmas[jnp.argmin(jnp.abs(sigmas * TRAIN_STEPS - timestep[..., None]), axis=-1)]


def add_noise(x0: Float[Array, "*n"], noise: Float[Array, "*n"], sigma: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """The point of the path at `sigma`, in the dtype of `noise`."""
    sigma = sigma.astype(jnp.float32)
    return ((1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)).astype(noise.dtype)


def velocity_to_x0(x: Float[Array, "*n"], velocity: Float[Array, "*n"], sigma: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """The end of the path, x - sigma velocity, in the dtype of `velocity`."""
    return (x.astype(jnp.float32) - sigma.astype(jnp.float32) * velocity.astype(jnp.float32)).astype(velocity.dtype)


def x0_to_velocity(x: Float[Array, "*n"], x0: Float[Array, "*n"], sigma: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """The inverse of `velocity_to_x0`, (x - x0) / sigma, in the dtype of `x0`. Undefined at sigma = 0."""
    return ((x.astype(jnp.float32) - x0.astype(jnp.float32)) / sigma.astype(jnp.float32)).astype(x0.dtype)


def training_target(x0: Float[Array, "*n"], noise: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """What the network should predict: the velocity, the same at every sigma."""
    return noise - x0


def training_weights(shift: float) -> np.ndarray:
    """The loss weight of every grid point, float64, mean 1: a bell around timestep 500, zero at pure noise."""
    timesteps = sigma_grid(shift) * TRAIN_STEPS
    bell = np.exp(-2 * ((timesteps - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
    raised = bell - bell.min()
    return raised * (TRAIN_STEPS / raised.sum())
