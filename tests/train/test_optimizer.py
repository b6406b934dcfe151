"""AdamW against a computation in numpy, and the schedules at their corners."""

import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax.train import optimizer
from lf_jax.train.config import Optimizer

RNG = np.random.default_rng(0)
PARAMETERS = {"dit.blocks.q.kernel": RNG.normal(size=(2, 3, 4)), "dit.norm.scale": RNG.normal(size=5)}
GRADIENTS = [{name: 3 * RNG.normal(size=x.shape) for name, x in PARAMETERS.items()} for _ in range(4)]


@pytest.mark.parametrize("clip", [None, 2.0, 1e6])
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.95)])
def test_adamw_is_the_published_one(clip, betas):
    settings = Optimizer(learning_rate=1e-2, betas=betas, weight_decay=0.1, clip=clip)
    rule, ours = optimizer.direction(settings), {name: jnp.asarray(x, jnp.float32) for name, x in PARAMETERS.items()}
    moments, theirs = rule.init(ours), dict(PARAMETERS)
    first, second = ({name: np.zeros_like(x) for name, x in PARAMETERS.items()} for _ in range(2))
    for count, gradients in enumerate(GRADIENTS, start=1):
        change, moments = rule.update({name: jnp.asarray(g, jnp.float32) for name, g in gradients.items()}, moments, ours)
        ours = {name: ours[name] - settings.learning_rate * change[name] for name in ours}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = 1.0 if clip is None else min(1.0, clip / norm)
        for name, gradient in gradients.items():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * factor * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * (factor * gradient) ** 2
            step = first[name] / (1 - betas[0] ** count) / (np.sqrt(second[name] / (1 - betas[1] ** count)) + settings.eps)
            decay = settings.weight_decay if name.endswith("kernel") else 0.0
            theirs[name] = theirs[name] - settings.learning_rate * (step + decay * theirs[name])
    for name in PARAMETERS:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6)


def test_norms_and_biases_do_not_decay():
    names = ["dit.blocks.self_attention.q.kernel", "text.token_embedding", "dit.blocks.self_attention.q.a"]
    plain = ["dit.head.linear.bias", "dit.blocks.modulation", "text.norm.scale", "text.blocks.position_bias"]
    assert optimizer.decayed(dict.fromkeys([*names, *plain])) == dict.fromkeys(names, True) | dict.fromkeys(plain, False)


@pytest.mark.parametrize(
    "settings, expected",  # at the steps 0, 1, 4 (the end of the warmup), 7 (halfway), 10 (the end) and later
    [
        (Optimizer(learning_rate=2.0), [2, 2, 2, 2, 2, 2]),
        (Optimizer(learning_rate=2.0, warmup=4), [0.5, 1, 2, 2, 2, 2]),
        (Optimizer(learning_rate=2.0, warmup=4, decay="linear", final=0.1), [0.5, 1, 2, 1.1, 0.2, 0.2]),
        (Optimizer(learning_rate=2.0, warmup=4, decay="cosine"), [0.5, 1, 2, 1, 0, 0]),
    ],
)
def test_learning_rates_rise_and_fall(settings, expected):
    found = [float(optimizer.learning_rate(settings, jnp.int32(step), 10)) for step in (0, 1, 4, 7, 10, 12)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_weights_are_averaged_from_the_start_step_on():
    settings = Optimizer(ema=0.75, ema_start=3)
    average, weights = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([5.0, 4.0])}
    before, after = (optimizer.averaged(settings, average, weights, jnp.int32(step))["w"] for step in (2, 3))
    assert before.tolist() == [5.0, 4.0]
    assert after.tolist() == [2.0, 2.5]
    assert optimizer.averaged(Optimizer(), None, weights, jnp.int32(3)) is None
