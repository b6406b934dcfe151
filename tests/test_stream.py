"""Streaming: the same as a rollout, resumable bit by bit, one compilation, one cache, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_rollout import CONFIG, FRAME, SPARSE, change, draw, make_keys, make_model, make_text, quick
from tiny_rollout import MODEL as SETTINGS

from lf_jax import noise as seeded
from lf_jax.chunk import compiled_chunk
from lf_jax.dit import model as dit
from lf_jax.rollout import RolloutState, fork, initial_state, prefill, rollout, stream

MODEL = make_model()
TEXT = make_text(MODEL, 2)
KEYS = make_keys(2)
LONG = change(cache=dict(window=7, sink=1, positions="relative"), sparsity=SPARSE)


def videos(steps):
    return jnp.concatenate([latents for latents, _ in steps], axis=1)


@pytest.mark.parametrize("first, handed_in", [(False, False), (True, True)])
def test_stream_equals_rollout(first, handed_in):
    """With noise drawn from the keys as `video_noise` draws it; and with all noise handed in, after a first frame alone."""
    config = change(LONG, rollout=dict(independent_first_frame=first))
    lengths = (1,) * first + (3, 3, 3)
    frames = sum(lengths)
    noise = draw(2, frames, *FRAME) if handed_in else seeded.video_noise(KEYS, 0, lengths, FRAME)
    steps = draw(1, 2, frames, *FRAME, seed=4) if handed_in else None
    run = quick(rollout, static_argnames="config")
    want, state = run(MODEL, TEXT, noise, initial_state(config, 2, frames, KEYS), config, steps)
    given = noise if handed_in else None
    got = list(stream(MODEL, TEXT, given, initial_state(config, 2, frames, KEYS), config, frames, steps))
    assert [latents.shape[1] for latents, _ in got] == list(lengths)
    np.testing.assert_allclose(videos(got), want, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[-1][1].cache, state.cache)
    assert int(got[-1][1].chunk) == int(state.chunk) == len(lengths)


def test_resumed_and_forked_videos_equal_an_uninterrupted_one_bitwise():
    """Past eviction, with budgets that grow over the whole plan."""

    def begin(frames):
        return list(stream(MODEL, TEXT, None, initial_state(LONG, 2, 15, KEYS), LONG, frames))

    whole, head = begin(15), begin(6)
    want, state = videos(whole), head[-1][1]
    np.testing.assert_array_equal(videos(head), want[:, :6])
    saved = jax.tree.map(np.array, dataclasses.replace(state, keys=jax.random.key_data(state.keys)))
    branch, other = fork(state), fork(state)
    resumed = list(stream(MODEL, TEXT, None, state, LONG, 9))
    assert state.cache.k.is_deleted() and not branch.cache.k.is_deleted()
    forked = list(stream(MODEL, TEXT, None, branch, LONG, 9))
    loaded = jax.tree.map(jnp.asarray, dataclasses.replace(saved, keys=jax.random.wrap_key_data(saved.keys)))
    for tail in (resumed, forked, list(stream(MODEL, TEXT, None, loaded, LONG, 9))):
        np.testing.assert_array_equal(videos(tail), want[:, 6:])
        jax.tree.map(np.testing.assert_array_equal, tail[-1][1].cache, whole[-1][1].cache)
    new_prompt = videos(stream(MODEL, make_text(MODEL, 2, seed=5), None, other, LONG, 9))
    assert float(jnp.abs(new_prompt - want[:, 6:]).max()) > 1e-3  # another prompt after the same past: another future


def test_a_rollout_in_two_parts_equals_one_bitwise():
    run = jax.jit(rollout, static_argnames="config")
    noise = draw(2, 12, *FRAME)
    want, end = run(MODEL, TEXT, noise, initial_state(LONG, 2, 12, KEYS), LONG)
    first, state = run(MODEL, TEXT, noise[:, :6], initial_state(LONG, 2, 12, KEYS), LONG)
    second, state = run(MODEL, TEXT, noise[:, 6:], state, LONG)
    np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), want)
    jax.tree.map(np.testing.assert_array_equal, state.cache, end.cache)


def test_two_hundred_frames_take_one_compilation_and_constant_memory():
    compiled_chunk.clear_cache()
    live = []
    for i, (latents, state) in enumerate(stream(MODEL, TEXT, None, initial_state(LONG, 2, 201, KEYS), LONG, 201)):
        assert np.isfinite(latents).all() and float(latents.std()) > 0.1
        if i == 0:
            where = state.cache.k.unsafe_buffer_pointer()
        assert state.cache.k.unsafe_buffer_pointer() == where  # written in place, chunk after chunk
        live.append(sum(a.nbytes for a in jax.live_arrays()))
    assert int(state.cache.end) == 201 and compiled_chunk._cache_size() == 1
    assert len(set(live[2:])) == 1
    # another length has other budgets, yet the same compiled step where the block lists are equally wide
    dense = change(LONG, sparsity=dict(policy="dense"))
    for frames in (6, 12):
        config = change(dense, video=dict(num_frames=1 + 4 * (frames - 1)))
        list(stream(MODEL, TEXT, None, initial_state(config, 2, frames, KEYS), config, frames))
    assert compiled_chunk._cache_size() == 2


@pytest.mark.parametrize("sparse", [False, True])
def test_there_is_no_second_cache(sparse):
    """XLA's own account of a shape where the cache outweighs all else; nothing of it is allocated."""
    model = dataclasses.replace(SETTINGS, dim=128, ffn_dim=64, layers=16)
    config = dataclasses.replace(CONFIG, model=model, sparsity=SPARSE if sparse else CONFIG.sparsity)
    weights = jax.eval_shape(lambda: dit.WanDiT(model, rngs=nnx.Rngs(0)))
    text = jax.eval_shape(dit.text_cache, weights, jnp.zeros((1, 4, model.text_dim)))
    state = jax.eval_shape(lambda: initial_state(config, 1, 240, make_keys(1)))
    noise = jax.ShapeDtypeStruct((1, 240, *FRAME), jnp.float32)
    budget = None if not sparse else dataclasses.replace(state.budgets, blocks=jax.ShapeDtypeStruct((), jnp.int32))
    cache = sum(a.size * a.dtype.itemsize for a in (state.cache.k, state.cache.v))
    whole = jax.jit(rollout, static_argnames="config", donate_argnames="state").lower(weights, text, noise, state, config)
    step = compiled_chunk.lower(weights, text, None, state.cache, state.keys, state.chunk, budget, config, 3)
    for program in (whole, step):
        memory = program.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= cache  # what comes out lies where it came in
        assert memory.temp_size_in_bytes < 0.2 * cache, memory.temp_size_in_bytes / cache


