"""The files of an evaluation, a folder a policy: what is there and was made by the same recipe is not made again."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lf_jax.arrays import Float
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import check
from lf_jax.evaluate.cases import Case

STRIP, MP4 = "jpg", "mp4"  # kinds of files


@dataclasses.dataclass(frozen=True)
class Store:
    """Files named by policy and number of the prompt. Each is complete or absent and says what it was made from.

    Attributes:
        recipes: of every policy, all that its videos depend on beside prompt and seed.
        overwrite: take files that were made otherwise for absent.
        strips: prompts whose film strips are kept, the first ones.
        mp4s: prompts whose videos are kept, likewise.
        vmaf: whether scores have VMAF.
    """

    folder: pathlib.Path
    cases: Sequence[Case]
    recipes: Mapping[str, str]
    overwrite: bool = False
    strips: int = 0
    mp4s: int = 0
    vmaf: bool = False

    def path(self, policy: str, index: int, kind: str) -> pathlib.Path:
        return self.folder / policy / f"{index:04d}.{kind}"

    def kinds(self, index: int) -> tuple[str, ...]:
        """What is kept of a video beside latents and scores."""
        return (STRIP,) * (index < self.strips) + (MP4,) * (index < self.mp4s)

    def complete(self, policy: str, index: int, compared: bool) -> bool:
        """Whether scores and all that is kept of a video are there; its latents need not be. Raises ValueError as `notes`.

        Args:
            compared: the scores are beside those of another video.
        """
        notes = self.notes(policy, index, "scores")
        whole = notes is not None and ("vmaf" in notes["scores"] or not (self.vmaf and compared))
        return whole and all(self.path(policy, index, kind).exists() for kind in self.kinds(index))

    def stamp(self, policy: str, index: int) -> dict[str, str | int]:
        case = self.cases[index]
        return {"recipe": self.recipes[policy], "prompt": case.prompt, "seed": case.seed}

    def has_latents(self, policy: str, index: int) -> bool:
        """Whether a video was made. Raises ValueError if another recipe made it, or the file is damaged."""
        path = self.path(policy, index, "safetensors")
        if not path.exists():
            return False
        try:
            with safetensors.safe_open(path, "numpy") as file:
                stamp = json.loads((file.metadata() or {}).get("stamp", "null"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        return self._ours(path, stamp, policy, index)

    def latents(self, policy: str, index: int) -> Float[np.ndarray, "f h w c"]:
        """The latents of a video that was made."""
        return safetensors.numpy.load_file(self.path(policy, index, "safetensors"))["latents"]

    def save_latents(self, policy: str, index: int, latents: Float[np.ndarray, "f h w c"]) -> None:
        metadata = {"stamp": json.dumps(self.stamp(policy, index))}
        with replaced_file(self.path(policy, index, "safetensors")) as partial:
            safetensors.numpy.save_file({"latents": np.ascontiguousarray(latents)}, partial, metadata)

    def notes(self, policy: str, index: int, kind: str) -> dict[str, Any] | None:
        """What `save_notes` wrote, or None if it is absent. Raises ValueError as `has_latents`."""
        path = self.path(policy, index, f"{kind}.json")
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            stamp, notes = found["stamp"], found["notes"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of this program: move it away") from error
        return notes if self._ours(path, stamp, policy, index) else None

    def save_notes(self, policy: str, index: int, kind: str, notes: Mapping[str, Any]) -> None:
        with replaced_file(self.path(policy, index, f"{kind}.json")) as partial:
            partial.write_text(json.dumps({"stamp": self.stamp(policy, index), "notes": notes}))

    def _ours(self, path: pathlib.Path, stamp: dict | None, policy: str, index: int) -> bool:
        ours = stamp == self.stamp(policy, index)
        check(ours or self.overwrite, f"{path} would be replaced, made with other options: --overwrite allows it")
        return ours
