"""`lf-jax latents`: videos to folders of latents, which are whole or said to be unfinished."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import small

from lf_jax import checkpoint, cli, text, vae
from lf_jax import world as worlds
from lf_jax.checkpoint import component
from lf_jax.config import Config, Video
from lf_jax.train.data import Folder, Latents, World, shards
from lf_jax.video import write_mp4

BFLOAT16 = np.dtype("bfloat16")
VIDEO = ("--video.num-frames", "9")
CONFIG: Config = dataclasses.replace(small.CONFIG, video=Video(height=32, width=48, num_frames=9))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a transformer of zeros, for its config, and an autoencoder; to compile no random initialisation."""
    folder, draw = tmp_path_factory.mktemp("model"), np.random.default_rng(1).normal
    zeros = {name: np.zeros(shape, np.float32) for name, shape in checkpoint.shapes(CONFIG.model).items()}
    checkpoint.save_component(folder, "dit", CONFIG.model, zeros)
    weights = {name: draw(0, 0.2, shape).astype(np.float32) for name, shape in checkpoint.shapes(CONFIG.vae).items()}
    checkpoint.save_component(folder, "vae", CONFIG.vae, weights)
    (folder / "text").mkdir()
    (folder / "text" / "spiece.model").write_bytes(text.tiny_model())
    checkpoint.save_settings(folder, CONFIG)
    return str(folder)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 256, (7, 12, 4, 6, 3)).astype(np.uint8).repeat(8, 2).repeat(8, 3)
    for n, frames in enumerate(noise):
        write_mp4(folder / f"{n}.mp4", frames, 16)
        (folder / f"{n}.txt").write_text(f"video {n % 5}")
    return str(folder)


def run(*words, code: int = 0) -> None:
    assert cli.main([str(word) for word in ("latents", *words)]) == code


@pytest.fixture(scope="module")
def made(model, videos, tmp_path_factory) -> pathlib.Path:
    """All seven videos in two shards of four, float32."""
    output = tmp_path_factory.mktemp("made") / "latents"
    words = ("--model", model, "--data", videos, "--output", output, *VIDEO)
    run(*words, "--batch", 2, "--shard", 4, "--dtype", "float32")
    return output


@pytest.fixture
def copy(made, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(made, tmp_path / "copy"))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_those_of_the_encoder_bitwise(made, videos, model):
    assert sorted(files(made)) == ["manifest.json", "prompts.txt", "shard-00000.safetensors", "shard-00001.safetensors"]
    arrays, captions = Folder(videos).examples(CONFIG, range(8))
    encode, autoencoder = jax.jit(vae.encode), checkpoint.load_component(model, "vae")[1]
    expected = np.concatenate([encode(autoencoder, arrays["video"][at : at + 2]) for at in range(0, 8, 2)])
    source = Latents(str(made), seed=5, model=model)
    assert source.items(CONFIG) == 7
    read, prompts = source.examples(CONFIG, range(7))
    assert read["latents"].dtype == np.float32
    order = [next(n for n in range(7) if np.array_equal(expected[n], latents)) for latents in read["latents"]]
    assert sorted(order) == list(range(7)) != order
    assert prompts == [captions[n] for n in order]
    assert {*(made / "prompts.txt").read_text().splitlines()} == {f"video {n}" for n in range(5)}
    batch = source.batch(CONFIG, 2, 3)
    assert batch.keys() == {"latents", "ids", "lengths"} and batch["latents"].shape == (3, 3, 4, 6, 16)
    again = Latents(str(made), seed=5).batch(CONFIG, 2, 3)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_bfloat16_is_the_default_and_rounds_once(made, model, videos, tmp_path, capsys):
    words = ("--model", model, "--data", videos, "--output", tmp_path, *VIDEO)
    run(*words, "--batch", 2, "--items", 4)
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}\n"
    assert "shard 0: 4 videos; 0.000 GB in " in shown.err
    exact, rounded = (shards.tensorfile.TensorFile(shards.shard_path(f, 0)).view("latents") for f in (made, tmp_path))
    assert rounded.dtype == BFLOAT16
    np.testing.assert_array_equal(rounded, exact.astype(BFLOAT16))


