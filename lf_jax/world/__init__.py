"""A procedural world of videos: scenes from a seed, their pixels and captions, and an evaluator that knows the truth."""

from lf_jax.world.captions import Facts, Thing, caption, facts, parse, phrase
from lf_jax.world.evaluator import Scores, evaluate
from lf_jax.world.render import render
from lf_jax.world.scene import Scene, sample
from lf_jax.world.settings import World

__all__ = ["Facts", "Scene", "Scores", "Thing", "World", "caption", "evaluate", "facts", "parse", "phrase", "render", "sample"]
