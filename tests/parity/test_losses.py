"""Losses against PyTorch, written from Self-Forcing's formulas: what the networks were given is recorded, not drawn again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_objectives import BATCH, KEY, NEGATIVE, NETWORK, PROMPT, SHORT, TEACHER, Recorder
from tiny_rollout import FRAME, draw

from lf_jax.train.objectives import (
    Autoencoder,
    Distillation,
    OdePairs,
    TeacherForcing,
    autoencoder,
    distillation,
    flow_matching,
    ode_pairs,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch
ANSWER = draw(2, 6, *FRAME, seed=21)


def tensor(x):
    return torch.from_numpy(np.array(x, np.float64))


class Scheduler:
    """Self-Forcing's flow-matching scheduler: its grid, its look-ups and its weights."""

    def __init__(self, shift):
        s = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
        self.sigmas = shift * s / (1 + (shift - 1) * s)
        self.timesteps = 1000 * self.sigmas
        bell = torch.exp(-2 * ((self.timesteps - 500) / 1000) ** 2)
        self.weights = (bell - bell.min()) * (1000 / (bell - bell.min()).sum())

    def at(self, table, timestep):
        index = (self.timesteps - tensor(timestep)[..., None]).abs().argmin(-1)
        return table[index][..., None, None, None]


def test_teacher_forcing_is_the_weighted_flow_loss(monkeypatch):
    seen, scheduler = Recorder(lambda *_: ANSWER), Scheduler(SHORT.rollout.shift)
    monkeypatch.setattr(flow_matching, "causal_pass", seen)
    one = TeacherForcing(weighting="bell", caption_dropout=0.0)
    loss, _ = one.loss({"dit": NETWORK}, {}, BATCH, KEY, SHORT)
    _, _, x, timestep, *_ = seen.arguments
    sigma, x0 = scheduler.at(scheduler.sigmas, timestep), tensor(BATCH["latents"])
    noise = (tensor(x) - (1 - sigma) * x0) / sigma
    error = torch.nn.functional.mse_loss(tensor(ANSWER), noise - x0, reduction="none").mean(dim=(2, 3, 4), keepdim=True)
    want = (error * scheduler.at(scheduler.weights, timestep)).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-4)


