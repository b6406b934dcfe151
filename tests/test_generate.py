"""From prompts to pixels with the smallest model: the Python API, states, inputs, and what stays in memory."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import CONFIG

import lf_jax
from lf_jax import checkpoint, cli, loading, pipeline, presets, vae
from lf_jax.chunk import compiled_chunk
from lf_jax.commands.outputs import recipe_of
from lf_jax.config import Cache, Rollout, Sparsity
from lf_jax.generate import fetch

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def pipe():
    return small.pipe()


@pytest.fixture(scope="module")
def video(pipe):
    return pipe(PROMPT, seed=3)


def frames_of(stream) -> list[np.ndarray]:
    return [np.asarray(chunk.frames) for chunk in stream]


def test_a_video_is_uint8_of_the_size_asked_for(video):
    assert (video.shape, video.dtype) == ((1, 33, 32, 48, 3), np.uint8)
    assert video.std() > 10


def test_a_stream_is_the_same_video_chunk_by_chunk(pipe, video):
    chunks = frames_of(pipe.stream(PROMPT, seed=3))
    assert [chunk.shape[1] for chunk in chunks] == [9, 12, 12]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), video)


def test_seed_and_prompt_each_change_the_video(pipe, video):
    assert (pipe(PROMPT, seed=np.int64(4)) != video).mean() > 0.5
    assert (pipe("a blue ball", seed=3) != video).mean() > 0.5


def test_a_video_does_not_depend_on_its_batch(pipe, video):
    both = pipe(["waves", PROMPT], seed=np.array([0, 3]))
    assert both.shape[0] == 2
    assert np.abs(both[1].astype(int) - video[0]).max() <= 1  # matrix products of another size round otherwise
    assert (both[0] != both[1]).mean() > 0.5


def test_saved_state_goes_on_bitwise(pipe, video, tmp_path):
    stream = pipe.stream(PROMPT, seed=3)
    first = next(stream)
    lf_jax.save_state(tmp_path / "a.state", first.state)
    kept = lf_jax.fork(first.state)
    start = np.asarray(first.frames)
    rest = frames_of(stream)  # consumes first.state
    for state in (kept, lf_jax.load_state(tmp_path / "a.state")):
        again = frames_of(pipe.stream(PROMPT, state=state))
        assert len(again) == 2
        np.testing.assert_array_equal(np.concatenate(again, axis=1), np.concatenate(rest, axis=1))
    np.testing.assert_array_equal(np.concatenate([start, *rest], axis=1), video)


def test_the_step_is_compiled_once_for_all_chunks(pipe):
    list(pipe.stream(PROMPT))
    before = compiled_chunk._cache_size()
    list(pipe.stream("another prompt", seed=9))
    assert compiled_chunk._cache_size() == before


def test_the_next_chunk_is_under_way_while_one_is_used(pipe):
    """And the device never holds the frames of more than these two chunks."""
    asked, seen = [], []
    gc.collect()

    def watched():
        for chunk in pipe.stream(PROMPT, seed=3, num_frames=57, cache=Cache(window=6), sparsity=Sparsity(policy="dense")):
            asked.append(chunk.frames.shape[1])
            yield chunk

    for chunk in fetch(watched()):
        assert isinstance(chunk.frames, np.ndarray)
        seen.append(len(asked))
        del chunk
        pixels = {a.unsafe_buffer_pointer() for a in jax.live_arrays() if a.dtype == np.uint8 and a.ndim == 5}
        assert len(pixels) <= 2
    assert asked == [9, 12, 12, 12, 12] and seen == [2, 3, 4, 5, 5]


def test_the_encoder_is_gone_after_encoding(pipe):
    encoded = pipe.encode(["one", "two", "one"])
    gc.collect()
    assert encoded.prompts == ("one", "two")
    assert isinstance(encoded.values, np.ndarray)
    table = (CONFIG.text.vocab, CONFIG.text.dim)
    assert all(array.shape != table for array in jax.live_arrays())


def test_embeddings_replace_the_encoder(pipe, video, monkeypatch):
    encoded = pipe.encode(PROMPT)
    monkeypatch.setattr(pipe, "_latest", None)
    monkeypatch.setattr(loading.Source, "text", lambda self: pytest.fail("the encoder was loaded"))
    np.testing.assert_array_equal(pipe(PROMPT, seed=3, embeddings=encoded), video)
    with pytest.raises(ValueError, match="not among the 1 encoded prompts.*waves"):
        pipe("waves", embeddings=encoded)


def test_a_converted_folder_makes_the_same_video(pipe, video, tmp_path):
    small.save(tmp_path)
    loaded = lf_jax.load(tmp_path)
    assert loaded.config == CONFIG
    np.testing.assert_array_equal(loaded(PROMPT, seed=3), video)
    assert loaded.source.fingerprint() == pipe.encode(PROMPT).encoder
    with pytest.raises(ValueError, match=r"a seed of random weights \(0\) has no use"):
        lf_jax.load(tmp_path, seed=0)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, layers=3))
    with pytest.raises(ValueError, match="model.layers=3 but .* has 2"):
        lf_jax.load(tmp_path, other)


def test_settings_of_a_preset_with_the_models_of_another():
    source = loading.find("tiny", loading.config_of("tiny", pipeline.presets.load("longlive_1_3b")))
    assert source.config.cache == Cache(window=12, sink=3)
    assert source.config.model == pipeline.presets.load("tiny").model


def test_a_preset_takes_any_autoencoder_of_its_latents_by_name():
    found = loading.find("tiny", vae="light")
    assert found.config.vae == dataclasses.replace(vae.PARTS["light"], dtype=CONFIG.vae.dtype) and found.config.vae.base == 24
    chosen = presets.load("longlive_1_3b")
    assert loading.config_of("tiny", chosen, "tiny").vae.kind == "tiny" and loading.config_of("tiny", chosen).vae.kind == "wan"
    for name, part in vae.PARTS.items():
        assert (part.temporal_stride, part.spatial_stride, part.channels) == (4, 8, 16), name


@pytest.mark.parametrize("command", ["sample", "stream", "warmup"])
def test_commands_start_from_the_config_of_the_chosen_autoencoder(command):
    words = ["--model", "tiny", "--vae", "light", "--vae.dtype", "float16"]
    words += {"sample": ["--output", "a"], "stream": ["--output", "a", "--prompt", PROMPT], "warmup": []}[command]
    parsed = cli.parse(command, words)
    assert parsed.vae == "light" and parsed.settings.vae == dataclasses.replace(vae.PARTS["light"], dtype="float16")
    assert parsed.settings.model == presets.load("tiny").model


def test_a_model_takes_the_autoencoder_of_another_folder(pipe, tmp_path):
    model, other = small.save(tmp_path / "model"), tmp_path / "other"
    part = dataclasses.replace(CONFIG.vae, widths=(8, 8, 8, 4))
    module = loading.random_module(part, 7)
    checkpoint.save_component(other, "vae", part, module)
    found = lf_jax.load(model, vae=other)
    assert found.config == dataclasses.replace(CONFIG, vae=part)
    jax.tree.map(np.testing.assert_array_equal, found.vae, module)
    jax.tree.map(np.testing.assert_array_equal, found.model, pipe.model)
    recipes = {recipe_of(CONFIG, str(model), 0, (), str(folder)) for folder in (model, other)}
    assert len(recipes | {recipe_of(CONFIG, str(model), 0, ())}) == 3
    assert loading.find("tiny", vae=other).place("vae") == other and loading.find("tiny", vae=other).place("dit") is None
    (other / "vae" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="other/vae/model.safetensors"):
        loading.find(model, vae=other).check("vae")


@pytest.mark.parametrize(
    ("source", "config", "chosen", "message"),
    [
        ("folder", None, "light", "vae='light' has random weights, and .* is a converted folder"),
        ("tiny", None, "heavy", "vae='heavy' must be a converted folder, or with a preset one of wan, light, tiny"),
        ("folder", None, ".", "vae"),
        ("tiny", CONFIG, "light", "vae.kind='tiny' but light has 'wan'"),
        ("folder", presets.load("tiny"), "folder", "vae.kind='wan' but .* has 'tiny'"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_named(source, config, chosen, message, tmp_path):
    folder = small.save(tmp_path)
    source, chosen = (folder if name == "folder" else name for name in (source, chosen))
    with pytest.raises(ValueError, match=message):
        loading.find(source, config, vae=chosen)


def test_a_video_is_extended(pipe, video):
    start = np.asarray(video[:, :9])
    longer = pipe(PROMPT, seed=3, initial_video=start, num_frames=33)
    assert longer.shape[1] == 33
    chunks = frames_of(pipe.stream(PROMPT, seed=3, initial_video=start[0], num_frames=33))
    assert [chunk.shape[1] for chunk in chunks] == [9, 12, 12]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), longer)


def test_initial_latents_that_were_generated_change_nothing(pipe, video):
    """Committing a chunk's latents is what the rollout does with them, at context timestep 0."""
    stream = pipe.stream(PROMPT, seed=3)
    latents = np.asarray(next(stream).latents)
    again = pipe(PROMPT, seed=3, initial_latents=jnp.asarray(latents))
    np.testing.assert_array_equal(again, video)


