"""Objectives: what goes into their losses, which networks take part, and that they can be learned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_objectives import BATCH, KEY, NEGATIVE, NETWORK, PROMPT, SHORT, TEACHER, Recorder, learns, level, noise_in
from tiny_rollout import CONFIG, FRAME, change, draw, quick

from lf_jax import config as settings
from lf_jax import flow, noise, text, vae
from lf_jax.dit import model as dit
from lf_jax.rollout import initial_state, rollout
from lf_jax.train.objectives import (
    Autoencoder,
    Distillation,
    Flow,
    OdePairs,
    TeacherForcing,
    autoencoder,
    flow_matching,
    latent_statistics,
    objective,
    ode_pairs,
)
from lf_jax.train.objectives.bidirectional import guided, random_levels

PART = settings.Text(vocab=16, dim=8, ffn_dim=8, heads=1, head_dim=8, layers=1, length=6, dtype="float32")
VAE = settings.Vae(  # 2 x 2 pixels and 2 frames for one
    channels=4, base=4, multipliers=(1, 1), res_blocks=1, temporal=(True,), mean=(1.0,) * 4, std=(2.0,) * 4, dtype="float32"
)
VIDEO = jnp.tanh(draw(1, 5, 8, 8, 3))
ENCODE = quick(vae.encode)


def bell(sigma, shift):
    """Self-Forcing's weight, of one level: a bell around timestep 500 without its foot, mean 1 over the grid."""
    s = np.linspace(1, 0, 1001)[:-1]
    grid = 1000 * shift * s / (1 + (shift - 1) * s)
    raised = np.exp(-2 * ((grid - 500) / 1000) ** 2) - np.exp(-2 * ((grid - 500) / 1000) ** 2).min()
    return np.interp(1000 * sigma, grid[::-1], raised[::-1]) / raised.mean()


@pytest.mark.parametrize("weighting", ["uniform", "bell"])
@pytest.mark.parametrize("kind", [Flow, TeacherForcing])
def test_flow_matching_loss(monkeypatch, kind, weighting):
    """The loss by hand from what the network was given, whatever the draws: levels, noise, target, weights."""
    answer = draw(2, 6, *FRAME, seed=11)
    seen = Recorder(lambda *_: answer)
    monkeypatch.setattr(flow_matching, "bidirectional" if kind is Flow else "causal_pass", seen)
    trained = {"model": {"dit": NETWORK}}
    one = kind(weighting=weighting, caption_dropout=0.0)
    _, metrics = one.gradients("model", trained, {}, BATCH, KEY, SHORT)
    _, prompt, x, timestep, *rest = seen.arguments
    sigma, x0 = level(timestep), np.asarray(BATCH["latents"])
    assert len(np.unique(np.asarray(timestep).ravel())) == (2 if kind is Flow else 4)  # one a video, or one a chunk
    np.testing.assert_array_equal(timestep[:, :1], timestep[:, 1:2])
    fresh = noise_in(x, x0, sigma)
    assert 0.9 < fresh.std() < 1.1 and abs(fresh.mean()) < 0.1
    error = ((np.asarray(answer) - (fresh - x0)) ** 2).mean((2, 3, 4))
    weight = bell(sigma[..., 0, 0, 0], SHORT.rollout.shift) if weighting == "bell" else 1.0
    np.testing.assert_allclose(metrics["loss"], (weight * error).mean(), rtol=1e-4)
    np.testing.assert_array_equal(prompt, PROMPT)
    if kind is TeacherForcing:
        np.testing.assert_array_equal(rest[2], x0)  # the context is clean


def test_a_clean_first_frame_has_timestep_zero_and_no_loss(monkeypatch):
    answer = draw(2, 6, *FRAME, seed=11)
    seen = Recorder(lambda *_: answer)
    monkeypatch.setattr(flow_matching, "bidirectional", seen)
    one = Flow(given=1.0, shift=8.0, caption_dropout=0.0)
    _, metrics = one.gradients("model", {"model": {"dit": NETWORK}}, {}, BATCH, KEY, SHORT)
    _, _, x, timestep, *_ = seen.arguments
    x0 = np.asarray(BATCH["latents"])
    assert (timestep[:, 0] == 0).all() and (timestep[:, 1:] > 0).all()
    np.testing.assert_allclose(x[:, 0], x0[:, 0], atol=1e-6)
    fresh = noise_in(x[:, 1:], x0[:, 1:], level(timestep[:, 1:]))
    error = ((np.asarray(answer)[:, 1:] - (fresh - x0[:, 1:])) ** 2).mean((2, 3, 4))
    np.testing.assert_allclose(metrics["loss"], error.sum() / timestep.size, rtol=1e-4)
    with pytest.raises(ValueError, match="a causal one has clean chunks"):
        TeacherForcing(given=0.5)


def test_levels_are_uniform_on_the_shifted_grid():
    sigma, weight = random_levels(KEY, (20000,), 5.0)
    s = np.asarray(sigma) / (5 - 4 * np.asarray(sigma))  # undo the shift
    np.testing.assert_allclose(np.histogram(s, 10, (0, 1))[0] / 20000, 0.1, atol=0.01)
    assert sigma.max() == 1.0 and sigma.min() > 0 and (weight == 1).all()


