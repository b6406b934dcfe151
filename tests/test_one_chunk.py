"""A video of one chunk (the bidirectional models): the same numbers as with a cache, and neither cache nor context pass."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from tiny_rollout import FRAME, SPARSE, change, draw, make_keys, make_model, make_text, quick
from tiny_rollout import MODEL as SETTINGS

from lf_jax import cache as kv
from lf_jax import checkpoint, cli, plan, presets
from lf_jax.chunk import branches, compiled_chunk
from lf_jax.config import Cache, Rollout, Sparsity
from lf_jax.dit import model as dit
from lf_jax.generate import begin, generate
from lf_jax.rollout import fork, initial_state, prefill, rollout, stream
from lf_jax.tokens import Grid

MODEL = make_model()
KEYS = make_keys(2)
FRAMES = 5
ONE = change(rollout=dict(chunk_frames=FRAMES))
GUIDED = change(ONE, rollout=dict(sampler="unipc", num_inference_steps=3, guidance_scale=3.0))
run = quick(rollout, static_argnames="config")


def sparse(policy):
    return change(ONE, sparsity=dataclasses.replace(SPARSE, policy=policy))


def with_cache(config, frames=FRAMES):
    """The state that a longer plan begins with: slots for every frame."""
    state = initial_state(config, 2, FRAMES, KEYS)
    shape = config.model, Grid.of(config), config.cache, not config.sparsity.dense, state.cache.k.shape[1], frames
    return dataclasses.replace(state, cache=kv.empty(*shape))


def text_of(config):
    return make_text(MODEL, 2 * branches(config))


@pytest.mark.parametrize("config", [GUIDED, *map(sparse, ("light_forcing", "window", "oracle"))])
def test_it_equals_a_video_with_a_cache_bitwise(config):
    state, other = initial_state(config, 2, FRAMES, KEYS), with_cache(config)
    noise, text = draw(2, FRAMES, *FRAME), text_of(config)
    assert state.cache.k.size == 0 and other.cache.k.size > 0
    got, after = run(MODEL, text, noise, state, config)
    want, cached = run(MODEL, text, noise, other, config)
    np.testing.assert_array_equal(got, want)
    assert float(jnp.abs(got - noise).max()) > 0.1 and float(jnp.abs(cached.cache.k).max()) > 0.1
    for done in (after, cached):
        assert (int(done.cache.end), int(done.chunk)) == (FRAMES, 1)


def test_a_stream_is_that_one_chunk():
    config, text, noise = sparse("topk"), text_of(ONE), draw(2, FRAMES, *FRAME)
    state = initial_state(config, 2, FRAMES, KEYS)
    want, _ = run(MODEL, text, noise, with_cache(config), config)
    ((got, last),) = stream(MODEL, text, noise, fork(state), config, FRAMES)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert (int(last.cache.end), int(last.chunk)) == (FRAMES, 1)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_every_block_of_one_chunk_is_full_attention(implementation):
    full = change(sparse("full"), sparsity=dict(implementation=implementation))
    noise, text = draw(2, FRAMES, *FRAME), text_of(full)
    got, want = (run(MODEL, text, noise, initial_state(c, 2, FRAMES, KEYS), c)[0] for c in (full, ONE))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_pass_fills_a_cache_that_is_not_there(monkeypatch):
    traced = []
    monkeypatch.setattr("lf_jax.chunk.one_pass", lambda *args: traced.append(args[1].shape) or dit.forward(*args))
    config, text, noise = sparse("light_forcing"), text_of(ONE), draw(2, FRAMES, *FRAME)

    def passes(call, state):
        traced.clear()
        jax.eval_shape(call, state)
        return len(traced)

    bare, cached = initial_state(config, 2, FRAMES, KEYS), with_cache(config)
    make, fill = partial(rollout, MODEL, text, noise, config=config), partial(prefill, MODEL, text, noise, config=config)
    assert [passes(make, state=s) for s in (bare, cached)] == [1, 2]  # the steps are one scan
    assert [passes(fill, state=s) for s in (bare, cached)] == [0, 1]


@pytest.mark.parametrize("config", [ONE, sparse("light_forcing")])
def test_memory_does_not_grow_with_the_layers(config):
    """XLA's own account of the compiled step: no keys and values of all layers, neither kept nor on their way."""

    def step(layers, cached):
        model = dataclasses.replace(SETTINGS, layers=layers)
        settings = change(config, model=model)
        weights = jax.eval_shape(lambda: dit.WanDiT(model, rngs=nnx.Rngs(0)))
        text = jax.eval_shape(dit.text_cache, weights, jnp.zeros((2, 4, model.text_dim)))
        state = jax.eval_shape(
            lambda: (with_cache if cached else partial(initial_state, batch=2, frames=FRAMES, keys=KEYS))(settings)
        )
        budget = state.budgets and dataclasses.replace(state.budgets, blocks=jax.ShapeDtypeStruct((), jnp.int32))
        program = compiled_chunk.lower(weights, text, None, state.cache, KEYS, state.chunk, budget, settings, FRAMES)
        return program.compile({"xla_backend_optimization_level": 0}).memory_analysis().temp_size_in_bytes

    grid = Grid.of(config)
    layer = 2 * 2 * FRAMES * grid.padded_frame * SETTINGS.dim * 4  # keys and values of one layer, batch 2, float32
    assert step(24, cached=False) - step(4, cached=False) < layer
    assert step(24, cached=True) - step(4, cached=True) > 19 * layer  # the measure sees them where they are