def test_an_image_becomes_the_first_frame(pipe):
    image = np.full((32, 48, 3), 128, np.uint8)
    layout = Rollout(independent_first_frame=True)
    chunks = frames_of(pipe.stream(PROMPT, initial_image=image, rollout=layout, num_frames=25))
    assert [chunk.shape[1] for chunk in chunks] == [1, 12, 12]
    with pytest.raises(ValueError, match="1 initial frames must be whole chunks.*independent_first_frame"):
        pipe(PROMPT, initial_image=image)


def test_guidance_encodes_the_negative_prompt_too(pipe):
    guided = Rollout(sampler="euler", num_inference_steps=2, guidance_scale=30.0)
    dense = Sparsity(policy="dense")
    runs = [pipe(PROMPT, negative_prompt=p, rollout=guided, sparsity=dense, num_frames=9) for p in ("ugly", "grey")]
    assert runs[0].shape == (1, 9, 32, 48, 3)
    assert (runs[0] != runs[1]).mean() > 0.1
    assert pipe._latest.prompts == (PROMPT, "grey")


def test_a_window_goes_on_past_the_plan(pipe):
    parts = {"cache": Cache(window=6, sink=1), "sparsity": Sparsity(policy="dense")}
    *_, last = pipe.stream(PROMPT, num_frames=33, **parts)
    chunks = frames_of(pipe.stream("a storm", state=last.state, num_frames=57, **parts))
    assert [chunk.shape[1] for chunk in chunks] == [12, 12]