@pytest.mark.parametrize("shift", [None, 8.0])
def test_the_generators_loss_and_its_derivative(monkeypatch, shift):
    """DMD as published: guidance as c + 3 (c - u), x0 through a table, the loss as a mean squared distance with a stop."""
    x0, conditional, unconditional, fake = (draw(2, 6, *FRAME, seed=seed) for seed in (31, 32, 33, 34))
    one = Distillation(score_shift=shift)
    mixed = unconditional + one.guidance_scale * (conditional - unconditional)
    teacher = Recorder(lambda *_: mixed)
    monkeypatch.setattr(distillation, "guided", teacher)
    monkeypatch.setattr(distillation, "bidirectional", lambda *_: fake)
    direction = one.direction(TEACHER, NETWORK, PROMPT, NEGATIVE, x0, KEY, SHORT)
    x, timestep = teacher.arguments[4:6]
    scheduler = Scheduler(shift or 5.0)
    sigma = tensor(timestep)[..., None, None, None] / 1000 if shift is None else scheduler.at(scheduler.sigmas, timestep)
    real_c, real_u, fake_x0 = (tensor(x) - sigma * tensor(v) for v in (conditional, unconditional, fake))
    real = real_c + 3.0 * (real_c - real_u)
    video = tensor(x0).requires_grad_()
    normaliser = (video - real).abs().mean(dim=[1, 2, 3, 4], keepdim=True)
    gradient = torch.nan_to_num((fake_x0 - real) / normaliser).detach()
    loss = 0.5 * torch.nn.functional.mse_loss(video, (video - gradient).detach(), reduction="mean")
    loss.backward()
    np.testing.assert_allclose(direction / direction.size, video.grad, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(0.5 * jnp.mean(jnp.square(direction)), loss.item(), rtol=1e-4)


def test_the_critics_loss_with_the_table_of_the_original(monkeypatch):
    """x0 by the table of shift 8, back to a velocity by that of shift 5, where both have the timestep on their grid or not."""
    x0, critic, one = draw(2, 6, *FRAME), Recorder(lambda *_: ANSWER), Distillation(score_shift=8.0)
    monkeypatch.setattr(distillation, "bidirectional", critic)
    loss, gradient = jax.value_and_grad(lambda x0: one.critic_loss({"dit": NETWORK}, PROMPT, x0, KEY, SHORT)[0])(x0)
    _, _, x, timestep, *_ = critic.arguments
    _, _, noise, _ = one.noisy(x0, KEY, SHORT)
    wide, narrow = Scheduler(8.0), Scheduler(5.0)
    x = narrow.at(narrow.sigmas, timestep) * tensor(noise) + (1 - narrow.at(narrow.sigmas, timestep)) * tensor(x0)
    read = x - wide.at(wide.sigmas, timestep) * tensor(ANSWER)
    velocity = (x - read) / narrow.at(narrow.sigmas, timestep)
    want = torch.mean((velocity - (tensor(noise) - tensor(x0))) ** 2)
    np.testing.assert_allclose(loss, want, rtol=1e-3)
    assert float(jnp.abs(gradient).max()) > 0


def test_ode_regression(monkeypatch):
    states, seen = draw(2, 3, 6, *FRAME, seed=22), Recorder(lambda *_: ANSWER)
    monkeypatch.setattr(ode_pairs, "causal_pass", seen)
    loss, _ = OdePairs().loss({"dit": NETWORK}, PROMPT, states, KEY, KEY, SHORT)
    x, timestep = seen.arguments[2:4]
    scheduler = Scheduler(SHORT.rollout.shift)
    steps = torch.cat([scheduler.timesteps, torch.zeros(1)])[1000 - torch.tensor(SHORT.rollout.timesteps).long()]
    index = (steps - tensor(timestep)[..., None]).abs().argmin(-1)
    given = torch.gather(tensor(states), 1, index[:, None, :, None, None, None].expand(-1, -1, -1, *FRAME))[:, 0]
    np.testing.assert_array_equal(x, given)
    predicted = given - scheduler.at(scheduler.sigmas, timestep) * tensor(ANSWER)
    want = torch.nn.functional.mse_loss(predicted, tensor(states[:, -1]), reduction="mean")
    np.testing.assert_allclose(loss, want, rtol=1e-4)


@pytest.mark.parametrize("focus", [0.0, 2.5])
def test_the_autoencoders_terms(monkeypatch, focus):
    video, made, mean, log_variance = (draw(2, 5, 4, 4, 3, seed=seed) for seed in (41, 42, 43, 44))
    seen = Recorder(lambda *_: made)
    monkeypatch.setattr(autoencoder, "posterior", lambda *_: (mean, log_variance))
    monkeypatch.setattr(autoencoder, "reconstruct", seen)
    one = Autoencoder(l1=0.7, l2=0.2, temporal=0.3, edges=0.4, kl=0.1, focus=focus)
    loss, terms = one.loss({"vae": None}, video, KEY)
    a, b, l1 = tensor(video), tensor(made), torch.nn.functional.l1_loss
    saturation = torch.stack([(x.amax(-1) - x.amin(-1)) / 2 for x in (a, b)]).amax(0)
    b = a + (b - a) * (1 + focus * saturation)[..., None]  # errors that much larger
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(
        normal(tensor(mean), torch.exp(0.5 * tensor(log_variance))), normal(torch.zeros(1), torch.ones(1))
    )
    want = {
        "l1": l1(b, a),
        "l2": torch.nn.functional.mse_loss(b, a),
        "temporal": l1(b[:, 1:] - b[:, :-1], a[:, 1:] - a[:, :-1]),
        "edges": l1(b.diff(dim=2), a.diff(dim=2)) + l1(b.diff(dim=3), a.diff(dim=3)),
        "kl": divergence.mean(),
    }
    assert terms.keys() == want.keys()
    for name, term in want.items():
        np.testing.assert_allclose(terms[name], term, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(getattr(one, name) * term for name, term in want.items()), rtol=1e-5)
    spread = (seen.arguments[1] - mean) / jnp.exp(0.5 * log_variance)  # latents are drawn from the distribution
    assert 0.85 < float(spread.std()) < 1.15
