"""Folders of latents on disk: shards of safetensors, complete one by one, and a manifest when all of them are.

`DIR/shard-00000.safetensors` holds "latents" [items, f, h, w, c], and in its metadata the recipe and the prompts.
`DIR/manifest.json` holds the recipe and all prompts. A folder without it is unfinished.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lf_jax.checkpoint import tensorfile
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import Config, Vae, check

FORMAT = "lf_jax.latents.1"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all latents of a folder have in common; two folders of one recipe and one number of items are equal."""

    vae: dict[str, Any]  # settings of the autoencoder, without the dtype it computed in
    weights: str  # `fingerprint` of the autoencoder
    video: dict[str, int]  # height, width, num_frames and fps of the pixels
    shape: list[int]  # [f, h, w, c] of one item
    dtype: str  # "bfloat16" or "float32"
    shard: int  # items of every shard but the last
    source: str  # what the videos came from

    def check_serves(self, place: pathlib.Path, config: Config, frames: int | None) -> None:
        """Raises ValueError unless models of `config` are trained on these latents, or on the first `frames` of them."""
        check(
            frames is None or frames <= self.shape[0], f"the latents of {place} have {self.shape[0]} frames, expected {frames}"
        )
        free = () if frames is None else ("num_frames",)
        for name, ours, theirs in (("vae", settings(config.vae), self.vae), ("video", pixels(config), self.video)):
            wrong = [key for key in ours if key not in free and ours[key] != theirs.get(key)]
            faults = [f"{name}.{key} {theirs.get(key)}, expected {ours[key]}" for key in wrong]
            check(not faults, f"the latents of {place} were made with {'; '.join(faults)}")

    def shards(self, items: int) -> int:
        return -(-items // self.shard)


def settings(part: Vae) -> dict[str, Any]:
    """The settings of an autoencoder that its latents depend on, as JSON has them."""
    fields = dataclasses.asdict(part)
    del fields["dtype"]
    return json.loads(json.dumps(fields))


def pixels(config: Config) -> dict[str, int]:
    return {name: getattr(config.video, name) for name in ("height", "width", "num_frames", "fps")}


def fingerprint(part: Vae, weights: Mapping[str, Any]) -> str:
    """What identifies an autoencoder: its settings and weights, hashed.

    Weights are rounded to bfloat16 first, so that the float32 masters of a training run and the folder exported from them
    agree.

    Args:
        weights: arrays by dotted path, as `lf_jax.checkpoint.flatten` or `component.stored` gives them.
    """
    digest = hashlib.sha256(json.dumps(settings(part), sort_keys=True).encode())
    for name, array in sorted(weights.items()):
        digest.update(f"{name}{tuple(array.shape)}".encode())
        digest.update(np.asarray(array).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def shard_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(folder: pathlib.Path, number: int, recipe: Recipe, latents: np.ndarray, prompts: Sequence[str]) -> None:
    """Writes [items, *recipe.shape] latents of `recipe.dtype`, whole or not at all."""
    metadata = {"format": FORMAT, "recipe": json.dumps(dataclasses.asdict(recipe)), "prompts": json.dumps(list(prompts))}
    layout = {"latents": ((len(prompts), *recipe.shape), np.dtype(recipe.dtype))}
    with replaced_file(shard_path(folder, number)) as partial:
        tensorfile.write(partial, layout, lambda name: [latents], metadata)


def read_shard(path: pathlib.Path, recipe: Recipe) -> list[str]:
    """The prompts of a shard.

    Raises:
        ValueError: it is absent, damaged, or of another recipe.
    """
    file = tensorfile.TensorFile(path)
    check(file.metadata.get("format") == FORMAT and "latents" in file.entries, f"{path} holds no latents of this program")
    made, prompts = (json.loads(file.metadata[key]) for key in ("recipe", "prompts"))
    check(made == dataclasses.asdict(recipe), f"{path} was made with other options than the rest of its folder")
    entry = file.entries["latents"]
    expected = (len(prompts), *recipe.shape)
    check(entry.shape == expected, f"{path} has latents of shape {entry.shape}, expected {expected}")
    return prompts


def write_manifest(folder: pathlib.Path, recipe: Recipe, prompts: Sequence[str]) -> None:
    """Says that the folder is complete."""
    content = {"format": FORMAT, "items": len(prompts), **dataclasses.asdict(recipe), "prompts": list(prompts)}
    with replaced_file(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: pathlib.Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe and all prompts of a complete folder, whose shards are all there.

    Raises:
        ValueError: it is not one, is unfinished, or is damaged.
    """
    path = folder / MANIFEST
    check(folder.is_dir(), f"no such folder: {folder}")
    begun = len(list(folder.glob("shard-*.safetensors")))
    check(path.is_file() or not begun, f"{folder} is unfinished ({begun} shards): run its `lf-jax latents` again, it goes on")
    check(path.is_file(), f"{folder} is not a folder of latents: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check(content["format"] == FORMAT, f"has format {content['format']!r}, this version reads {FORMAT!r}")
        recipe = Recipe(**{field.name: content[field.name] for field in dataclasses.fields(Recipe)})
        prompts = tuple(content["prompts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of latents: {error}") from error
    found = [prompt for n in range(recipe.shards(len(prompts))) for prompt in read_shard(shard_path(folder, n), recipe)]
    check(tuple(found) == prompts, f"{path} lists {len(prompts)} items that are not those of its shards ({len(found)})")
    return recipe, prompts