@pytest.mark.parametrize(
    "call, message",
    [
        ({"num_frames": 80}, "num_frames=80 does not fit.*69 or 81"),
        ({"num_frames": 5}, "num_frames=5 does not fit.*are 9"),
        ({"seed": [1, 2]}, "seed holds 2 numbers, expected one, or 1"),
        ({"prompt": []}, r"prompt=\[\] must be a string, or one or more"),
        ({"negative_prompt": "grey"}, "negative_prompt='grey' has no use at .*guidance_scale=1.0"),
        ({"guidance_scale": 3.0}, "unknown argument 'guidance_scale'.*rollout"),
        ({"cache": {"window": 6}}, r"cache={'window': 6} must be an lf_jax.config.Cache"),
        ({"sparsity": Sparsity(policy="best")}, "policy='best' must be 'dense', a function, or one of"),
        ({"sparsity": Sparsity(policy="topk", implementation="quantum")}, "implementation='quantum' must be one of"),
        ({"model": CONFIG.model}, "model cannot change after loading"),
        ({"initial_video": np.zeros((9, 32, 40, 3), np.uint8)}, r"shape \(1, 9, 32, 40, 3\), expected .*32, 48, 3"),
        ({"initial_video": np.zeros((9, 32, 48, 3), np.float32)}, "dtype float32, expected uint8"),
        ({"initial_video": np.zeros((13, 32, 48, 3), np.uint8)}, r"13 initial frames .* expected one of \[9, 21\]"),
        ({"initial_video": np.zeros((33, 32, 48, 3), np.uint8)}, r"33 initial frames .* expected one of \[9, 21\]"),
        ({"initial_latents": jnp.zeros((1, 4, 4, 6, 16))}, r"4 initial latent frames .* expected one of \[3, 6\]"),
        ({"initial_latents": jnp.zeros((1, 3, 4, 5, 16))}, r"\(1, 4, 5, 16\), expected \(1, 4, 6, 16\)"),
        ({"initial_latents": jnp.zeros((1, 3, 4, 6, 16)), "initial_image": "a.png"}, "image and latents exclude each other"),
    ],
)
def test_what_does_not_fit_is_named(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe.stream(**{"prompt": PROMPT} | call)


def test_a_state_of_other_settings_is_refused(pipe):
    *_, last = pipe.stream(PROMPT)
    with pytest.raises(ValueError, match="are complete in this state"):
        pipe.stream(PROMPT, state=last.state)
    with pytest.raises(ValueError, match="state was made with other settings.*expected float32"):
        pipe.stream(PROMPT, state=last.state, cache=Cache(window=6, sink=1))
    with pytest.raises(ValueError, match="seed=0 has no use with a state"):
        pipe.stream(PROMPT, state=last.state, seed=0)
    with pytest.raises(ValueError, match="state holds 1 videos, expected 2"):
        pipe.stream([PROMPT, "two"], state=last.state)


def test_a_folder_loads_in_another_dtype(pipe, tmp_path):
    small.save(tmp_path)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="bfloat16"))
    loaded = lf_jax.load(tmp_path, config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.model)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.vae)} == {"float32"}
    assert loaded(PROMPT, num_frames=9).shape == (1, 9, 32, 48, 3)