def test_an_interrupted_command_goes_on(model, videos, made, tmp_path, monkeypatch, capsys):
    words = ("--model", model, "--data", videos, "--output", tmp_path, *VIDEO, "--batch", 2, "--shard", 4, "--dtype", "float32")
    write = shards.write_shard

    def interrupted(*arguments) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_shard", interrupted)
    run(*words, code=cli.INTERRUPTED)
    assert sorted(files(tmp_path)) == ["shard-00000.safetensors"]
    with pytest.raises(ValueError, match="is unfinished .1 shards.: run its `lf-jax latents` again"):
        Latents(str(tmp_path)).items(CONFIG)
    monkeypatch.setattr(shards, "write_shard", write)
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    run(*words)
    assert "1 of 2 shards are complete already" in capsys.readouterr().err
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert files(tmp_path) == files(made)


def test_a_killed_command_goes_on(model, videos, made, tmp_path):
    words = ("--model", model, "--data", videos, "--output", tmp_path, *VIDEO, "--batch", 1, "--shard", 1, "--dtype", "float32")
    command = [sys.executable, "-m", "lf_jax", "latents", *map(str, words), "--items", "500"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        seen = next(line for line in process.stderr if line.startswith("shard 2"))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, seen
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert 3 <= len(kept) < 500 and not (tmp_path / "manifest.json").exists()
    items = len(kept) + 2
    run(*words, "--items", items)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert kept.items() <= after.items() and len(after) == items
    assert Latents(str(tmp_path)).items(CONFIG) == items
    assert not list(tmp_path.glob(".*"))


def test_more_items_are_added_to_what_is_there(model, videos, made, copy, capsys):
    words = ("--model", model, "--data", videos, "--output", copy, *VIDEO, "--batch", 2, "--shard", 4, "--dtype", "float32")
    before = files(copy)
    run(*words)
    assert "2 of 2 shards are complete already" in capsys.readouterr().err and files(copy) == before
    run(*words, "--items", 9)
    assert "1 of 3 shards are complete already" in capsys.readouterr().err
    after = files(copy)
    assert Latents(str(copy)).items(CONFIG) == 9
    assert after["shard-00000.safetensors"] == before["shard-00000.safetensors"]
    rows = [shards.tensorfile.TensorFile(shards.shard_path(folder, 1)).view("latents") for folder in (made, copy)]
    np.testing.assert_array_equal(*(part[:3] for part in rows))
    run(*words, "--items", 4, code=cli.BAD_INPUT)
    assert "shard-00001.safetensors is one more than 4 items need: --overwrite" in capsys.readouterr().err
    assert files(copy) == after
    run(*words, "--items", 4, "--overwrite")
    assert Latents(str(copy)).items(CONFIG) == 9  # this process remembers the folder as it opened it
    assert shards.read_manifest(copy)[1] == tuple(shards.read_manifest(made)[1][:4])


def test_latents_of_other_options_are_not_mixed(model, videos, copy, capsys):
    words = ("--model", model, "--data", videos, "--output", copy, *VIDEO, "--batch", 2, "--shard", 4)
    before = files(copy)
    for other in ((), ("--dtype", "float32", "--seed", 1), ("--dtype", "float32", "--video.fps", 8, "--video.num-frames", 5)):
        run(*words, *other, code=cli.BAD_INPUT)
        assert "was made with other options than the rest of its folder: --overwrite replaces it" in capsys.readouterr().err
    assert files(copy) == before
    run(*words, "--overwrite")
    assert shards.read_manifest(copy)[0].dtype == "bfloat16"


def test_damage_is_found_when_a_folder_is_opened(copy, model):
    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Latents(str(copy)).items(CONFIG)

    shard, manifest = copy / "shard-00001.safetensors", copy / "manifest.json"
    whole, listing = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(whole[:-8])
    fails("shard-00001.safetensors is truncated")
    shard.unlink()
    fails("no such file: .*shard-00001.safetensors")
    shard.write_bytes(whole)
    content = json.loads(listing)
    for key, value, message in (
        ("format", "other", "has format 'other', this version reads 'lf_jax.latents.1'"),
        ("prompts", content["prompts"][:-1], "lists 6 items that are not those of its shards .7."),
        ("seed", 3, None),
        ("dtype", "bfloat16", "made with other options"),
    ):
        manifest.write_text(json.dumps(content | {key: value}))
        if message:
            fails(message)
    manifest.write_text("{")
    fails("manifest.json is not a manifest of latents")
    manifest.unlink()
    fails("unfinished")
    for path in copy.iterdir():
        path.unlink()
    fails("is not a folder of latents")


def test_latents_of_another_autoencoder_or_size_are_refused(made, model, tmp_path):
    def fails(config: Config, message: str, model: str | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            Latents(str(made), model=model).batch(config, 0, 1)

    part = CONFIG.vae
    shifted = dataclasses.replace(CONFIG, vae=dataclasses.replace(part, mean=(0.5, *part.mean[1:])))
    fails(shifted, r"made with vae.mean \[-0.7571, .*, expected \[0.5, ")
    fails(small.CONFIG, "made with video.num_frames 9, expected 33")
    other = dataclasses.replace(CONFIG, video=Video(height=64, width=48, num_frames=9, fps=8))
    fails(other, "video.height 32, expected 64; video.fps 16, expected 8")
    lower = dataclasses.replace(CONFIG, vae=dataclasses.replace(part, dtype="bfloat16"))
    assert Latents(str(made), model=model).items(lower) == 7  # computing in another dtype makes no other autoencoder

    arrays = {name: np.array(array) for name, array in component.stored(model, "vae").items()}
    checkpoint.save_component(tmp_path / "stored", "vae", lower.vae, {k: v.astype(BFLOAT16) for k, v in arrays.items()})
    assert Latents(str(made), model=str(tmp_path / "stored")).items(lower) == 7
    name = max(arrays, key=lambda name: arrays[name].size)
    arrays[name].ravel()[7] += 0.25
    checkpoint.save_component(tmp_path / "changed", "vae", part, arrays)
    fails(CONFIG, "were made by autoencoder [0-9a-f]{12}, not by [0-9a-f]{12} of .*changed", str(tmp_path / "changed"))


def test_the_world_can_be_encoded(model, tmp_path, capsys):
    words = ("--model", model, "--data", "world", "--output", tmp_path, "--batch", 4, "--dtype", "float32")
    run(*words, "--video.num-frames", 33, code=cli.BAD_INPUT)
    assert "--data world never ends: expected --items" in capsys.readouterr().err
    run(*words, "--video.num-frames", 33, "--items", 3, "--split", "eval", "--seed", 6)
    world = worlds.World(height=32, width=48, num_frames=33)
    arrays, captions = World(world, seed=6, split="eval").examples(small.CONFIG, range(4))
    expected = jax.jit(vae.encode)(checkpoint.load_component(model, "vae")[1], arrays["video"])[:3]
    np.testing.assert_array_equal(shards.tensorfile.TensorFile(shards.shard_path(tmp_path, 0)).view("latents"), expected)
    assert shards.read_manifest(tmp_path)[1] == tuple(captions[:3])


def test_an_autoencoder_alone_is_enough(model, videos, made, tmp_path):
    checkpoint.save_component(tmp_path / "alone", "vae", CONFIG.vae, component.stored(model, "vae"))
    checkpoint.save_settings(tmp_path / "alone", CONFIG)
    words = ("--model", tmp_path / "alone", "--data", videos, "--output", tmp_path / "out", "--batch", 2, "--shard", 4)
    run(*words, "--dtype", "float32")
    assert files(tmp_path / "out") == files(made)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--batch", 0), "--batch 0 must be positive"),
        (("--batch", 3, "--shard", 4), "--shard 4 must be a multiple of --batch 3"),
        (("--items", 0), "--items 0 must be positive"),
        (("--video.num-frames", 10), "num_frames=10 must be 1 . a multiple of 4"),
        (("--data", "absent"), "no such folder: absent"),
        (("--split", "eval"), "--split eval has no use with a folder of videos"),
    ],
)
def test_bad_options_end_before_anything_is_loaded(words, message, model, videos, tmp_path, capsys):
    run("--model", model, "--data", videos, "--output", tmp_path / "new", *VIDEO, *words, code=cli.BAD_INPUT)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
