"""The videos of a batch on disk: stable names, nothing overwritten silently, an interrupted batch goes on where it stopped."""

import dataclasses
import hashlib
import json
import pathlib
import re
import tempfile
from collections.abc import Sequence

from lf_jax import loading, presets
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import Config, check
from lf_jax.vae import PARTS

MANIFEST = "manifest.json"
NAME_BYTES = 150  # of a file name that come from the prompt; file systems allow 255 in all


@dataclasses.dataclass(frozen=True)
class Video:
    """One video to be made."""

    prompt: str
    seed: int
    name: str  # of its file


def file_name(prompt: str, index: int, seed: int) -> str:
    """A name that the prompt can be recognised by: letters and digits of any language, the rest hyphens."""
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")
    words = words.encode()[:NAME_BYTES].decode(errors="ignore").strip("-") or "video"
    return f"{words}-{index:04d}-seed{seed}.mp4"


def list_videos(prompts: Sequence[str], seed: int, samples: int) -> tuple[Video, ...]:
    """`samples` videos of every prompt, with the seeds `seed`, `seed + 1`, ..."""
    return tuple(
        Video(prompt, seed + n, file_name(prompt, index, seed + n))
        for index, prompt in enumerate(prompts)
        for n in range(samples)
    )


class Manifest:
    """What made every video of a folder, beside them in `manifest.json`. A video that is not in it is not finished.

    Args:
        folder: is made if it is absent.
        recipe: everything that the videos depend on beside prompt and seed.

    Raises:
        ValueError: if the folder cannot be written, or its manifest cannot be read.
    """

    def __init__(self, folder: pathlib.Path, recipe: str):
        self.folder, self.recipe = folder, recipe
        check_writable("--output", folder)
        self.made: dict[str, dict] = {}
        if self.path.exists():
            try:
                self.made = json.loads(self.path.read_text())["videos"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is not a manifest of this program: move it away") from error

    @property
    def path(self) -> pathlib.Path:
        return self.folder / MANIFEST

    def pending(self, videos: Sequence[Video], overwrite: bool) -> tuple[Video, ...]:
        """Those of `videos` that have still to be made.

        Raises:
            ValueError: if a file is in the way that was made otherwise, and `overwrite` is not set.
        """
        if overwrite:
            return tuple(videos)
        there = [video for video in videos if (self.folder / video.name).exists()]
        done = [video for video in there if self.made.get(video.name) == self._entry(video)]
        strange = [str(self.folder / video.name) for video in there if video not in done]
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        check(not strange, f"{''.join(strange[:1])}{more} would be replaced, made with other options: --overwrite allows it")
        return tuple(video for video in videos if video not in done)

    def add(self, video: Video) -> None:
        """Notes that `video` is complete."""
        self.made[video.name] = self._entry(video)
        with replaced_file(self.path) as partial:
            partial.write_text(json.dumps({"videos": self.made}, indent=2, ensure_ascii=False) + "\n")

    def _entry(self, video: Video) -> dict:
        return {"prompt": video.prompt, "seed": video.seed, "recipe": self.recipe}


def recipe_of(
    config: Config, model: str, weights_seed: int, inputs: Sequence[pathlib.Path | None], vae: str | None = None
) -> str:
    """A digest of all that decides how videos look, beside prompt and seed: settings, weights and input files.

    Weights count by the name, size and time of their files, because reading them would take as long as loading them.
    """
    digest = hashlib.sha256(f"{config!r} {weights_seed}".encode())
    for place in (loading.shipped(model), *([] if vae is None else [vae])):
        if presets.is_name(place) or place in PARTS:
            digest.update(str(place).encode())
        else:
            files = [(path, path.stat()) for path in sorted(pathlib.Path(place).resolve().glob("*/*"))]
            digest.update(repr([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files]).encode())
    for path in inputs:
        digest.update(b"none" if path is None else hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def check_writable(option: str, folder: pathlib.Path) -> None:
    """Makes the folder that `option` puts files in, and raises ValueError if they cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {folder} cannot be written: {error.strerror}") from error