def test_rollout_donates():
    state = initial_state(LONG, 2, 6, KEYS)
    where, old = state.cache.k.unsafe_buffer_pointer(), state.cache.k
    run = quick(rollout, static_argnames="config", donate_argnames="state")
    _, state = run(MODEL, TEXT, draw(2, 6, *FRAME), state, LONG)
    assert old.is_deleted() and state.cache.k.unsafe_buffer_pointer() == where
    assert not KEYS.is_deleted()  # they are the caller's


def advanced(config, frames, planned):
    """A state some frames into its plan, its keys and values left empty."""
    state = initial_state(config, 2, planned, KEYS)
    cache = dataclasses.replace(state.cache, end=jnp.int32(frames))
    return dataclasses.replace(state, cache=cache, chunk=jnp.int32(frames // 3))


def test_frames_beyond_the_cache_or_the_plan_are_refused():
    noise = draw(2, 6, *FRAME)
    for config, planned, rule in (
        (CONFIG, 3, "6 after 0 exceed the 3 frames that the state has room for"),
        (LONG, 3, "exceed the plan of 1 chunks"),
    ):
        state = initial_state(config, 2, planned, KEYS)
        for call in (
            lambda: rollout(MODEL, TEXT, noise, state, config),  # noqa: B023
            lambda: prefill(MODEL, TEXT, noise, state, config),  # noqa: B023
            lambda: stream(MODEL, TEXT, None, state, config, 6),  # noqa: B023
            lambda: jax.eval_shape(lambda s: rollout(MODEL, TEXT, noise, s, config), state),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=rule):
                call()
    for config, rule in ((CONFIG, "6 after 6 exceed the 9"), (LONG, "after chunk 2 exceed the plan of 3")):
        with pytest.raises(ValueError, match=rule):
            rollout(MODEL, TEXT, noise, advanced(config, 6, 9), config)
        # inside a caller's jit the state is a tracer: what cannot be raised turns the result into NaN
        run = quick(rollout, static_argnames="config")
        assert np.isnan(run(MODEL, TEXT, noise, advanced(config, 6, 9), config)[0]).all()
        assert np.isfinite(run(MODEL, TEXT, noise, advanced(config, 3, 9), config)[0]).all()


def test_a_window_without_budgets_has_no_end():
    config = change(cache=dict(window=7, sink=1))
    run = quick(rollout, static_argnames="config")
    assert np.isfinite(run(MODEL, TEXT, draw(2, 3, *FRAME), advanced(config, 9, 9), config)[0]).all()


def test_wrong_sizes_are_refused():
    state, noise = initial_state(CONFIG, 2, 9, KEYS), draw(2, 9, *FRAME)
    one, shallow = jax.tree.map(lambda a: a[:, :1], TEXT), jax.tree.map(lambda a: a[:1], TEXT)
    guided = change(rollout=dict(sampler="euler", guidance_scale=2.0))
    image = change(rollout=dict(independent_first_frame=True))
    sparse, window = change(sparsity=SPARSE), change(cache=dict(window=6))
    cases = [
        ("frames=4 latent frames do not split", lambda: rollout(MODEL, TEXT, noise[:, :4], state, CONFIG)),
        ("frames=8 latent frames do not split", lambda: initial_state(CONFIG, 2, 8, KEYS)),
        ("frames=9 latent frames do not split", lambda: stream(MODEL, TEXT, None, initial_state(image, 2, 10, KEYS), image, 9)),
        ("text has batch 1, expected 2", lambda: rollout(MODEL, one, noise, state, CONFIG)),
        (
            r"text is of another model: .* \(1, 2, 12\), expected \(2, 2, 12\)",
            lambda: rollout(MODEL, shallow, noise, state, CONFIG),
        ),
        ("text has batch 2, expected 4", lambda: rollout(MODEL, TEXT, noise, initial_state(guided, 2, 9, KEYS), guided)),
        ("state.cache has batch 2, expected 1", lambda: rollout(MODEL, one, noise[:1], state, CONFIG)),
        ("keys has shape", lambda: initial_state(CONFIG, 3, 9, KEYS)),
        ("step_noise has shape", lambda: rollout(MODEL, TEXT, noise, state, CONFIG, draw(2, 2, 9, *FRAME))),
        (r"noise has shape \(2, 6, .*expected \(2, 9,", lambda: stream(MODEL, TEXT, noise[:, :6], state, CONFIG, 9)),
        ("step_noise has shape", lambda: stream(MODEL, TEXT, noise, state, CONFIG, 9, draw(2, 2, 9, *FRAME))),
        (r"noise has shape .* expected \(b, f, 4, 6, 4\)", lambda: rollout(MODEL, TEXT, noise[..., :2], state, CONFIG)),
        (r"latents has shape .* expected \(b, f, 4, 6, 4\)", lambda: prefill(MODEL, TEXT, noise[:, :3, :2], state, CONFIG)),
        ("without block budgets, .*policy='light_forcing'", lambda: rollout(MODEL, TEXT, noise, state, sparse)),
        ("9 slots and a sink of 0, expected .*window=6", lambda: rollout(MODEL, TEXT, noise, state, window)),
    ]
    for rule, call in cases:
        with pytest.raises(ValueError, match=rule):
            call()


def test_the_state_is_a_pytree_of_arrays_only():
    state = initial_state(LONG, 2, 9, KEYS)
    assert isinstance(jax.tree.map(lambda a: a, state), RolloutState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert initial_state(CONFIG, 2, 9, KEYS).budgets is None
