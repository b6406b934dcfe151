"""Our sampler tables against diffusers' schedulers, driven by the same made-up network."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from lf_jax import flow, solvers  # noqa: E402

SHAPE = (2, 3, 4, 4, 2)


def network(x, timestep):
    """A smooth velocity that depends on the point and on the timestep, in numpy float64 rounded to float32."""
    x = np.asarray(x, np.float64)
    return (np.sin(2 * x) + 0.3 * x * np.cos(timestep / 300) + 0.1).astype(np.float32)


def ours(schedule, x):
    memory, path = solvers.forget(x), []
    for i in range(schedule.steps):
        at = jax.tree.map(lambda column, i=i: column[i], schedule)
        x, memory = solvers.step(at, x, jnp.asarray(network(x, float(at.timestep))), memory)
        path.append(np.asarray(x))
    return path


def theirs(scheduler, x, timesteps):
    x, path = torch.tensor(np.asarray(x)), []
    for t, told in zip(scheduler.timesteps, timesteps, strict=True):
        x = scheduler.step(torch.tensor(network(x.numpy(), float(told))), t, x).prev_sample
        path.append(x.numpy())
    return path


def start():
    return jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 5.0), (3, 8.0), (10, 5.0), (50, 5.0), (50, 8.0)])
def test_unipc_equals_diffusers_at_wans_noise_levels(steps, shift):
    schedule = solvers.unipc(steps, shift)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])  # diffusers shifts them itself
    np.testing.assert_allclose(schedule.sigma, scheduler.sigmas[:-1], atol=1e-7)
    np.testing.assert_array_equal(schedule.timestep, scheduler.timesteps)  # both cut to whole numbers
    for i, (a, b) in enumerate(zip(ours(schedule, start()), theirs(scheduler, start(), schedule.timestep), strict=True)):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=f"step {i}")


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (4, 5.0), (50, 8.0)])
def test_euler_equals_diffusers_at_the_same_noise_levels(steps, shift):
    schedule = solvers.euler(steps, shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    np.testing.assert_allclose(schedule.sigma, scheduler.sigmas[:-1], atol=1e-7)
    np.testing.assert_allclose(schedule.timestep, scheduler.timesteps, rtol=1e-6)  # neither cuts
    for a, b in zip(ours(schedule, start()), theirs(scheduler, start(), schedule.timestep), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_diffusers_own_levels_are_not_wans():
    """Why the test above hands diffusers its noise levels: left alone it starts at 1 and stops short of 0."""
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(50)
    assert float(scheduler.sigmas[0]) == pytest.approx(1 - 1e-6, abs=1e-7)
    assert float(solvers.unipc(50, 5.0).sigma[0]) == pytest.approx(5 * 0.999 / (1 + 4 * 0.999), abs=1e-7)


@pytest.mark.parametrize("dtype, most", [("float32", 2.0**-22), ("bfloat16", 2.0**-7)])
def test_velocity_conversions_are_near_the_float64_ones_of_the_original(dtype, most):
    rng = np.random.default_rng(1)
    x, v = (torch.tensor(rng.standard_normal(200_000)).to(getattr(torch, dtype)) for _ in range(2))
    sigma = torch.tensor(rng.uniform(0.005, 1, 200_000), dtype=torch.float32)
    want = (x.double() - sigma.double() * v.double()).to(x.dtype)
    got = flow.velocity_to_x0(*(jnp.asarray(a.float().numpy(), dtype) for a in (x, v)), jnp.asarray(sigma.numpy()))
    size = torch.maximum(x.double().abs(), (sigma * v).double().abs()).numpy()
    off = np.abs(np.asarray(got, np.float64) - want.double().numpy())
    assert np.all(off <= most * size)
    if dtype == "bfloat16":
        assert (off > 0).mean() < 1e-4
