"""Videos of the user's own: a folder of mp4, mov and webm files with captions."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lf_jax.config import Config, check
from lf_jax.train.data import clips
from lf_jax.train.data.source import Source, draw, shuffled

SUFFIXES = (".mp4", ".mov", ".webm")
CAPTIONS = "captions.jsonl"
SHOWN = 12  # faults in one message


@dataclasses.dataclass(frozen=True)
class Item:
    """A video file that can be read."""

    path: pathlib.Path
    caption: str  # white space collapsed
    frames: int  # at the frame rate that was asked for


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """Clips of the video files of a folder, at the size and rate of the config, with their captions.

    A file's caption is the text of the `.txt` file of the same stem beside it, in any subfolder; or all are in
    `captions.jsonl`, lines of `{"file": ..., "caption": ...}` with paths from the folder, and files without a line are not
    used. A clip begins at a random frame and is scaled to cover the size, then cropped around the centre.
    """

    path: str
    frames: int | None = None  # of a clip; None: `config.video.num_frames`

    def __post_init__(self):
        super().__post_init__()
        check(self.frames is None or self.frames > 0, f"{self.frames=} must be positive")

    def items(self, config: Config) -> int:
        """Opens every file.

        Raises:
            ValueError: no videos, or some that cannot be read, are too short or have no caption: all of them are named.
        """
        return len(self._items(config))

    def examples(self, config: Config, positions: Sequence[int]) -> tuple[dict[str, np.ndarray], list[str]]:
        items, size = self._items(config), config.video
        frames = self.frames or size.num_frames

        def clip(position: int, item: Item) -> np.ndarray:
            start = draw(self.seed, position, item.frames - frames + 1)
            return clips.read(item.path, start, frames, size.fps, size.height, size.width)

        chosen = [items[n] for n in shuffled(self.seed, len(items), positions)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding lets go of Python's lock
            video = np.stack(list(pool.map(clip, positions, chosen)))
        return {"video": video.astype(np.float32) / 127.5 - 1}, [item.caption for item in chosen]

    def origin(self, config: Config) -> str:
        items = self._items(config)
        facts = [(str(item.path.relative_to(self.path)), item.path.stat().st_size, item.caption) for item in items]
        return f"{super().origin(config)} {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"

    def _items(self, config: Config) -> tuple[Item, ...]:
        return scan(pathlib.Path(self.path), config.video.fps, self.frames or config.video.num_frames)


@functools.lru_cache(maxsize=8)
def scan(folder: pathlib.Path, fps: int, frames: int) -> tuple[Item, ...]:
    """The videos of a folder in the order of their names.

    Raises:
        ValueError: as `Folder.items`.
    """
    check(folder.is_dir(), f"no such folder: {folder}")
    listed = _listed(folder / CAPTIONS) if (folder / CAPTIONS).exists() else _beside(folder)
    check(bool(listed), f"{folder} holds no videos ({', '.join(SUFFIXES)})")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda entry: _probe(*entry, fps, frames), sorted(listed.items())))
    faults = [fault for fault in found if isinstance(fault, str)]
    more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    check(
        not faults, f"{folder}: {len(faults)} of {len(found)} videos cannot be used:\n  " + "\n  ".join(faults[:SHOWN]) + more
    )
    return tuple(found)


def _beside(folder: pathlib.Path) -> dict[pathlib.Path, str | None]:
    """Every video of a folder with the caption beside it, None where there is none."""
    videos = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    texts = {path: path.with_suffix(".txt") for path in videos}
    return {path: _read(text) if text.is_file() else None for path, text in texts.items()}


def _listed(file: pathlib.Path) -> dict[pathlib.Path, str | None]:
    """The videos and captions of a captions.jsonl."""
    found = {}
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file"], entry["caption"]
            good = isinstance(name, str) and isinstance(caption, str)
        except (ValueError, KeyError, TypeError):
            good = False
        check(good, f'{file}, line {number}: expected {{"file": ..., "caption": ...}}, received {line[:80]}')
        check(file.parent / name not in found, f"{file}, line {number}: {name} has a caption already")
        found[file.parent / name] = caption
    return found


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error


def _probe(path: pathlib.Path, caption: str | None, fps: int, frames: int) -> Item | str:
    """An item, or what is wrong with it."""
    if caption is None:
        return f"{path}: no caption ({path.with_suffix('.txt').name} is missing; it may be empty)"
    try:
        there = clips.count(path, fps)
    except ValueError as error:
        return f"{path}: {error}"
    if there < frames:
        return f"{path}: {there} frames at {fps} a second, a clip needs {frames}"
    return Item(path, " ".join(caption.split()), there)
