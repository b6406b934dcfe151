"""The procedural world as training data: scenes without end, rendered where they are used."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lf_jax import world as worlds
from lf_jax.arrays import Array, Float, Int, Key
from lf_jax.config import Config, check
from lf_jax.train.data.source import Source, draw

SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class World(Source):
    """A scene of its own at every position, rendered on the device, with a caption.

    The two splits have no scene in common: a scene's key is that of the seed folded with a number, which is even in "train"
    and odd in "eval".
    """

    world: worlds.World = worlds.World()
    split: str = "train"  # or "eval"
    frames: int | None = None  # of a clip that begins at a random frame; None: `config.video.num_frames`
    video: bool = True  # False: captions alone

    def __post_init__(self):
        super().__post_init__()
        check(self.split in SPLITS, f"{self.split=} must be one of {', '.join(SPLITS)}")
        check(self.frames is None or 0 < self.frames, f"{self.frames=} must be positive")

    def items(self, config: Config) -> None:
        """
        Raises:
            ValueError: the world is of another size or rate than the config's videos, or shorter.
        """
        for name in ("height", "width", "fps"):
            ours, wanted = getattr(self.world, name), getattr(config.video, name)
            check(ours == wanted, f"world.{name}={ours} must equal video.{name}={wanted}")
        frames, there = self.clip_frames(config), self.world.num_frames
        check(frames <= there, f"clips of {frames} frames need a world as long, received world.num_frames={there}")

    def examples(self, config: Config, positions: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
        self.items(config)
        scenes = worlds.sample(self.world, self.keys(positions))
        starts = self.world.num_frames - self.clip_frames(config) + 1
        starts = np.array([draw(self.seed, position, starts) for position in positions], np.int32)
        arrays = {"video": _render(self.world, scenes, starts, self.clip_frames(config))} if self.video else {}
        facts = jax.device_get(scenes)
        return arrays, [worlds.caption(facts[row], n) for row, n in enumerate(self._numbers(positions))]

    def keys(self, positions: Sequence[int]) -> Key[Array, " b"]:
        """What `lf_jax.world.sample` makes the scenes at `positions` of."""
        return _keys(jax.random.key(self.seed), np.array(self._numbers(positions), np.uint32))

    def clip_frames(self, config: Config) -> int:
        return self.frames or config.video.num_frames

    def _numbers(self, positions: Sequence[int]) -> list[int]:
        check(max(positions) < 2**31, f"position {max(positions)} must be below 2**31")
        return [2 * position + SPLITS.index(self.split) for position in positions]


_keys = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


@partial(jax.jit, static_argnames=("world", "frames"))
def _render(
    world: worlds.World, scenes: worlds.Scene, starts: Int[Array, " b"] | Int[np.ndarray, " b"], frames: int
) -> Float[Array, "b f h w 3"]:
    def clip(scene: worlds.Scene, start: Int[Array, ""]) -> Float[Array, "f h w 3"]:
        return worlds.render(world, jax.tree.map(lambda leaf: leaf[None], scene), start, frames)[0]

    return jax.vmap(clip)(scenes, starts)
