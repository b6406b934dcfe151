"""Videos that were encoded beforehand, by `lf-jax latents`."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from lf_jax.checkpoint import component, tensorfile
from lf_jax.config import Config, check
from lf_jax.train.data import shards
from lf_jax.train.data.source import Source, shuffled


@dataclasses.dataclass(frozen=True)
class Latents(Source):
    """The items of a folder of latents. With `model`, its autoencoder must be the one that made them.

    With `frames`, items are cut off after so many latent frames, and may be of longer or shorter videos than the config's.
    """

    path: str
    frames: int | None = None  # None: the whole item

    def __post_init__(self):
        super().__post_init__()
        check(self.frames is None or 0 < self.frames, f"{self.frames=} must be positive")

    def items(self, config: Config) -> int:
        """
        Raises:
            ValueError: the folder is unfinished or damaged, or its latents are of another size or autoencoder.
        """
        return len(self._open(config)[1])

    def examples(self, config: Config, positions: Sequence[int]) -> tuple[dict[str, np.ndarray], list[str]]:
        recipe, prompts = self._open(config)
        chosen = shuffled(self.seed, len(prompts), positions)
        places = [divmod(n, recipe.shard) for n in chosen]
        rows = [_view(shards.shard_path(pathlib.Path(self.path), number))[row] for number, row in places]
        return {"latents": np.stack([row[: self.frames] for row in rows]).astype(np.float32)}, [prompts[n] for n in chosen]

    def _open(self, config: Config) -> tuple[shards.Recipe, tuple[str, ...]]:
        return _checked(pathlib.Path(self.path), self.model, self.frames, config)


@functools.lru_cache(maxsize=8)
def _checked(
    folder: pathlib.Path, model: str | None, frames: int | None, config: Config
) -> tuple[shards.Recipe, tuple[str, ...]]:
    recipe, prompts = shards.read_manifest(folder)
    recipe.check_serves(folder, config, frames)
    if model is not None:
        weights = shards.fingerprint(config.vae, component.stored(model, "vae"))
        check(
            weights == recipe.weights,
            f"the latents of {folder} were made by autoencoder {recipe.weights[:12]}, not by {weights[:12]} of {model}: encode "
            "the videos again",
        )
    return recipe, prompts


@functools.lru_cache(maxsize=256)  # an open file each
def _view(path: pathlib.Path) -> np.ndarray:
    return tensorfile.TensorFile(path).view("latents")
