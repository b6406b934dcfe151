"""What tests of objectives share: two small networks, a batch, and stand-ins for their passes."""

import jax
import numpy as np
from tiny_rollout import FRAME, MODEL, change, draw, make_model, quick

SHORT = change(video=dict(num_frames=21))  # 6 latent frames, 2 chunks
NETWORK, TEACHER = make_model(), make_model(jax.random.key(1))
KEY = jax.random.key(0)
PROMPT, NEGATIVE = draw(2, 4, MODEL.text_dim, seed=1), draw(2, 4, MODEL.text_dim, seed=2)
BATCH = {"latents": draw(2, 6, *FRAME), "text": PROMPT, "negative": NEGATIVE}


class Recorder:
    """Stands in for a network's pass: answers with `answer` of its arguments, and keeps them."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, *arguments, **options):
        self.arguments = arguments
        return self.answer(*arguments)


def level(timestep):
    """Noise levels of timesteps [b, f], in float64, as they stand beside latents."""
    return np.asarray(timestep, np.float64)[..., None, None, None] / 1000


def noise_in(x, x0, sigma):
    """The noise that was put on x0 to make x."""
    return (np.asarray(x) - (1 - sigma) * np.asarray(x0)) / sigma


def learns(one, name, trained, frozen, batch, config, rate, steps=4):
    """A few steps of plain descent on one batch and one draw lower the loss; returns the last gradient."""

    @quick
    def step(network):
        gradient, metrics = one.gradients(name, trained | {name: network}, frozen, batch, KEY, config)
        return jax.tree.map(lambda p, g: p - rate * g, network, gradient), gradient, metrics["loss"]

    network, losses = trained[name], []
    for _ in range(steps):
        network, gradient, loss = step(network)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0], losses
    return gradient
