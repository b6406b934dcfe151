"""Distillation: teacher and critic, the direction between them, the generator's gradient, and whose turn it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_objectives import BATCH, KEY, NEGATIVE, NETWORK, PROMPT, SHORT, TEACHER, Recorder, learns, level, noise_in
from tiny_rollout import FRAME, MODEL, SPARSE, change, draw, make_model, quick

from lf_jax import cache as kv
from lf_jax import flow, presets
from lf_jax.chunk import commit_chunk
from lf_jax.dit import model as dit
from lf_jax.rollout import initial_state
from lf_jax.tokens import Grid
from lf_jax.train.objectives import Distillation, Flow, distillation, ode_pairs
from lf_jax.train.objectives.bidirectional import bidirectional, guided

TRAINED, FROZEN = {"generator": {"dit": NETWORK}, "critic": {"dit": make_model(KEY)}}, {"teacher": TEACHER}


def fake_scores(monkeypatch, real, fake):
    """Puts velocities of (x, timestep) in the place of teacher and critic."""
    teacher, critic = Recorder(lambda m, p, n, scale, x, t, c: real(x, t)), Recorder(lambda m, p, x, t, *_: fake(x, t))
    monkeypatch.setattr(distillation, "guided", teacher)
    monkeypatch.setattr(distillation, "bidirectional", critic)
    return teacher, critic


def test_a_bidirectional_pass_is_one_chunk_and_guidance_mixes_two():
    x, times = BATCH["latents"], jnp.full((2, 6), 400.0)
    sparse = change(SHORT, sparsity=SPARSE, cache=dict(window=4))
    run = quick(bidirectional, static_argnames="config")
    c, u = (run(TEACHER, prompt, x, times, sparse) for prompt in (PROMPT, NEGATIVE))
    whole = change(SHORT, rollout=dict(chunk_frames=6))
    nothing, text = kv.empty(MODEL, Grid.of(whole), whole.cache, False, 2, 0), dit.text_cache(TEACHER, PROMPT)
    forward = quick(dit.forward, static_argnames=("grid", "sparsity"))
    want, _ = forward(TEACHER, x, times, text, nothing, None, Grid.of(whole), whole.sparsity)
    np.testing.assert_allclose(c, want, atol=1e-5)
    got = quick(guided, static_argnames=("config", "scale"))(TEACHER, PROMPT, NEGATIVE, 3.0, x, times, sparse)
    np.testing.assert_allclose(got, u + 3 * (c - u), atol=1e-5)
    assert float(jnp.abs(got - c).max()) > 1e-3


def test_a_teacher_may_be_larger_than_the_generator():
    large = dataclasses.replace(MODEL, dim=32, heads=4, layers=3)
    teacher, times = jax.eval_shape(lambda: dit.WanDiT(large, rngs=nnx.Rngs(0))), jnp.zeros((2, 6))
    assert jax.eval_shape(lambda m: bidirectional(m, PROMPT, BATCH["latents"], times, SHORT), teacher).shape == (2, 6, *FRAME)


def test_generator_every_fifth_step_before_the_critic():
    one = Distillation()
    assert [one.updates(step) for step in range(6)] == [("generator", "critic")] + [("critic",)] * 4 + [("generator", "critic")]
    assert Distillation(critic_updates=1).updates(3) == ("generator", "critic")
    assert Flow().updates(3) == ("model",)


def test_exit_steps_are_uniform_and_shared_or_not():
    config, keys = change(SHORT, rollout=dict(timesteps=(1000.0, 750.0, 500.0, 250.0))), jax.random.split(KEY, 4000)
    kinds = Distillation(), Distillation(same_exit=False)
    shared, own = (np.asarray(jax.vmap(lambda key, one=one: one.exits(key, config))(keys)) for one in kinds)
    assert shared.shape == own.shape == (4000, 2) and (shared[:, 0] == shared[:, 1]).all()
    for drawn in (shared[:, 0], own[:, 0], own[:, 1]):
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, 0.25, atol=0.03)
    assert abs((own[:, 0] == own[:, 1]).mean() - 0.25) < 0.03


def test_timesteps_of_teacher_and_critic():
    """Uniform steps, shifted, clamped; noise at that level, read at the level of the chosen table."""
    x0 = draw(5000, 1, 1, 2, 1)
    timestep, read, fresh, x = map(np.asarray, Distillation().noisy(x0, KEY, SHORT))
    assert timestep.min() == 20 and timestep.max() == 980
    s = timestep / 1000 / (5 - 4 * timestep / 1000)  # the shift undone
    inner = s[(timestep > 20) & (timestep < 980)]
    np.testing.assert_allclose(np.histogram(inner, 9, (0.0041, 0.9074))[0] / 5000, 0.1004, atol=0.02)
    sigma = level(timestep[:, None])
    np.testing.assert_allclose(read, sigma, rtol=1e-6)
    np.testing.assert_allclose(x, (1 - sigma) * x0 + sigma * fresh, atol=1e-5)
    same, trap, _, again = map(np.asarray, Distillation(score_shift=8.0).noisy(x0, KEY, SHORT))
    np.testing.assert_array_equal(timestep, same)
    np.testing.assert_array_equal(x, again)  # the noise is put on at the same levels
    ratio = (trap / read)[:, 0, 0, 0, 0]
    np.testing.assert_allclose(ratio[timestep == 20], 1.175, atol=1e-3)
    assert np.abs(ratio[timestep > 200] - 1).max() < 0.015


def test_direction_and_what_is_not_finite(monkeypatch):
    x0 = draw(2, 6, *FRAME)
    velocities = draw(2, 2, 6, *FRAME, seed=12).at[0, 1, 0, 0, 0, 0].set(jnp.nan)
    teacher, _ = fake_scores(monkeypatch, lambda x, t: velocities[0], lambda x, t: velocities[1])
    one = Distillation(guidance_scale=7.0)
    got = one.direction(TEACHER, NETWORK, PROMPT, NEGATIVE, x0, KEY, SHORT)
    _, _, _, scale, x, timestep, _ = teacher.arguments
    real, fake = (np.asarray(x - level(timestep) * v)[0] for v in velocities)
    np.testing.assert_allclose(got[0], (fake - real) / np.abs(np.asarray(x0[0]) - real).mean(), rtol=1e-4, atol=1e-5)
    assert scale == 7.0 and (got[1] == 0).all()  # a mean with one nan in it moves nothing
    derivative = jax.grad(lambda x0: one.direction(TEACHER, NETWORK, PROMPT, NEGATIVE, x0, KEY, SHORT)[0].sum())(x0)
    assert (derivative == 0).all()  # the direction is a constant of the loss


def test_direction_descends_the_divergence(monkeypatch):
    """Of Gaussians, whose beliefs are known: the mean direction is the divergence's finite difference, but for a factor
    (sigma / (1 - sigma))^2."""
    mean, spread = {"real": 0.3, "fake": -0.5}, {"real": 0.7, "fake": 1.2}

    def velocity(who):
        def of(x, timestep):
            sigma = level(timestep)
            gain = (1 - sigma) * spread[who] ** 2 / ((1 - sigma) ** 2 * spread[who] ** 2 + sigma**2)
            return (x - (mean[who] + gain * (x - (1 - sigma) * mean[who]))) / sigma

        return of

    teacher, _ = fake_scores(monkeypatch, velocity("real"), velocity("fake"))
    one = Distillation(min_timestep=600.0, max_timestep=600.0)
    x0 = mean["fake"] + spread["fake"] * draw(2, 50, 8, 5, 8)
    direction = one.direction(TEACHER, NETWORK, PROMPT, NEGATIVE, x0, KEY, SHORT)
    x, timestep = teacher.arguments[4:6]
    scale = jnp.abs(x0 - (x - 0.6 * velocity("real")(x, timestep))).mean((1, 2, 3, 4), keepdims=True)

    def divergence(shift):  # of the generator's noisy Gaussian, moved by `shift`, from the teacher's
        p, q = (0.16 * spread[who] ** 2 + 0.36 for who in ("fake", "real"))
        apart = 0.4 * (mean["fake"] + shift - mean["real"])
        return 0.5 * (np.log(q / p) + (p + apart**2) / q - 1)

    slope = (divergence(1e-4) - divergence(-1e-4)) / 2e-4
    np.testing.assert_allclose((direction * scale).mean() * 0.4**2 / 0.6**2, slope, rtol=0.05)


def test_critic_loss(monkeypatch):
    """Flow matching on the generator's video; with another table the velocity that counts is that of the x0 read."""
    x0, answer = draw(2, 6, *FRAME), draw(2, 6, *FRAME, seed=13)
    _, critic = fake_scores(monkeypatch, None, lambda x, t: answer)
    for shift in (None, 8.0):
        loss, _ = Distillation(score_shift=shift).critic_loss({"dit": NETWORK}, PROMPT, x0, KEY, SHORT)
        _, _, x, timestep, *_ = critic.arguments
        sigma = level(timestep)
        read = sigma if shift is None else np.asarray(flow.nearest_sigma(timestep, shift))[..., None, None, None]
        want = ((np.asarray(answer) * read / sigma - (noise_in(x, x0, sigma) - np.asarray(x0))) ** 2).mean()
        np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_generator_gradient_against_finite_differences(monkeypatch):
    """The DMD gradient of a toy, along random directions of its parameters; what the rollout holds constant is held."""
    held, direction_of = {}, Distillation.direction

    def direction(self, *arguments):
        held["direction"] = direction_of(self, *arguments)
        return held["direction"]

    monkeypatch.setattr(Distillation, "direction", direction)
    one = Distillation()

    @quick
    def gradients(trained, frozen):
        return *one.gradients("generator", trained, frozen, BATCH, KEY, SHORT), held["direction"]

    gradient, metrics, direction = gradients(TRAINED, FROZEN)
    np.testing.assert_allclose(metrics["loss"], 0.5 * np.square(direction).mean(), rtol=1e-5)
    of_videos, of_exits, _ = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    keys, exits = jax.random.split(of_videos, 2), one.exits(of_exits, SHORT)

    @quick
    def loss(moved):
        inputs, _ = distillation.self_rollout(NETWORK, PROMPT, keys, exits, SHORT, 6)
        return jnp.sum(direction * exit_steps(moved, inputs, keys, exits)) / direction.size

    for seed in (0, 1, 2):
        along = jax.tree.map(lambda leaf, seed=seed: draw(*leaf.shape, seed=seed), NETWORK)
        slope = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient["dit"], along)), strict=True))
        plus, minus = (loss(jax.tree.map(lambda p, a, e=e: p + e * a, NETWORK, along)) for e in (3e-4, -3e-4))
        np.testing.assert_allclose((plus - minus) / 6e-4, slope, rtol=1e-2, atol=1e-3)