def test_captions_are_dropped_for_the_negative_prompt():
    one, config = Flow(caption_dropout=0.3), SHORT
    keys = jax.random.split(KEY, 400)
    found = jax.vmap(lambda key: one.captions(None, BATCH, key, config))(keys)
    dropped = (found == NEGATIVE).all((2, 3))
    assert (dropped | (found == PROMPT).all((2, 3))).all()
    assert abs(dropped.mean() - 0.3) < 0.05 and (dropped[:, 0] != dropped[:, 1]).any()
    with pytest.raises(ValueError, match="expected 'negative' too"):
        one.captions(None, {"text": PROMPT}, KEY, config)


def test_prompts_may_be_token_ids_and_the_empty_prompt_is_encoded():
    encoder, encode = text.UMT5(PART, rngs=nnx.Rngs(0)), quick(text.encode)
    ids, lengths = jnp.array([[5, 6, 1, 0], [7, 1, 0, 0]]), jnp.array([3, 2])
    batch = {"ids": ids, "lengths": lengths}
    prompt = objective.prompt_embeddings(encoder, batch)
    np.testing.assert_allclose(prompt, encode(encoder, ids, lengths), atol=1e-6)
    empty = objective.negative_embeddings(encoder, batch, prompt, SHORT)
    want = encode(encoder, jnp.array([[1, 0, 0, 0]]), jnp.array([1]))
    np.testing.assert_allclose(empty, jnp.tile(want, (2, 1, 1)), atol=1e-6)
    with pytest.raises(ValueError, match="'blurry'"):
        objective.negative_embeddings(encoder, batch, prompt, change(SHORT, video=dict(negative_prompt="blurry")))
    with pytest.raises(ValueError, match="no text encoder"):
        objective.prompt_embeddings(None, batch)


def test_flow_and_the_text_encoder_learn_together():
    one = Flow(train_text=True, caption_dropout=0.5)
    config = dataclasses.replace(SHORT, text=PART)
    networks = one.build(config, lambda role, component: None, KEY)
    assert float(jnp.abs(networks.trained["model"]["dit"].head.linear.kernel[...]).max()) == 0  # starts by predicting nothing
    trained = {"model": {"dit": NETWORK, "text": networks.trained["model"]["text"]}}
    batch = {"latents": BATCH["latents"], "ids": jnp.array([[5, 6, 1, 0], [7, 1, 0, 0]]), "lengths": jnp.array([3, 2])}
    gradient = learns(one, "model", trained, networks.frozen, batch, config, 0.03)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["text"]))
    assert jax.tree.structure(gradient) == jax.tree.structure(trained["model"])
    frozen = Flow().build(config, lambda role, component: trained[role].get(component), KEY)
    assert sorted(frozen.trained["model"]) == ["dit"] and sorted(frozen.frozen) == ["text"]


def test_pixels_are_encoded_by_the_frozen_autoencoder():
    model = vae.build(VAE, rngs=nnx.Rngs(0))
    got = quick(objective.clean_latents)({"vae": model}, {"video": VIDEO})
    np.testing.assert_allclose(got, ENCODE(model, VIDEO), atol=1e-5)
    for frozen, batch, rule in (({}, {"video": VIDEO}, "no autoencoder"), ({}, {"ids": VIDEO}, "expected 'latents'")):
        with pytest.raises(ValueError, match=rule):
            objective.clean_latents(frozen, batch)


@pytest.mark.parametrize("context", ["own", "clean"])
def test_ode_loss(monkeypatch, context):
    answer, states = draw(2, 6, *FRAME, seed=15), draw(2, 3, 6, *FRAME, seed=16)
    seen = Recorder(lambda *_: answer)
    monkeypatch.setattr(ode_pairs, "causal_pass", seen)
    loss, _ = OdePairs(context=context).loss({"dit": NETWORK}, PROMPT, states, KEY, KEY, SHORT)
    _, _, x, timestep, _, _, given = seen.arguments
    timesteps, total = list(flow.warp(SHORT.rollout.timesteps, SHORT.rollout.shift)), 0.0
    for b in range(2):
        for f in range(6):
            t = float(timestep[b, f])
            step = int(np.argmin(np.abs(np.array(timesteps) - t)))
            assert timestep[b, f] == timestep[b, f - f % 3]
            np.testing.assert_array_equal(x[b, f], states[b, step, f])
            total += ((x[b, f] - t / 1000 * answer[b, f] - states[b, -1, f]) ** 2).mean() / 12
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    assert given is None if context == "own" else (given == states[:, -1]).all()
    with pytest.raises(ValueError, match="has 2 states, expected 2 steps and the end"):
        OdePairs().loss({"dit": NETWORK}, PROMPT, states[:, 1:], KEY, KEY, SHORT)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_trajectories_end_where_the_sampler_does(sampler):
    """Against the rollout of the same sampler over one chunk, and of its first steps."""
    one = OdePairs(sampler=sampler, num_inference_steps=4, guidance_scale=3.0)
    config = change(SHORT, rollout=dict(timesteps=(1000.0, 500.0)))
    keys, negative = jax.random.split(KEY, 2), NEGATIVE
    make = quick(one.trajectories, static_argnums=4)
    states = make(TEACHER, PROMPT, negative, keys, config)
    sampled = change(SHORT, rollout=dict(sampler=sampler, num_inference_steps=4, guidance_scale=3.0, chunk_frames=6))
    x = noise.chunk_noise(keys, 0, (6, *FRAME))
    both = dit.text_cache(TEACHER, jnp.concatenate([PROMPT, negative]))
    end, _ = quick(rollout, static_argnames="config")(TEACHER, both, x, initial_state(sampled, 2, 6, keys), sampled)
    assert states.shape == (2, 3, 6, *FRAME)
    np.testing.assert_array_equal(states[:, 0], x)
    np.testing.assert_allclose(states[:, -1], end, atol=1e-5)
    if sampler == "euler":  # half way, by hand
        levels, velocity_of = flow.sigma_grid(5.0, 4), quick(guided, static_argnames=("config", "scale"))
        for i in range(2):
            velocity = velocity_of(TEACHER, PROMPT, negative, 3.0, x, jnp.full((2, 6), 1000 * levels[i]), config)
            x = x + (levels[i + 1] - levels[i]) * velocity
        np.testing.assert_allclose(states[:, 1], x, atol=1e-5)
        with pytest.raises(ValueError, match="do not pass through the student's timesteps"):
            dataclasses.replace(one, num_inference_steps=5).trajectories(TEACHER, PROMPT, negative, keys, config)


