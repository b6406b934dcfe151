"""The rollout against ways to the same numbers that have no cache, no scan, or no interruption."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_rollout import CONFIG, FRAME, SPARSE, change, draw, make_keys, make_model, make_text, quick

from lf_jax import cache as kv
from lf_jax import flow, rope, solvers
from lf_jax import noise as seeded
from lf_jax.chunk import denoise_chunk, draws
from lf_jax.config import Cache
from lf_jax.dit import model as dit
from lf_jax.rollout import initial_state, prefill, rollout
from lf_jax.tokens import Grid, chunk_lengths

run = quick(rollout, static_argnames="config")
fill = quick(prefill, static_argnames="config")
MODEL = make_model()
TEXT = make_text(MODEL, 2)
EVERY_FRAME = Cache()
POLICIES = ["light_forcing", "topk", "window", "full", "oracle"]


def every_block(policy):
    """The policy, allowed to keep all key blocks."""
    return dataclasses.replace(SPARSE, policy=policy, target=0.0, base=None, keep_frames=100, near_frames=90)


def views(lengths, settings):
    """For every chunk: its frames and, of all frames it attends to, the numbers and the positions they are rotated to."""
    for start, length in zip(np.cumsum((0, *lengths[:-1])), lengths, strict=True):
        past, own = list(range(start)), list(range(start, start + length))
        if settings.window is not None and start + length > settings.window:
            past = past[: settings.sink] + past[start - (settings.window - settings.sink - length) :]
        seen = past + own
        yield own, seen, (range(len(seen)) if settings.positions == "relative" else seen)


def one_pass(model, x, timestep, text, lengths, settings):
    """Velocities of a whole video in one pass over all frames: no cache, no scan, every chunk with a view of its own."""
    b, frames, grid, head_dim = x.shape[0], x.shape[1], Grid.of(CONFIG), model.config.head_dim

    def of(tokens, numbers):
        tokens = tokens.reshape(b, frames, grid.frame_tokens, *tokens.shape[2:])[:, np.asarray(numbers)]
        return tokens.reshape(b, -1, *tokens.shape[3:])

    def at(tokens, numbers, positions):
        angles = [rope.angles(jnp.int32(p), 1, grid.rows, grid.columns, head_dim) for p in positions]
        return rope.rotate(of(tokens, numbers), jnp.concatenate(angles))

    def attend(own, qkv):
        q, _, new = own.queries_keys(qkv, None, grid, pool=False)  # not rotated yet
        k, v, out = new.k, new.v, []
        for own, seen, position in views(lengths, settings):
            logits = jnp.einsum("bqhe,bkhe->bhqk", at(q, own, position[-len(own) :]), at(k, seen, position)) / np.sqrt(head_dim)
            out.append(jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(logits, axis=-1), of(v, seen)))
        return jnp.concatenate(out, axis=1), new

    time, modulation = dit.embed_time(model, jnp.broadcast_to(timestep, (b, frames)))
    tokens = dit.patchify(model, x)
    for i in range(model.config.layers):
        block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
        tokens, _ = block(tokens, modulation, text.k[i], text.v[i], attend)
    return dit.unpatchify(model, model.head(tokens, time), grid)


def without_cache(model, text, noise, step_noise, lengths, settings):
    """The sampler of the paper in Python: clean past and noisy chunk go through the network together.

    The frames after the chunk are still zero, and no view has them.
    """
    network, video = quick(partial(one_pass, lengths=lengths, settings=settings)), jnp.zeros_like(noise)
    timesteps = solvers.schedule(CONFIG.rollout).timestep.tolist()
    for start, length in zip(np.cumsum((0, *lengths[:-1])), lengths, strict=True):
        here = slice(start, start + length)
        x = noise[:, here]
        for i, t in enumerate(timesteps):
            times = jnp.zeros(sum(lengths)).at[here].set(t)
            x = x - t / 1000 * network(model, video.at[:, here].set(x), times, text)[:, here]
            if i + 1 < len(timesteps):
                after = timesteps[i + 1] / 1000
                x = (1 - after) * x + after * step_noise[i][:, here]
        video = video.at[:, here].set(x)
    return video


@functools.cache
def wanted(lengths, settings=EVERY_FRAME):
    """Noise, step noise and the cache-free video."""
    noise, steps = draw(2, sum(lengths), *FRAME), draw(1, 2, sum(lengths), *FRAME, seed=4)
    return noise, steps, without_cache(MODEL, TEXT, noise, steps, lengths, settings)


@pytest.mark.parametrize("policy", ["dense", *POLICIES])
def test_cached_rollout_equals_block_causal_passes(policy):
    noise, steps, want = wanted((3, 3, 3))
    config = change(sparsity=every_block(policy))
    state = initial_state(config, 2, 9, make_keys(2))
    got, after = run(MODEL, TEXT, noise, state, config, steps)
    assert float(jnp.std(want)) > 0.3 and not jnp.allclose(want, noise, atol=0.1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert int(after.cache.end) == 9 and int(after.chunk) == 3


@pytest.mark.parametrize("policy", ["dense", "light_forcing"])
def test_a_first_chunk_of_one_frame(policy):
    noise, steps, want = wanted((1, 3, 3))
    config = change(sparsity=every_block(policy), rollout=dict(independent_first_frame=True))
    got, after = run(MODEL, TEXT, noise, initial_state(config, 2, 7, make_keys(2)), config, steps)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # the first image given instead of generated: the rest is the same
    state = initial_state(config, 2, 7, make_keys(2))
    state = fill(MODEL, TEXT, want[:, :1], state, config)
    rest, _ = run(MODEL, TEXT, noise[:, 1:], state, config, steps[:, :, 1:])
    np.testing.assert_allclose(rest, want[:, 1:], atol=1e-5)


@pytest.mark.parametrize("policy", ["dense", "topk"])
@pytest.mark.parametrize("settings", [Cache(7, 1), Cache(7, 1, "relative"), Cache(8, 2, "relative")])
def test_windowed_rollout_equals_passes_with_a_window(policy, settings):
    """Eviction, and the sink where it was or moved up: against rotating every view anew."""
    lengths = (3,) * 4
    noise, steps, want = wanted(lengths, settings)
    config = change(sparsity=every_block(policy), cache=dataclasses.asdict(settings))
    got, _ = run(MODEL, TEXT, noise, initial_state(config, 2, 12, make_keys(2)), config, steps)
    np.testing.assert_allclose(got, want, atol=1e-5)
    others = [wanted(lengths, other)[2] for other in (EVERY_FRAME, Cache(7, 1)) if other != settings]
    assert all(float(jnp.abs(got - other).max()) > 1e-4 for other in others)


def plain_loop(config, model, text, noise, keys, frames):
    """The rollout as two Python loops around the network, with budgets looked up by hand."""
    settings = config.rollout
    lengths = chunk_lengths(frames, settings.chunk_frames, settings.independent_first_frame)
    state, grid, at, video = initial_state(config, noise.shape[0], frames, keys), Grid.of(config), 0, []
    cache = state.cache
    network = quick(dit.forward, static_argnames=("grid", "sparsity"))
    commit = quick(kv.append, static_argnames=("frames", "next_frames"))
    timesteps = [float(t) for t in flow.warp(settings.timesteps, settings.shift)]
    for chunk, length in enumerate(lengths):
        x = noise[:, at : at + length]
        budget = dataclasses.replace(state.budgets, blocks=state.budgets.blocks[chunk])
        for i, t in enumerate(timesteps):
            velocity, _ = network(model, x, jnp.full(x.shape[:2], t), text, cache, budget, grid, config.sparsity)
            x = x - t / 1000 * velocity
            if i + 1 < len(timesteps):
                fresh = seeded.step_noise(keys, chunk, i, x.shape[1:])
                x = (1 - timesteps[i + 1] / 1000) * x + timesteps[i + 1] / 1000 * fresh
        _, new = network(model, x, jnp.zeros(x.shape[:2]), text, cache, budget, grid, config.sparsity)
        cache, at = commit(cache, new, length, settings.chunk_frames), at + length
        video.append(x)
    return jnp.concatenate(video, axis=1), cache


def compare_with_plain_loop(config, frames):
    noise, keys = draw(2, frames, *FRAME), make_keys(2)
    got, state = run(MODEL, TEXT, noise, initial_state(config, 2, frames, keys), config)
    want, cache = plain_loop(config, MODEL, TEXT, noise, keys, frames)
    np.testing.assert_allclose(got, want, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), state.cache, cache)
    return got


@pytest.mark.parametrize("policy", ["topk", "window", "oracle"])
def test_sparse_rollout_equals_the_plain_loop(policy):
    compare_with_plain_loop(change(sparsity=dataclasses.replace(SPARSE, policy=policy)), 9)


def test_long_light_forcing_rollout_equals_the_plain_loop():
    """Window, sink, relative positions, two-stage selection and a first chunk of one frame, all together."""
    long = change(cache=dict(window=8, sink=1, positions="relative"), rollout=dict(independent_first_frame=True))
    sparse, full = (compare_with_plain_loop(change(long, sparsity=s), 13) for s in (SPARSE, every_block("full")))
    assert float(jnp.abs(sparse - full).max()) > 1e-3  # something was left out


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_guidance_and_multistep_samplers(sampler):
    config = change(rollout=dict(sampler=sampler, num_inference_steps=4, guidance_scale=3.0))
    noise, keys, negative = draw(2, 6, *FRAME), make_keys(2), make_text(MODEL, 2, seed=8)
    both = jax.tree.map(lambda c, u: jnp.concatenate([c, u], axis=1), TEXT, negative)
    got, _ = run(MODEL, both, noise, initial_state(config, 2, 6, keys), config)
    # two networks with two caches, and the samplers' own loop
    schedule = solvers.schedule(config.rollout)
    grid, caches, video = Grid.of(config), [], []
    caches = [kv.empty(config.model, grid, config.cache, False, 2, 6) for _ in range(2)]
    network = quick(dit.forward, static_argnames=("grid", "sparsity"))
    for start in (0, 3):
        x = noise[:, start : start + 3]
        memory, pairs = solvers.forget(x), list(zip((TEXT, negative), caches, strict=True))
        for i in range(schedule.steps):
            at = jax.tree.map(lambda column, i=i: column[i], schedule)
            times = jnp.full((2, 3), at.timestep)
            c, u = (network(MODEL, x, times, t, k, None, grid, config.sparsity)[0] for t, k in pairs)
            x, memory = solvers.step(at, x, u + 3.0 * (c - u), memory)
        news = [network(MODEL, x, jnp.zeros((2, 3)), t, k, None, grid, config.sparsity)[1] for t, k in pairs]
        caches = [kv.append(k, new, 3, 3) for k, new in zip(caches, news, strict=True)]
        video.append(x)
    np.testing.assert_allclose(got, jnp.concatenate(video, axis=1), atol=2e-5)


def test_guidance_of_scale_one_is_the_conditional_branch():
    plain = change(rollout=dict(sampler="euler", num_inference_steps=2))
    noise, keys = draw(2, 3, *FRAME), make_keys(2)
    want, _ = run(MODEL, TEXT, noise, initial_state(plain, 2, 3, keys), plain)
    text = jax.tree.map(lambda c, u: jnp.concatenate([c, u], axis=1), TEXT, make_text(MODEL, 2, seed=8))
    for scale, equal in ((1 + 1e-7, True), (5.0, False)):
        config = change(plain, rollout=dict(guidance_scale=scale))
        got, _ = run(MODEL, text, noise, initial_state(config, 2, 3, keys), config)
        assert (float(jnp.abs(got - want).max()) < 1e-5) is equal


def test_context_noise_reaches_the_cache_but_not_the_video():
    noise, keys, steps = draw(2, 6, *FRAME), make_keys(2), draw(2, 2, 6, *FRAME, seed=5)
    config = change(rollout=dict(context_noise=True))
    assert draws(config) == 2 and draws(CONFIG) == 1
    got, _ = run(MODEL, TEXT, noise, initial_state(config, 2, 6, keys), config, steps)
    clean, _ = run(MODEL, TEXT, noise, initial_state(CONFIG, 2, 6, keys), CONFIG, steps[:1])
    np.testing.assert_allclose(got[:, :3], clean[:, :3], atol=1e-6)
    assert float(jnp.abs(got[:, 3:] - clean[:, 3:]).max()) > 1e-4
    # by hand: prefill with the first chunk and the noise level that the original's look-up finds at t = 0
    noisy = flow.add_noise(got[:, :3], steps[1][:, :3], jnp.float32(0.0049801))
    state = fill(MODEL, TEXT, noisy, initial_state(CONFIG, 2, 6, keys), CONFIG)
    rest, _ = run(MODEL, TEXT, noise[:, 3:], state, CONFIG, steps[:1, :, 3:])
    np.testing.assert_allclose(got[:, 3:], rest, atol=1e-5)


def test_a_video_does_not_depend_on_its_batch():
    config, keys, text = change(sparsity=SPARSE), make_keys(3), make_text(MODEL, 3)
    noise = seeded.video_noise(keys, 0, (3, 3), FRAME)
    got, _ = run(MODEL, text, noise, initial_state(config, 3, 6, keys), config)
    order = jnp.asarray([2, 0, 1])
    turned = jax.tree.map(lambda a: a[:, order], text)
    other, _ = run(MODEL, turned, noise[order], initial_state(config, 3, 6, keys[order]), config)
    np.testing.assert_allclose(other, got[order], atol=1e-5)
    alone, _ = run(MODEL, jax.tree.map(lambda a: a[:, 1:2], text), noise[1:2], initial_state(config, 1, 6, keys[1:2]), config)
    np.testing.assert_allclose(alone, got[1:2], atol=1e-5)


def test_a_bfloat16_model_keeps_its_latents_in_float32():
    config = change(sparsity=SPARSE, model=dict(dtype="bfloat16"))
    model = quick(lambda m: jax.tree.map(lambda a: a.astype(jnp.bfloat16), m))(MODEL)
    model.config = config.model
    text = jax.tree.map(lambda a: a.astype(jnp.bfloat16), TEXT)
    noise, keys = draw(2, 6, *FRAME), make_keys(2)
    got, state = run(model, text, noise, initial_state(config, 2, 6, keys), config)
    want, _ = run(MODEL, TEXT, noise, initial_state(change(sparsity=SPARSE), 2, 6, keys), change(sparsity=SPARSE))
    assert got.dtype == jnp.float32 and state.cache.k.dtype == jnp.bfloat16 and state.cache.pooled.dtype == jnp.float32
    assert 1e-4 < float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.05


def test_gradient_through_a_chunk():
    """Of the weights and of the noise, through steps, sampler and sparse attention; checked by finite differences."""
    config, keys = change(sparsity=SPARSE), make_keys(1)
    state, text, x = initial_state(config, 1, 6, keys), make_text(MODEL, 1), draw(1, 3, *FRAME)
    budget = dataclasses.replace(state.budgets, blocks=state.budgets.blocks[0])

    def loss(model, x):
        return jnp.mean(denoise_chunk(model, text, x, state.cache, keys, jnp.int32(0), budget, config) ** 2)

    value, (weights, on_x) = quick(jax.value_and_grad(loss, argnums=(0, 1)))(MODEL, x)
    assert type(weights) is type(MODEL)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(weights))
    assert float(jnp.abs(weights.blocks.self_attention.qkv.kernel[:, 2]).max()) > 0
    way = draw(*x.shape, seed=6)
    numeric = (quick(loss)(MODEL, x + 1e-2 * way) - quick(loss)(MODEL, x - 1e-2 * way)) / 2e-2
    assert float(jnp.vdot(on_x, way)) == pytest.approx(float(numeric), rel=2e-2)