def test_a_window_keeps_its_cache():
    """A windowed video goes on past its plan, so its only chunk has a future."""
    windowed = change(ONE, cache=dict(window=7))
    assert initial_state(windowed, 2, FRAMES, KEYS).cache.frames == 7
    assert initial_state(ONE, 2, 2 * FRAMES, KEYS).cache.frames == 2 * FRAMES
    image = change(rollout=dict(independent_first_frame=True))
    assert [initial_state(image, 2, frames, KEYS).cache.frames for frames in (1, 4)] == [0, 4]


@pytest.mark.parametrize("config", [ONE, sparse("light_forcing")])
def test_nothing_can_follow(config):
    text, noise = text_of(config), draw(2, FRAMES, *FRAME)
    start = initial_state(config, 2, FRAMES, KEYS)
    ends = [run(MODEL, text, noise, start, config)[1], prefill(MODEL, text, noise, start, config)]
    for state in ends:  # generated or given, the video is complete
        jax.tree.map(np.testing.assert_array_equal, state.cache, ends[0].cache)
        for call in (rollout, prefill):
            with pytest.raises(ValueError, match="frames=5 after 5 exceed the 5 frames that the state has room for"):
                call(MODEL, text, noise, state, config)
        with pytest.raises(ValueError, match="frames=5 after 5 exceed the 5"):
            stream(MODEL, text, None, state, config, FRAMES)
        assert np.isnan(run(MODEL, text, noise, state, config)[0]).all()  # traced: it cannot raise
    with pytest.raises(ValueError, match="frames=10 after 0 exceed the 5"):
        rollout(MODEL, text, draw(2, 10, *FRAME), start, config)
    shorter = change(rollout=dict(chunk_frames=1))  # several chunks would not see each other
    with pytest.raises(ValueError, match="frames=5 after 0 exceed the 1 frames"):
        rollout(MODEL, text, noise, initial_state(ONE, 2, FRAMES, KEYS), shorter)


@pytest.mark.parametrize("sparsity", [Sparsity(), small.CONFIG.sparsity])
def test_from_prompt_to_pixels_saved_and_resumed(sparsity, tmp_path):
    pipe, parts = small.pipe(), dict(rollout=Rollout(chunk_frames=3, timesteps=(1000.0, 500.0)), sparsity=sparsity)
    (chunk,) = pipe.stream("a red ball", seed=3, num_frames=9, **parts)
    assert chunk.frames.shape == (1, 9, 32, 48, 3) and chunk.state.rollout.cache.k.size == 0
    config = pipe.configure(9, None, parts)
    state = begin(config, pipe.keys(["a red ball"], 3))
    for saved, name in ((state, "begun"), (chunk.state, "complete")):
        checkpoint.save_state(tmp_path / name, saved)
        loaded = checkpoint.load_state(tmp_path / name)
        assert jax.tree.structure(loaded) == jax.tree.structure(saved)
        assert loaded.rollout.cache.k.shape == saved.rollout.cache.k.shape
    (again,) = pipe.stream("a red ball", state=checkpoint.load_state(tmp_path / "begun"), num_frames=9, **parts)
    np.testing.assert_array_equal(again.frames, chunk.frames)
    done = partial(checkpoint.load_state, tmp_path / "complete")
    with pytest.raises(ValueError, match="num_frames=9 are complete"):
        pipe.stream("a red ball", state=done(), num_frames=9, **parts)
    with pytest.raises(ValueError, match="num_frames=21 but state was planned for 9 frames"):
        list(pipe.stream("a red ball", state=done(), num_frames=21, **parts))
    with pytest.raises(ValueError, match="state was made with other settings"):
        pipe.stream("a red ball", state=done(), num_frames=21, cache=Cache(window=6), **parts)
    with pytest.raises(ValueError, match="num_frames=9 are complete"):
        generate(pipe.model, pipe.vae, pipe.text(["a red ball"], config), state, config, given=jnp.asarray(chunk.latents))


def test_the_plan_shows_it(capsys):
    for preset in ("wan_1_3b", "wan_14b"):
        config = presets.load(preset)
        budget = plan.memory(config)
        found = {item.name: item.bytes for item in budget.items}
        assert found["KV cache"] == budget.cache_bytes == 0 and "means of key blocks" not in found
        longer = plan.memory(dataclasses.replace(config, video=dataclasses.replace(config.video, num_frames=165)))
        frame = 2 * 2 * config.model.layers * Grid.of(config).frame_tokens * config.model.dim * 2  # k, v; guidance; bfloat16
        assert longer.cache_bytes == 42 * frame and longer.frame_bytes == budget.frame_bytes == frame
        # a pass that fills a cache makes every layer's keys and values; this plan has none
        filling = {item.name: item.bytes for item in longer.items}["activations"]
        assert found["activations"] < 21 * frame < filling
    assert cli.main(["plan", "--model", "wan_14b", "--memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "\nfits into 80.0 GiB" in out and "the cache could hold" not in out and "one chunk: no past" in out