def exit_steps(moved, inputs, keys, exits):
    """x0 of every chunk at its exit step by `moved`, after a past committed by NETWORK."""
    cache, grid, video = initial_state(SHORT, 2, 6, keys).cache, Grid.of(SHORT), []
    old, new = dit.text_cache(NETWORK, PROMPT), dit.text_cache(moved, PROMPT)
    levels = jnp.asarray(ode_pairs.student_levels(SHORT))[exits]
    for chunk in range(2):
        x, sigma = inputs[:, 3 * chunk : 3 * chunk + 3], levels[chunk]
        times = jnp.full((2, 3), 1000 * sigma)
        here, past = (
            x - sigma * dit.forward(model, x, times, text, cache, None, grid, SHORT.sparsity)[0]
            for model, text in ((moved, new), (NETWORK, old))
        )
        video.append(here)
        cache = commit_chunk(NETWORK, old, past, cache, None, SHORT, 0.0)
    return jnp.concatenate(video, axis=1)


def test_the_generator_reaches_what_the_teacher_knows(monkeypatch):
    """A teacher that believes in one video and a critic that sees the generator's own: descent brings them together."""
    target, now, rollout = 0.5 * draw(2, 6, *FRAME, seed=14), {}, distillation.self_rollout

    def remember(*arguments):
        now["run"] = rollout(*arguments)
        return now["run"]

    monkeypatch.setattr(distillation, "self_rollout", remember)
    fake_scores(monkeypatch, lambda x, t: (x - target) / 0.5, lambda x, t: (x - now["run"].latents) / 0.5)
    one = Distillation(min_timestep=500.0, max_timestep=500.0)

    @quick
    def step(generator):
        gradient, _ = one.gradients("generator", TRAINED | {"generator": generator}, FROZEN, BATCH, KEY, SHORT)
        moved = jax.tree.map(lambda p, g: p - 1.0 * g, generator, gradient)
        return moved, jnp.abs(now["run"].latents - target).mean()

    generator, apart = TRAINED["generator"], []
    for _ in range(8):
        generator, distance = step(generator)
        apart.append(float(distance))
    assert apart[-1] < 0.95 * apart[0], apart