def test_posterior_is_what_encoding_takes_its_latents_from():
    model = vae.build(VAE, rngs=nnx.Rngs(0))
    mean, log_variance = quick(autoencoder.posterior)(model, VIDEO)
    np.testing.assert_allclose(mean, ENCODE(model, VIDEO) * 2 + 1, atol=1e-5)
    assert log_variance.shape == mean.shape and float(jnp.abs(log_variance - mean).max()) > 1e-3
    made = quick(autoencoder.reconstruct)(model, mean)
    np.testing.assert_allclose(jnp.clip(made, -1, 1), quick(vae.decode)(model, (mean - 1) / 2), atol=1e-4)


def test_latent_statistics_normalise():
    model = vae.build(VAE, rngs=nnx.Rngs(0))
    videos = [VIDEO, 0.5 * VIDEO]
    config = dataclasses.replace(SHORT, vae=VAE)
    model.config = Autoencoder(measured=2).finish(config, {"vae": model}, {}, lambda i: {"video": videos[i]}).vae
    latents = np.concatenate([ENCODE(model, video) for video in videos])
    spread = [np.exp(quick(autoencoder.posterior)(model, video)[1]) for video in videos]  # of draws, around the means
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=1e-4)
    variance = latents.var((0, 1, 2, 3)) + np.concatenate(spread).mean((0, 1, 2, 3)) / np.square(model.config.std)
    np.testing.assert_allclose(variance, 1, atol=1e-3)
    with pytest.raises(ValueError, match="videos are empty"):
        latent_statistics(model, [])
    with pytest.raises(ValueError, match="expected 'video'"):
        Autoencoder().gradients("model", {"model": {"vae": model}}, {}, BATCH, KEY, config)


def test_teacher_forcing_learns():
    learns(TeacherForcing(remat=True), "model", {"model": {"dit": NETWORK}}, {}, BATCH, SHORT, 0.03)


def test_ode_pairs_are_learned_from_a_teacher():
    one = OdePairs(num_inference_steps=2, guidance_scale=2.0)
    learns(one, "model", {"model": {"dit": NETWORK}}, {"teacher": TEACHER}, BATCH, SHORT, 0.03)


def test_the_autoencoder_learns():
    one, model = Autoencoder(remat=True), vae.build(VAE, rngs=nnx.Rngs(0))
    learns(one, "model", {"model": {"vae": model}}, {}, {"video": VIDEO}, CONFIG, 0.003)


def test_settings_are_checked():
    tiny = change(vae=dict(kind="tiny", temporal=(True,) * 3))
    for make, rule in (
        (lambda: Flow(caption_dropout=1.5), "caption_dropout=1.5"),
        (lambda: Flow(weighting="flat"), "weighting"),
        (lambda: OdePairs(sampler="few_step"), "sampler"),
        (lambda: OdePairs(context="noisy"), "context"),
        (lambda: OdePairs(num_inference_steps=0), "num_inference_steps=0"),
        (lambda: Distillation(critic_updates=0), "critic_updates=0"),
        (lambda: Distillation(min_timestep=990.0), "min_timestep=990.0"),
        (lambda: Distillation(score_shift=0.0), "score_shift=0.0"),
        (lambda: Autoencoder(kl=-1.0), "kl=-1.0"),
        (lambda: Autoencoder(focus=-1.0), "focus=-1.0"),
        (lambda: Autoencoder().build(tiny, lambda *name: None, KEY), "config.vae.kind"),
    ):
        with pytest.raises((ValueError, TypeError), match=rule):  # the tests' own checking of types may come first
            make()
