"""What videos are made of: prompts with their seeds, and what a video of each must show where that is known."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from lf_jax.arrays import UInt8
from lf_jax.config import Config
from lf_jax.world import Facts, Scores, World, caption, evaluate, parse, sample


@dataclasses.dataclass(frozen=True)
class Case:
    """One video to be made under every policy."""

    prompt: str
    seed: int
    facts: Facts | None = None  # what the prompt says, where it is a caption of the procedural world


def of_prompts(prompts: Sequence[str], seed: int, settings: Config) -> tuple[Case, ...]:
    """Given prompts with the seeds `seed`, `seed + 1`, ...; captions of a world of the config's size come with facts."""
    return tuple(Case(prompt, seed + i, _facts(prompt, settings)) for i, prompt in enumerate(prompts))


def of_world(settings: Config, number: int, seed: int) -> tuple[Case, ...]:
    """Captions of `number` scenes of the procedural world, with the seeds `seed`, `seed + 1`, ... of scene and video.

    Raises:
        ValueError: if the world cannot have the size of the config's videos.
    """
    seeds = range(seed, seed + number)
    scenes = jax.device_get(sample(world_of(settings), jax.vmap(jax.random.key)(np.asarray(seeds))))
    return of_prompts([caption(scenes[i], n) for i, n in enumerate(seeds)], seed, settings)


def world_of(settings: Config) -> World:
    """The procedural world at the size of the config's videos. A long video goes on where its scenes end: what the captions
    promise happens within the length that models are trained on."""
    video = settings.video
    return World(video.height, video.width, min(video.num_frames, World.num_frames), video.fps)


def judge(asked: Facts, video: UInt8[np.ndarray, "f h w 3"], settings: Config) -> Scores:
    """The evaluator's scores of a video of the config's size."""
    return evaluate(world_of(settings), video, asked)


def _facts(prompt: str, settings: Config) -> Facts | None:
    try:
        world_of(settings)
        return parse(prompt)
    except ValueError:  # no caption of that grammar, or frames of another shape than the world can have
        return None