def test_the_critic_learns():
    learns(Distillation(same_exit=False), "critic", TRAINED, FROZEN, BATCH, SHORT, 0.03)


def test_distillation_starts_from_given_networks():
    encoder = make_model()  # any module will do
    given = {("generator", "dit"): NETWORK, ("teacher", "dit"): TEACHER, ("generator", "text"): encoder}
    trained, frozen = Distillation().build(SHORT, lambda *name: given.get(name), KEY)
    assert trained["generator"]["dit"] is NETWORK and frozen == {"teacher": TEACHER, "text": encoder}
    for mine, theirs in zip(*map(jax.tree.leaves, (trained["critic"]["dit"], TEACHER)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()  # either may be donated
    for role in ("generator", "teacher"):
        left = {name: module for name, module in given.items() if name[0] != role}
        with pytest.raises(ValueError, match=f"expected a model for '{role}'"):
            Distillation().build(SHORT, lambda *name, left=left: left.get(name), KEY)


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_one_step_at_full_size_traces(name):
    """1.3B, 21 latent frames, sparse generator, float32 masters under bfloat16 compute; shapes only."""
    config = presets.load("light_forcing_1_3b")

    def masters():
        model = dit.WanDiT(config.model, rngs=nnx.Rngs(0))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)

    network, one = jax.eval_shape(masters), Distillation(remat=True)
    batch = {key: jax.ShapeDtypeStruct((1, 512, 4096), jnp.bfloat16) for key in ("text", "negative")}
    trained = {"generator": {"dit": network}, "critic": {"dit": network}}
    gradient, metrics = jax.eval_shape(
        lambda *inputs: one.gradients(name, *inputs, config), trained, {"teacher": network}, batch, KEY
    )
    assert jax.tree.structure(gradient["dit"]) == jax.tree.structure(network) and metrics["loss"].shape == ()
    for mine, theirs in zip(*map(jax.tree.leaves, (gradient["dit"], network)), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, jnp.float32)
