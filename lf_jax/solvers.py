"""Samplers as tables: few-step, UniPC and Euler are the same linear step with other coefficients.

With x0 the network's prediction at the current point, every step of every sampler here is

    corrected = correct . (x, before, x0 of the last step, x0 of the step before that, x0)
    next x    = predict . (corrected, x0, x0 of the last step) + renoise * fresh noise

where `before` is the corrected point that the last step started from. The coefficients depend on the noise levels only,
so they are computed on the host in float64, once, and denoising is one `lax.scan` over the rows of a `Schedule`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import config, flow
from lf_jax.arrays import Array, Float, Leaf


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["timestep", "sigma", "correct", "predict", "renoise"],
    meta_fields=["stochastic"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The coefficients of all steps; of one step, without the leading axis, inside a scan. All float32."""

    timestep: Leaf  # [step]: what the network is told
    sigma: Leaf  # [step]: the noise level at which its prediction is read
    correct: Leaf  # [step, 5]
    predict: Leaf  # [step, 3]
    renoise: Leaf  # [step]
    stochastic: bool  # whether any step adds fresh noise

    @property
    def steps(self) -> int:
        return self.timestep.shape[0]


@partial(jax.tree_util.register_dataclass, data_fields=["before", "last", "older"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a multistep solver remembers. All float32, of the shape of the latents; zeros at the start."""

    before: Leaf  # the corrected point that the last step started from
    last: Leaf  # x0 predicted at the last step
    older: Leaf  # x0 predicted at the step before that


def forget(x: Float[Array, "*n"]) -> Memory:
    """The memory before the first step."""
    return Memory(*(jnp.zeros(x.shape, jnp.float32) for _ in range(3)))


def step(
    at: Schedule,
    x: Float[Array, "*n"],
    velocity: Float[Array, "*n"],
    memory: Memory,
    noise: Float[Array, "*n"] | None = None,
) -> tuple[Float[Array, "*n"], Memory]:
    """One step from `x`, float32, where the network predicted `velocity`. `noise` is needed if `at.stochastic`."""
    x0 = flow.velocity_to_x0(x, velocity.astype(jnp.float32), at.sigma)
    x = _combine(at.correct, (x, memory.before, memory.last, memory.older, x0))
    after = _combine(at.predict, (x, x0, memory.last))
    if noise is not None:
        after = after + at.renoise * noise
    return after, Memory(before=x, last=x0, older=memory.last)


def schedule(settings: config.Rollout) -> Schedule:
    """The table of the sampler that `settings` names."""
    if settings.sampler == "few_step":
        timesteps = flow.warp(settings.timesteps, settings.shift) if settings.warp else settings.timesteps
        return few_step(timesteps)
    make = {"unipc": unipc, "euler": euler}[settings.sampler]
    return make(settings.num_inference_steps, settings.shift)


def few_step(timesteps: tuple[float | int, ...]) -> Schedule:
    """Predict x0, put fresh noise of the next level on it, repeat (Self-Forcing; a consistency sampler)."""
    sigmas = np.append(np.asarray(timesteps, np.float64) / flow.TRAIN_STEPS, 0.0)
    predict = [(0.0, 1 - after, 0.0) for after in sigmas[1:]]
    return _schedule(sigmas * flow.TRAIN_STEPS, sigmas, _uncorrected(len(timesteps)), predict, sigmas[1:])


def euler(steps: int, shift: float) -> Schedule:
    """x + (next sigma - sigma) velocity on the levels of `flow.sigma_grid`; timesteps are not rounded."""
    sigmas = np.append(flow.sigma_grid(shift, steps), 0.0)
    predict = [(after / now, 1 - after / now, 0.0) for now, after in zip(sigmas, sigmas[1:], strict=False)]
    return _schedule(sigmas * flow.TRAIN_STEPS, sigmas, _uncorrected(steps), predict)


def unipc(steps: int, shift: float) -> Schedule:
    """UniPC of order 2, B(h) = e^h - 1, predicting x0, with corrector (arXiv 2302.04867; Wan2.1's flow variant).

    Noise levels fall evenly from 0.999 to 0 before the shift, as in Wan2.1 (diffusers starts at 1 and ends at 0.001);
    the first and the last step are of order 1. The network is told timesteps cut to whole numbers, as Wan2.1 and
    diffusers do and as multi-step checkpoints were sampled, while the solver uses the exact levels.
    """
    start = 1 - 1 / flow.TRAIN_STEPS
    sigmas = np.append(flow.shifted(np.linspace(start, 0, steps + 1)[:-1], shift), 0.0)
    orders = [min(2, i + 1, steps - i) for i in range(steps)]
    with np.errstate(divide="ignore"):
        snr = np.log(1 - sigmas) - np.log(sigmas)  # half the log signal-to-noise ratio; infinite at the end
    correct = _uncorrected(1) + [_corrector(sigmas, snr, i, orders[i - 1]) for i in range(1, steps)]
    predict = [_predictor(sigmas, snr, i, order) for i, order in enumerate(orders)]
    return _schedule(np.trunc(sigmas * flow.TRAIN_STEPS), sigmas, correct, predict)


def _predictor(sigmas: np.ndarray, snr: np.ndarray, i: int, order: int) -> tuple[float, ...]:
    """Coefficients of (corrected, x0, last x0) that carry step `i` to level `i + 1`."""
    decay = np.expm1(snr[i] - snr[i + 1])  # e^-h - 1, the B(h) of the paper
    alpha, ratio = 1 - sigmas[i + 1], sigmas[i + 1] / sigmas[i]
    if order == 1:
        return ratio, -alpha * decay, 0.0
    back = (snr[i - 1] - snr[i]) / (snr[i + 1] - snr[i])
    slope = -alpha * decay * 0.5 / back  # of (last x0 - x0); 0.5 is the paper's choice for order 2
    return ratio, -alpha * decay - slope, slope


def _corrector(sigmas: np.ndarray, snr: np.ndarray, i: int, order: int) -> tuple[float, ...]:
    """Coefficients of (x, before, last x0, older x0, x0) that redo the step to level `i` knowing x0 there."""
    h = snr[i] - snr[i - 1]
    decay = np.expm1(-h)
    scale, ratio = -(1 - sigmas[i]) * decay, sigmas[i] / sigmas[i - 1]
    if order == 1:
        return 0.0, ratio, scale * 0.5, 0.0, scale * 0.5
    back = (snr[i - 2] - snr[i - 1]) / h
    first = decay / -h - 1
    second = first / -h - 0.5
    on_older, on_new = np.linalg.solve([[1.0, 1.0], [back, 1.0]], np.array([first, 2 * second]) / decay)
    return 0.0, ratio, scale * (1 - on_older / back - on_new), scale * on_older / back, scale * on_new


def _uncorrected(steps: int) -> list[tuple[float, ...]]:
    return [(1.0, 0.0, 0.0, 0.0, 0.0)] * steps


def _schedule(timesteps: np.ndarray, sigmas: np.ndarray, correct, predict, renoise: np.ndarray | None = None) -> Schedule:
    """Drops the end of the path from `timesteps` and `sigmas`: nothing is predicted there."""
    renoise = np.zeros(len(sigmas) - 1) if renoise is None else renoise
    table = (timesteps[:-1], sigmas[:-1], correct, predict, renoise)
    return Schedule(*(jnp.asarray(np.asarray(column, np.float32)) for column in table), stochastic=bool(np.any(renoise)))


def _combine(weights: Float[Array, " terms"], terms: tuple[Array, ...]) -> Array:
    return sum(weights[i] * term for i, term in enumerate(terms))
