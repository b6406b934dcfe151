"""The sampler tables: what they say, that one scan runs them, and how fast they converge. Parity: tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import config, solvers


def run(schedule, x, network, noises=None):
    """All steps as one scan, as the rollout does it."""

    def body(carry, xs):
        at, noise = xs
        x, memory = carry
        return solvers.step(at, x, network(x, at.sigma), memory, noise), None

    return jax.jit(lambda x: jax.lax.scan(body, (x, solvers.forget(x)), (schedule, noises))[0][0])(x)


def test_few_step_is_predict_then_renoise():
    schedule = solvers.schedule(config.Rollout())
    np.testing.assert_allclose(schedule.timestep, [1000, 937.5, 833.33333, 625])
    rng = np.random.default_rng(0)
    x, noises = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5,), (4, 5)))

    def network(x, sigma):
        return jnp.sin(x) * sigma

    want, sigmas = np.asarray(x, np.float64), [1.0, 0.9375, 5 / 6, 0.625]
    for i, sigma in enumerate(sigmas):
        want = want - sigma * np.sin(want) * sigma
        if i < 3:
            want = (1 - sigmas[i + 1]) * want + sigmas[i + 1] * np.asarray(noises[i])
    np.testing.assert_allclose(run(schedule, x, network, noises), want, atol=1e-6)
    assert schedule.stochastic and float(schedule.renoise[-1]) == 0  # the last x0 is the result


def test_unwarped_steps_are_used_as_they_are():
    schedule = solvers.schedule(config.Rollout(warp=False, timesteps=(999.0, 500.0)))
    np.testing.assert_allclose(schedule.timestep, [999, 500])
    np.testing.assert_allclose(schedule.sigma, [0.999, 0.5])


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_constant_clean_point_is_reached_exactly(sampler, steps):
    """Where every prediction is the same x0, any solver must end there."""
    schedule = solvers.schedule(config.Rollout(sampler=sampler, num_inference_steps=steps))
    assert schedule.steps == steps and not schedule.stochastic
    clean, x = jnp.asarray([0.3, -2.0, 5.0]), jnp.asarray([1.0, 2.0, -1.0])
    np.testing.assert_allclose(run(schedule, x, lambda x, sigma: (x - clean) / sigma), clean, atol=2e-6)


def test_unipc_converges_faster_than_euler():
    """x0(x) = a x along the path has the exact solution x(sigma) ~ sigma^(1-a): compare both solvers with it."""
    a, shift = 0.5, 1.0

    def error(sampler, steps):
        schedule = solvers.schedule(config.Rollout(sampler=sampler, num_inference_steps=steps, shift=shift))
        sigmas = np.append(schedule.sigma, 0.0)
        x, memory = jnp.ones((1,)), solvers.forget(jnp.ones((1,)))
        for i in range(steps // 2):  # stop halfway: at sigma = 0 the solution has no derivative
            at = jax.tree.map(lambda column, i=i: column[i], schedule)
            x, memory = solvers.step(at, x, (1 - a) * x / at.sigma, memory)
        return abs(float(x[0]) - (sigmas[steps // 2] / sigmas[0]) ** (1 - a))

    assert error("unipc", 16) < 0.05 * error("euler", 16)
    # without the corrector of the next step the result is the predictor's, of order 2: half the step, about a quarter
    assert error("unipc", 16) / error("unipc", 32) > 3
    assert 1.6 < error("euler", 16) / error("euler", 32) < 2.4


def test_unipc_timesteps_are_cut_and_euler_ones_are_not():
    unipc, euler = solvers.unipc(50, 5.0), solvers.euler(50, 5.0)
    assert float(unipc.timestep[0]) == 999 and np.all(np.asarray(unipc.timestep) % 1 == 0)
    assert float(unipc.sigma[1]) * 1000 % 1 != 0
    np.testing.assert_allclose(euler.timestep, euler.sigma * 1000, rtol=1e-6)
    assert float(euler.timestep[0]) == 1000 and np.any(np.asarray(euler.timestep) % 1 != 0)
