"""`lf-jax latents`."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lf_jax import checkpoint, loading, tokens, vae
from lf_jax import world as worlds
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.commands import outputs
from lf_jax.commands.console import note, progress, show_config
from lf_jax.config import Config, check
from lf_jax.train.data import Folder, Source, World, ahead, shards

WORLD, PROMPTS = "world", "prompts.txt"


@dataclasses.dataclass(frozen=True)
class Latents:
    """Encode videos into latents once, so that training runs without the autoencoder.

    The videos are the mp4, mov and webm files of a folder with their captions, or the procedural world's. They are brought
    to the size, rate and number of frames of the config (docs/training-data.md). The output appears shard by shard; after
    an interruption the same command goes on, and with a larger --items it adds to what is there. `prompts.txt` in the
    output holds the captions for `lf-jax encode`.

    Example: lf-jax latents --model DIR --data videos --output latents
    """

    model: str  # converted folder, or a preset for random weights
    data: str  # folder of videos and captions, or `world` (`./world` is a folder)
    output: pathlib.Path  # folder to write
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    items: int | None = None  # videos to encode; without it every file once
    seed: int = 0  # of the order, of where clips begin, and of the world's scenes
    split: Literal["train", "eval"] = "train"  # of the world's scenes
    batch: int = 4  # videos encoded together
    shard: int = 64  # videos of one output file
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the latents
    weights_seed: int | None = None  # of a preset's random weights, 0 if not given
    overwrite: bool = False  # replace latents that were made with other options
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = self.settings
        show_config(config, weights=self.model, output=self.output)
        for name in ("batch", "shard"):
            check(getattr(self, name) > 0, f"--{name} {getattr(self, name)} must be positive")
        check(self.shard % self.batch == 0, f"--shard {self.shard} must be a multiple of --batch {self.batch}")
        tokens.latent_frames(config.video.num_frames, config.vae.temporal_stride)  # before long work: whether they fit
        source = self._source()
        there = source.items(config)  # looks at every file
        items = there if self.items is None else self.items
        check(items is not None, f"--data {WORLD} never ends: expected --items, the number of videos")
        check(items > 0, f"--items {items} must be positive")
        outputs.check_writable("--output", self.output)

        model = loading.find(self.model, config, self.weights_seed)
        note("loading the autoencoder")
        autoencoder = model.vae()
        recipe = self._recipe(source, autoencoder)
        prompts = self._begun(recipe, items)
        pending = [n for n in range(recipe.shards(items)) if n not in prompts]
        if len(prompts):
            note(f"{len(prompts)} of {recipe.shards(items)} shards are complete already")
        if pending:
            (self.output / shards.MANIFEST).unlink(missing_ok=True)  # unfinished until all are there
        began, size = time.perf_counter(), 0
        with progress() as bar:
            task = bar.add_task("shards", total=len(pending))
            for n, latents, captions in self._encode(source, autoencoder, pending, items):
                shards.write_shard(self.output, n, recipe, latents, captions)
                prompts[n], size = captions, size + latents.nbytes
                bar.advance(task)
                note(f"shard {n}: {len(captions)} videos; {size / 1e9:.3f} GB in {time.perf_counter() - began:.1f} s so far")
        every = [prompt for n in sorted(prompts) for prompt in prompts[n]]
        with replaced_file(self.output / PROMPTS) as partial:
            partial.write_text("".join(f"{prompt}\n" for prompt in dict.fromkeys(every)), encoding="utf-8")
        shards.write_manifest(self.output, recipe, every)
        print(self.output)

    def _source(self) -> Source:
        if self.data != WORLD:
            check(self.split == "train", f"--split {self.split} has no use with a folder of videos")
            return Folder(self.data, seed=self.seed)
        world = worlds.World(**shards.pixels(self.settings))
        return World(world=world, split=self.split, seed=self.seed)

    def _recipe(self, source: Source, autoencoder: vae.Vae) -> shards.Recipe:
        video, part = self.settings.video, self.settings.vae
        frames = tokens.latent_frames(video.num_frames, part.temporal_stride)
        return shards.Recipe(
            vae=shards.settings(part),
            weights=shards.fingerprint(part, checkpoint.flatten(autoencoder)),
            video=shards.pixels(self.settings),
            shape=[frames, video.height // part.spatial_stride, video.width // part.spatial_stride, part.channels],
            dtype=self.dtype,
            shard=self.shard,
            source=source.origin(self.settings),
        )

    def _begun(self, recipe: shards.Recipe, items: int) -> dict[int, list[str]]:
        """The prompts of the shards that need not be made again. With --overwrite, others are out of the way afterwards."""
        found = {}
        for path in sorted(self.output.glob("shard-*.safetensors")):
            n = int(path.stem.removeprefix("shard-"))
            try:
                check(n < recipe.shards(items), f"{path} is one more than {items} items need")
                prompts = shards.read_shard(path, recipe)
            except ValueError as error:
                check(self.overwrite, f"{error}: --overwrite replaces it")
                path.unlink()
                continue
            if len(prompts) == min(recipe.shard, items - n * recipe.shard):  # the last of a smaller number of items is not
                found[n] = prompts
        return found

    def _encode(
        self, source: Source, autoencoder: vae.Vae, pending: Sequence[int], items: int
    ) -> Iterator[tuple[int, np.ndarray, list[str]]]:
        """Number, latents and prompts of every pending shard. Videos are read while those before them are encoded."""
        encode = jax.jit(vae.encode)
        starts = [at for n in pending for at in range(n * self.shard, min((n + 1) * self.shard, items), self.batch)]
        batches = ahead(lambda at: source.examples(self.settings, range(at, at + self.batch)), starts)
        parts, prompts = [], []
        for at, (arrays, captions) in zip(starts, batches, strict=True):
            parts.append(np.asarray(encode(autoencoder, jnp.asarray(arrays["video"])).astype(self.dtype)))
            prompts += captions
            n, over = at // self.shard, at + self.batch - items  # the last batch is filled up: one shape, one compilation
            if at + self.batch == (n + 1) * self.shard or over >= 0:
                count = len(prompts) - max(over, 0)
                yield n, np.concatenate(parts)[:count], prompts[:count]
                parts, prompts = [], []
