"""Sources of training data: the same examples for the same seed and step, every item once an epoch, files as they are."""

import dataclasses
import json
import pathlib
import re
import threading
import time

import av
import jax
import numpy as np
import pytest

from lf_jax import checkpoint, presets, text
from lf_jax import world as worlds
from lf_jax.config import Config, Text, Video
from lf_jax.train.data import Folder, Prompts, World, ahead, clips
from lf_jax.train.data.source import shuffled
from lf_jax.video import read_video, write_mp4

SIZE = Video(height=32, width=48, num_frames=9)
CONFIG: Config = dataclasses.replace(presets.load("tiny"), video=SIZE)
WORLD = worlds.World(height=32, width=48, num_frames=33)
FILMS = {"a.mp4": 9, "b.MP4": 20, "c.mov": 33, "more/d.webm": 21, "more/e.mp4": 16}  # frames
STEP = 7  # how much brighter each frame is than the one before


def brightening(frames: int, height: int = 32, width: int = 48, first: int = 0) -> np.ndarray:
    """Frames that say which they are, on a picture that says where is left, right, top and bottom."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([first + t * STEP, 255 * x // width, 255 * y // height], axis=-1).astype(np.uint8)


def write(path: pathlib.Path, frames: np.ndarray, rate: int = 16, codec: str = "libx264", turned: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"g": "6"}  # key frames, so that there is something to seek to
        stream.bit_rate = 2_000_000
        if turned:
            stream.set_display_rotation(turned)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def numbers(pixels: np.ndarray) -> list[int]:
    """Which frames of `brightening` these are; of pixels 0..255."""
    return [round(float(value)) for value in pixels[..., 0].mean((-2, -1)).ravel() / STEP]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """The `FILMS`, at 16 frames a second."""
    root = tmp_path_factory.mktemp("videos")
    for name, frames in FILMS.items():
        write(root / name, brightening(frames), codec="libvpx-vp9" if "webm" in name else "libx264")
        (root / name).with_suffix(".txt").write_text(f" a film\n called {name}\n")
    (root / "notes.txt").write_text("belongs to no video")
    return str(root)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# --- order


@pytest.mark.parametrize("count", [1, 5, 100])
def test_every_item_comes_once_an_epoch(count):
    epochs = [shuffled(3, count, range(e * count, (e + 1) * count)) for e in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 100 or len({tuple(epoch) for epoch in epochs}) == 4
    assert shuffled(3, count, [2 * count, count - 1]) == [epochs[2][0], epochs[0][-1]]


def test_the_order_is_that_of_the_seed():
    assert shuffled(1, 50, range(50)) == shuffled(1, 50, range(50)) != shuffled(2, 50, range(50))
    assert shuffled(0, 8, range(8)) == [3, 2, 1, 6, 0, 7, 4, 5]  # for ever: a resumed run may have another numpy


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_checked(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must lie in"):
        World(seed=seed)


# --- folders of videos


def test_clips_of_a_folder_are_frames_of_its_files(folder):
    source = Folder(folder, seed=1)
    assert source.items(CONFIG) == 5
    arrays, captions = source.examples(CONFIG, range(10))
    assert arrays["video"].shape == (10, 9, 32, 48, 3) and arrays["video"].dtype == np.float32
    assert sorted(captions[:5]) == sorted(captions[5:]) == [f"a film called {name}" for name in sorted(FILMS)]
    starts = set()
    for video, caption in zip(arrays["video"], captions, strict=True):
        pixels = video * 127.5 + 127.5
        start = numbers(pixels)[0]
        assert numbers(pixels) == list(range(start, start + 9))
        assert start + 9 <= FILMS[caption.removeprefix("a film called ")]
        np.testing.assert_allclose(pixels[:, 4:-4, 4:-4, 1:], brightening(9)[:, 4:-4, 4:-4, 1:], atol=24)
        assert np.abs(pixels - brightening(9, first=start * STEP)).mean() < 8
        starts.add((caption, start))
    assert len(starts) > 5  # another clip of the same file in the next epoch


def test_batches_are_a_function_of_seed_and_step(folder):
    source = Folder(folder, seed=1)
    run = [source.batch(CONFIG, step, 3) for step in range(4)]  # 12 positions: batches straddle epochs of 5
    assert same(Folder(folder, seed=1).batch(CONFIG, 2, 3), run[2])
    assert not same(Folder(folder, seed=2).batch(CONFIG, 2, 3), run[2])
    ids = np.concatenate([batch["ids"] for batch in run])
    assert len({tuple(row) for row in ids[:5]}) == len({tuple(row) for row in ids[5:10]}) == 5
    reader = text.Tokenizer(text.tiny_model(), length=CONFIG.text.length)
    arrays, captions = source.examples(CONFIG, range(3))
    assert same(run[0], arrays | dict(zip(("ids", "lengths"), reader(captions), strict=True)))


def test_longer_and_shorter_clips_can_be_asked_for(folder):
    assert Folder(folder, frames=5).batch(CONFIG, 0, 2)["video"].shape == (2, 5, 32, 48, 3)
    with pytest.raises(ValueError, match="1 of 5 videos cannot be used:\n.*a.mp4: 9 frames at 16 a second, a clip needs 13$"):
        Folder(folder, frames=13).items(CONFIG)
    with pytest.raises(ValueError, match="frames=0 must be positive"):
        Folder(folder, frames=0)


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9")])
@pytest.mark.parametrize("rate", [16, 24, 8, 30])
def test_other_rates_give_the_frames_nearest_in_time(tmp_path, suffix, codec, rate):
    path = tmp_path / f"a.{suffix}"
    write(path, brightening(24), rate, codec)
    there = 24 * 16 // rate
    apart = np.abs(16 * np.arange(24)[:, None] - rate * np.arange(there))  # in time, in units of 1 / (16 * rate) seconds
    nearest = apart.argmin(0)  # the earlier one of two as near
    assert rate != 16 or nearest.tolist() == list(range(24))
    assert clips.count(path, 16) == there
    first, second = np.sort(apart, axis=0)[:2]
    clear = (suffix == "mp4") | (second - first > 0.002 * 16 * rate)  # times in a webm file are rounded to milliseconds
    assert np.mean(clear | np.zeros(there, bool)) >= 0.5
    for start in (0, 5):
        found = numbers(clips.read(path, start, there - start, 16, 32, 48))
        assert all(found[n - start] == nearest[n] for n in range(start, there) if np.broadcast_to(clear, there)[n])


def test_clips_are_cropped_around_the_centre(tmp_path):
    wide = brightening(4, width=96)
    write(tmp_path / "a.mp4", wide)
    frames = clips.read(tmp_path / "a.mp4", 0, 4, 16, 32, 48)
    assert np.abs(frames[:, 4:-4, 4:-4].astype(int) - wide[:, 4:-4, 28:68]).mean() < 8


@pytest.mark.parametrize("degrees, turns", [(90, 1), (180, 2), (270, 3)])
def test_videos_of_a_turned_telephone_stand_upright(tmp_path, degrees, turns):
    write(tmp_path / "a.mov", brightening(4, height=48, width=48), turned=degrees)
    upright = np.rot90(brightening(4, height=48, width=48), turns, axes=(1, 2))[:, 8:-8]
    for frames in (clips.read(tmp_path / "a.mov", 0, 4, 16, 32, 48), read_video(tmp_path / "a.mov", 32, 48)):
        assert np.abs(frames[:, 4:-4, 4:-4].astype(int) - upright[:, 4:-4, 4:-4]).mean() < 8


def test_all_bad_files_are_named_at_once(folder, tmp_path):
    whole = (pathlib.Path(folder) / "c.mov").read_bytes()
    write(tmp_path / "short.mp4", brightening(8))
    write(tmp_path / "mute.mp4", brightening(9))
    write(tmp_path / "good.mp4", brightening(9))
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mov").write_bytes(whole[: len(whole) // 2])
    for name in ("short", "good", "text", "cut"):
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(ValueError) as caught:
        Folder(str(tmp_path)).batch(CONFIG, 0, 1)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path}: 4 of 5 videos cannot be used:"
    for line, (name, fault) in zip(
        lines,
        [("cut.mov", "not a video"), ("mute.mp4", "no caption"), ("short.mp4", "8 frames"), ("text.mp4", "not a video")],
        strict=True,
    ):
        assert line.strip().startswith(f"{tmp_path / name}: {fault}"), line


def test_a_file_whose_end_is_missing_is_found_by_its_header(tmp_path):
    write_mp4(tmp_path / "a.mp4", brightening(36), 16, crf=4)  # its index comes first
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: int(len(whole) * 0.7)])
    with pytest.raises(ValueError, match="end is missing|not a video"):
        clips.count(tmp_path / "a.mp4", 16)


def test_a_file_that_is_damaged_later_is_named(tmp_path):
    write(tmp_path / "a.mp4", brightening(9))
    (tmp_path / "a.txt").write_text("a")
    source = Folder(str(tmp_path))
    assert source.items(CONFIG) == 1
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="a.mp4 is not a video that can be decoded"):
        source.batch(CONFIG, 0, 1)


def test_captions_can_be_listed_in_one_file(folder, tmp_path):
    for name in ("a.mp4", "c.mov"):
        (tmp_path / name).write_bytes((pathlib.Path(folder) / name).read_bytes())
    lines = [{"file": "a.mp4", "caption": "one  film"}, {"file": "c.mov", "caption": ""}]
    listing = tmp_path / "captions.jsonl"
    listing.write_text("\n\n".join(map(json.dumps, lines)))
    assert sorted(Folder(str(tmp_path)).examples(CONFIG, range(2))[1]) == ["", "one film"]

    def fails(content: str, message: str) -> None:
        listing.write_text(content)
        with pytest.raises(ValueError, match=message):
            Folder(str(tmp_path), frames=1).items(CONFIG)  # another length of clips: nothing is remembered

    fails('{"file": "a.mp4"}', "captions.jsonl, line 1: expected")
    fails('\n{"file": "a.mp4", "caption": 3}', "line 2: expected")
    fails("[]", "line 1: expected")
    fails("{", "line 1: expected .* received {")
    fails('{"file": "a.mp4", "caption": "x"}\n' * 2, "line 2: a.mp4 has a caption already")
    fails('{"file": "z.mp4", "caption": "x"}', "1 of 1 videos.*\n.*z.mp4: .*No such file")


def test_folders_without_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no videos"):
        Folder(str(tmp_path)).items(CONFIG)
    with pytest.raises(ValueError, match="no such folder"):
        Folder(str(tmp_path / "absent")).items(CONFIG)


def test_the_origin_of_a_folder_changes_with_its_captions(folder, tmp_path):
    (tmp_path / "a.mp4").write_bytes((pathlib.Path(folder) / "a.mp4").read_bytes())
    origins = []
    for frames, caption in ((9, "one"), (8, "two")):
        (tmp_path / "a.txt").write_text(caption)
        origins.append(Folder(str(tmp_path), frames=frames).origin(CONFIG).split()[-1])
    assert origins[0] != origins[1]
    source = Folder(folder)
    assert source.origin(CONFIG) == dataclasses.replace(source, model="somewhere").origin(CONFIG)


# --- words


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \nthree\n", encoding="utf-8")
    source = Prompts(str(file), seed=4)
    assert source.items(CONFIG) == 3
    assert {*source.examples(CONFIG, range(3))[1]} == {"one", "two", "three"}
    batch = source.batch(CONFIG, 1, 2)
    assert batch.keys() == {"ids", "lengths"} and batch["ids"].dtype == batch["lengths"].dtype == np.int32
    assert batch["ids"].shape == (2, CONFIG.text.length)
    for name, content, message in (("none", b" \n", "holds none"), ("latin", b"\xe9", "UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Prompts(str(tmp_path / name)).items(CONFIG)
    with pytest.raises(ValueError, match="no file at"):
        Prompts(str(tmp_path / "absent")).items(CONFIG)


def test_encoded_captions_take_the_place_of_tokens(tmp_path):
    file, encoded = tmp_path / "prompts.txt", str(tmp_path / "e.safetensors")
    file.write_text("one\ntwo\n")
    part = CONFIG.text
    values = np.random.default_rng(0).normal(size=(2, part.length, part.dim)).astype(np.float32)
    text.save_embeddings(encoded, text.Embeddings(values, np.array([1, 2], np.int32), ("two", "one"), "x" * 64))
    source = Prompts(str(file), embeddings=encoded)
    batch, (_, prompts) = source.batch(CONFIG, 0, 2), source.examples(CONFIG, range(2))
    assert batch.keys() == {"text"}
    np.testing.assert_array_equal(batch["text"], values[[("two", "one").index(prompt) for prompt in prompts]])
    video = dataclasses.replace(CONFIG.video, negative_prompt="two")
    batch = source.batch(dataclasses.replace(CONFIG, video=video), 0, 3)
    assert batch.keys() == {"text", "negative"}
    np.testing.assert_array_equal(batch["negative"], values[[0, 0, 0]])
    with pytest.raises(ValueError, match="not among the 2 encoded prompts: .'four'"):
        source.words(CONFIG, ["four"])
    longer = dataclasses.replace(CONFIG, text=dataclasses.replace(part, length=64))
    with pytest.raises(ValueError, match=r"\(512, 32\), expected \(64, 32\)"):
        source.batch(longer, 0, 1)


def test_encoded_captions_must_be_of_the_encoder(tmp_path):
    part, model, file = CONFIG.text, tmp_path / "model", str(tmp_path / "e.safetensors")
    arrays = {name: np.ones(shape, np.float32) for name, shape in checkpoint.shapes(part).items()}
    checkpoint.save_component(model, "text", part, arrays)
    (model / "text" / "spiece.model").write_bytes(text.tiny_model())
    (tmp_path / "p.txt").write_text("one")
    source = Prompts(str(tmp_path / "p.txt"), model=str(model), embeddings=file)
    values, half = np.zeros((1, part.length, part.dim), np.float32), dataclasses.replace(part, dtype="bfloat16")
    computing = dataclasses.replace(CONFIG, text=half)  # as a run does that computes in bfloat16
    for encoder in ("x" * 64, text.fingerprint(part, text.tiny_model(), arrays)):
        text.save_embeddings(file, text.Embeddings(values, np.array([1], np.int32), ("one",), encoder))
        if encoder.startswith("x"):
            with pytest.raises(ValueError, match="was made by encoder xxxxxxxxxxxx, not by"):
                source.batch(computing, 0, 1)
    assert source.batch(computing, 0, 1).keys() == {"text"}


def test_the_tiny_tokenizer_is_for_the_tiny_vocabulary(tmp_path):
    large = dataclasses.replace(CONFIG, text=Text(dim=32))
    (tmp_path / "p.txt").write_text("one")
    with pytest.raises(ValueError, match="text.vocab=256384 is not the tiny tokenizer's 512: set the data's model"):
        Prompts(str(tmp_path / "p.txt")).batch(large, 0, 1)
    source = Prompts(str(tmp_path / "p.txt"), model=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="spiece.model"):
        source.batch(large, 0, 1)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "spiece.model").write_bytes(text.tiny_model())
    assert same(source.batch(large, 0, 1), Prompts(str(tmp_path / "p.txt")).batch(CONFIG, 0, 1))


# --- the procedural world


def test_scenes_are_a_function_of_seed_and_step():
    source = World(WORLD, seed=3)
    run = [source.batch(CONFIG, step, 4) for step in range(3)]
    assert {name: (value.shape, value.dtype) for name, value in run[0].items()} == {
        "video": ((4, 9, 32, 48, 3), np.float32),
        "ids": ((4, CONFIG.text.length), np.int32),
        "lengths": ((4,), np.int32),
    }
    assert isinstance(run[0]["video"], jax.Array)
    assert same(World(WORLD, seed=3).batch(CONFIG, 1, 4), run[1])
    assert not same(World(WORLD, seed=4).batch(CONFIG, 1, 4), run[1])
    videos = np.concatenate([batch["video"] for batch in run])
    assert len({video.tobytes() for video in videos}) == 12
    assert source.items(CONFIG) is None


def test_train_and_eval_have_no_scene_in_common():
    keys = {
        (seed, split): jax.random.key_data(World(WORLD, seed=seed, split=split).keys(range(500)))
        for seed in (0, 1)
        for split in ("train", "eval")
    }
    assert len({tuple(row.tolist()) for rows in keys.values() for row in rows}) == 2000
    train, other = (World(WORLD, split=split).batch(CONFIG, 0, 4)["video"] for split in ("train", "eval"))
    assert not np.array_equal(train, other)
    with pytest.raises(ValueError, match="split='test' must be one of train, eval"):
        World(WORLD, split="test")


def test_clips_of_the_world_are_parts_of_its_videos():
    whole = World(WORLD, frames=33).batch(CONFIG, 0, 4)
    clip = World(WORLD).batch(CONFIG, 0, 4)
    starts = []
    for parts, video in zip(np.asarray(clip["video"]), np.asarray(whole["video"]), strict=True):
        errors = [np.abs(video[start : start + 9] - parts).max() for start in range(25)]
        starts.append(int(np.argmin(errors)))
        assert min(errors) < 1e-3
    assert len(set(starts)) > 1
    np.testing.assert_array_equal(clip["ids"], whole["ids"])
    with pytest.raises(ValueError, match="clips of 34 frames need a world as long, received world.num_frames=33"):
        World(WORLD, frames=34).batch(CONFIG, 0, 1)
    with pytest.raises(ValueError, match="world.height=128 must equal video.height=32"):
        World().items(CONFIG)


def test_captions_of_the_world_need_no_pictures():
    rendered = World(WORLD, seed=2).examples(CONFIG, range(4))[1]
    arrays, captions = World(WORLD, seed=2, video=False).examples(CONFIG, range(4))
    assert arrays == {} and captions == rendered and len(set(captions)) == 4
    assert World(WORLD, video=False).batch(CONFIG, 0, 4).keys() == {"ids", "lengths"}


def test_a_word_of_a_caption_is_one_token():
    reader, source = text.Tokenizer(text.tiny_model(), length=64), World(WORLD, video=False)
    captions = [caption for at in range(0, 800, 4) for caption in source.examples(CONFIG, range(at, at + 4))[1]]
    pieces = [reader.pieces(caption) for caption in captions]
    assert max(map(len, pieces)) < 64
    assert [reader.decode(row) for row in pieces] == captions
    words = [re.findall(r"\w+|[.,]", caption) for caption in captions]
    assert [len(row) for row in pieces] == [len(row) for row in words], "run tools/make_tiny_tokenizer.py"


# --- reading ahead


def test_what_is_read_ahead_comes_in_order():
    made = []
    reader = ahead(lambda step: made.append(step) or step**2, range(5, 25), depth=3)
    assert made == []  # nothing before the first is asked for
    assert next(reader) == 25
    for _ in range(200):
        if len(made) == 5:
            break
        time.sleep(0.01)
    assert made == [5, 6, 7, 8, 9]  # the one read, three waiting, one in the making
    assert [*reader] == [step**2 for step in range(6, 25)]
    assert "data" not in [thread.name for thread in threading.enumerate()]


def test_errors_come_at_their_step_and_a_reader_can_leave():
    def make(step: int) -> int:
        if step == 3:
            raise ValueError("step 3")
        return step

    reader = ahead(make, range(9))
    assert [next(reader) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="step 3"):
        next(reader)
    reader = ahead(lambda step: step, iter(int, 1))  # for ever
    assert next(reader) == 0
    reader.close()
    assert "data" not in [thread.name for thread in threading.enumerate()]
