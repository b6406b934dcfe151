"""Training passes over chunks against passes without a cache, and their gradients against gradients in one piece."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_rollout import CONFIG, FRAME, MODEL, SPARSE, change, draw, make_keys, make_model, quick

from lf_jax import cache as kv
from lf_jax import flow, rope
from lf_jax import noise as seeded
from lf_jax.chunk import frame_shape
from lf_jax.dit import model as dit
from lf_jax.rollout import initial_state, rollout
from lf_jax.tokens import Grid
from lf_jax.train.rollouts import causal_pass, exit_gradient, self_rollout

NETWORK = make_model()
PROMPT = draw(2, 4, MODEL.text_dim, seed=1)
KEYS = make_keys(2)
EVERY_BLOCK = dataclasses.replace(SPARSE, target=0.0, base=None, keep_frames=100, near_frames=90)


def distance(a, b):
    """Of two gradients, relative to the size of the second."""
    a, b = (np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def single_pass(model, prompt, x, timestep, context, lengths, through):
    """All chunks in one pass without a cache: the clean frames and the noisy ones side by side, behind a mask.

    A noisy chunk sees itself and the clean chunks before it, a clean one the clean ones up to itself. Without `context`
    there is one row of frames, which sees itself up to each chunk.
    """
    b, f, _, _, _ = x.shape
    grid, text, head_dim = Grid.of(CONFIG), dit.text_cache(model, prompt), model.config.head_dim
    frame = np.tile(np.arange(f), 1 if context is None else 2)
    chunk = np.repeat(np.arange(len(lengths)), lengths)[frame]
    noisy = np.arange(len(frame)) >= (0 if context is None else f)
    if context is not None:
        x, timestep = jnp.concatenate([context, x], axis=1), jnp.concatenate([jnp.zeros_like(timestep), timestep], axis=1)
    own = (chunk[:, None] == chunk) & (noisy[:, None] == noisy)
    seen = (chunk[:, None] > chunk) & (~noisy if context is not None else True)
    own, seen = (np.kron(mask, np.ones((grid.frame_tokens,) * 2, bool)) for mask in (own, seen))
    angles = jnp.concatenate([rope.angles(jnp.int32(i), 1, grid.rows, grid.columns, head_dim) for i in frame])

    def attend(layer, qkv):
        q, _, new = layer.queries_keys(qkv, (jnp.cos(angles), jnp.sin(angles)), grid, pool=False)
        k, v = new.k, new.v
        past_k, past_v = (k, v) if through else jax.lax.stop_gradient((k, v))
        logits = [jnp.einsum("bqhe,bkhe->bhqk", q, keys) / np.sqrt(head_dim) for keys in (past_k, k)]
        logits = jnp.where(seen, logits[0], jnp.where(own, logits[1], -jnp.inf))
        weights = jax.nn.softmax(logits, axis=-1)
        read = [jnp.einsum("bhqk,bkhe->bqhe", jnp.where(m, weights, 0), w) for m, w in ((seen, past_v), (own, v))]
        return sum(read), new

    time, modulation = dit.embed_time(model, timestep)
    tokens = dit.patchify(model, x)
    for i in range(model.config.layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)
        tokens, _ = block(tokens, modulation, text.k[i], text.v[i], attend)
    return dit.unpatchify(model, model.head(tokens, time), grid)[:, -f:]


LENGTHS = {"all": (3, 3, 3), "own": (1, 3, 3)}


def inputs(case):
    """Noisy and clean frames, what the velocity is compared with, and timesteps."""
    lengths = LENGTHS.get(case, LENGTHS["all"])
    x, clean, target = (draw(2, sum(lengths), *FRAME, seed=seed) for seed in (5, 6, 7))
    timestep = jnp.repeat(draw(2, len(lengths), seed=8) * 100 + 500, np.asarray(lengths), axis=1)
    return x, None if case == "own" else clean, target, timestep


def graded(velocity, target):
    """What a pass predicts, and the gradient of its error."""

    def loss(model):
        found = velocity(model)
        return jnp.mean(jnp.square(found - target)), found

    (_, found), gradient = quick(jax.value_and_grad(loss, has_aux=True))(NETWORK)
    return found, gradient


@functools.cache
def in_one_pass(case):
    x, context, target, timestep = inputs(case)
    lengths = LENGTHS.get(case, LENGTHS["all"])
    return graded(lambda m: single_pass(m, PROMPT, x, timestep, context, lengths, through=case != "cut"), target)


@pytest.mark.parametrize("case", ["clean", "window", "sparse", "cut", "own"])
def test_causal_pass_equals_one_pass_behind_a_mask(case):
    """Values and gradients: of teacher forcing, through the cache or not, all chunks at once or, sparse and with a window,
    one by one; and of frames that read noisy ones."""
    x, context, target, timestep = inputs(case)
    config = change(
        sparsity=EVERY_BLOCK if case == "sparse" else CONFIG.sparsity,
        cache=dict(window=9 if case == "window" else None),
        rollout=dict(independent_first_frame=case == "own"),
    )
    options = dict(through_cache=case != "cut", remat=case == "sparse")
    got, gradient = graded(lambda m: causal_pass(m, PROMPT, x, timestep, KEYS, config, context, **options), target)
    want, wanted = in_one_pass(case if case in ("cut", "own") else "clean")
    assert float(jnp.std(want)) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert distance(gradient, wanted) < 1e-5
    if case == "cut":
        assert distance(gradient, in_one_pass("clean")[1]) > 1e-2


def test_the_context_of_a_causal_pass_is_as_noisy_as_a_rollouts():
    config = change(rollout=dict(context_noise=True, context_timestep=100.0))
    x, clean, timestep = draw(2, 6, *FRAME), draw(2, 6, *FRAME, seed=6), jnp.full((2, 6), 500.0)
    run = quick(causal_pass, static_argnames="config")
    got = run(NETWORK, PROMPT, x, timestep, KEYS, config, clean)
    sigma = float(flow.nearest_sigma(jnp.float32(100.0), config.rollout.shift))
    fresh = seeded.step_noise(KEYS, 0, 1, (3, *FRAME))  # after the noise between the two steps
    noisy = clean.at[:, :3].set((1 - sigma) * clean[:, :3] + sigma * fresh)
    plain = change(rollout=dict(context_timestep=100.0))
    np.testing.assert_allclose(got, run(NETWORK, PROMPT, x, timestep, KEYS, plain, noisy), atol=1e-5)
    assert float(jnp.abs(got - run(NETWORK, PROMPT, x, timestep, KEYS, plain, clean)).max()) > 1e-3


def test_a_rollout_that_leaves_at_the_last_step_is_the_samplers():
    config = change(sparsity=SPARSE, rollout=dict(context_noise=True, context_timestep=100.0))
    exits = jnp.full((3,), 1, jnp.int32)
    got = quick(self_rollout, static_argnames=("config", "frames"))(NETWORK, PROMPT, KEYS, exits, config, 9)
    noise = seeded.video_noise(KEYS, 0, (3, 3, 3), frame_shape(config))
    text, state = dit.text_cache(NETWORK, PROMPT), initial_state(config, 2, 9, KEYS)
    want, _ = quick(rollout, static_argnames="config")(NETWORK, text, noise, state, config)
    np.testing.assert_allclose(got.latents, want, atol=1e-5)
    assert frame_shape(config) == FRAME


def rollout_in_one_piece(model, config, exits, lengths):
    """The training rollout as Python loops around the network, with the gradient stopped where Self-Forcing stops it."""
    stop = jax.lax.stop_gradient
    state, grid = initial_state(config, 2, sum(lengths), KEYS), Grid.of(config)
    cache, text, inputs, video = state.cache, dit.text_cache(model, PROMPT), [], []
    timesteps = flow.warp(config.rollout.timesteps, config.rollout.shift)
    for chunk, (length, leave) in enumerate(zip(lengths, exits, strict=True)):
        budget = None if state.budgets is None else dataclasses.replace(state.budgets, blocks=state.budgets.blocks[chunk])

        def network(x, t, text, past, budget=budget):
            return dit.forward(model, x, jnp.full(x.shape[:2], t), text, past, budget, grid, config.sparsity)

        x = seeded.chunk_noise(KEYS, chunk, (length, *FRAME))
        for i in range(leave):
            x0 = x - timesteps[i] / 1000 * network(x, timesteps[i], text, cache)[0]
            after = timesteps[i + 1] / 1000
            x = stop((1 - after) * x0 + after * seeded.step_noise(KEYS, chunk, i, x.shape[1:]))
        x0 = x - timesteps[leave] / 1000 * network(x, timesteps[leave], text, cache)[0]
        inputs.append(x)
        video.append(x0)
        context = x0
        if config.rollout.context_noise:
            sigma = flow.sigma_grid(config.rollout.shift)[-1]  # the lowest of its grid, for timestep 0
            context = (1 - sigma) * x0 + sigma * seeded.step_noise(KEYS, chunk, len(timesteps) - 1, x.shape[1:])
        cache = stop(kv.append(cache, network(context, 0.0, text, cache)[1], length, config.rollout.chunk_frames))
    return jnp.concatenate(inputs, axis=1), jnp.concatenate(video, axis=1)


@pytest.mark.parametrize("case", ["dense", "sparse"])
def test_three_phases_are_the_gradient_in_one_piece(case):
    """With a noisy context, or with block lists, a window whose sink moves, and remat."""
    dense = change(rollout=dict(context_noise=True))
    sparse = change(sparsity=SPARSE, cache=dict(window=5, sink=1, positions="relative"))
    config, lengths, exits = dense if case == "dense" else sparse, (3, 3), jnp.array([0, 1], jnp.int32)
    target = draw(2, 6, *FRAME, seed=9)

    def loss(x0):
        return jnp.mean(jnp.abs(x0 - target) ** 3)

    @quick
    def phases(model):
        run = self_rollout(model, PROMPT, KEYS, exits, config, 6)
        by_latents = jax.grad(loss)(run.latents)
        return run, exit_gradient(model, PROMPT, run.inputs, by_latents, KEYS, exits, config, remat=case == "sparse")

    @quick
    @partial(jax.grad, has_aux=True)
    def one_piece(model):
        inputs, x0 = rollout_in_one_piece(model, config, exits.tolist(), lengths)
        return loss(x0), (inputs, x0)

    run, gradient = phases(NETWORK)
    wanted, found = one_piece(NETWORK)
    for got, want in zip(run, found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert distance(gradient, wanted) < 1e-5


def test_what_cannot_be_rolled_out_is_named():
    with pytest.raises(ValueError, match="few_step"):
        self_rollout(NETWORK, PROMPT, KEYS, jnp.zeros(2, jnp.int32), change(rollout=dict(sampler="euler")), 6)
    with pytest.raises(ValueError, match="guidance_scale=3.0"):
        config = change(rollout=dict(sampler="euler", guidance_scale=3.0))
        causal_pass(NETWORK, PROMPT, draw(2, 6, *FRAME), jnp.ones((2, 6)), KEYS, config)
