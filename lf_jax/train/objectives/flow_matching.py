"""Flow matching: the network learns the velocity from noisy videos, bidirectional (`Flow`) or causal (`TeacherForcing`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import flow
from lf_jax.arrays import Array, Float, Key
from lf_jax.config import Config, check
from lf_jax.dit.model import WanDiT
from lf_jax.tokens import chunk_lengths
from lf_jax.train.objectives.bidirectional import Weighting, bidirectional, random_levels
from lf_jax.train.objectives.objective import (
    Load,
    Networks,
    clean_latents,
    differentiate,
    draw,
    frozen_parts,
    negative_embeddings,
    prompt_embeddings,
)
from lf_jax.train.rollouts import causal_pass


@dataclasses.dataclass(frozen=True)
class Flow:
    """Trains a bidirectional network, the later teacher: one timestep a video, uniform on the grid of a shift.

    The loss is the mean of |velocity - (noise - clean)|^2 times the level's weight.

    Which way things move is decided while there is almost nothing but noise, the more so the more frames show it, and decides
    little of the loss. Hence `shift`; and with `given`, some videos have a clean first frame, at timestep 0 and without a loss:
    then what the caption says of motion is all that is not known.
    """

    train_text: bool = False  # train the text encoder too
    caption_dropout: float = 0.1  # fraction of the videos that read the negative prompt, for guidance
    weighting: Weighting = "uniform"
    shift: float | None = None  # of the grid that levels are drawn from; None: `rollout.shift`
    given: float = 0.0  # fraction of the videos whose first frame is clean
    remat: bool = False  # compute layers again in the gradient instead of keeping what is in them

    def __post_init__(self):
        check(0 <= self.caption_dropout <= 1, f"{self.caption_dropout=} must lie in [0, 1]")
        check(self.weighting in ("uniform", "bell"), f"{self.weighting=} must be 'uniform' or 'bell'")
        check(self.shift is None or self.shift > 0, f"{self.shift=} must be positive, or None")
        check(0 <= self.given <= 1, f"{self.given=} must lie in [0, 1]")

    def build(self, config: Config, load: Load, key: Key[Array, ""]) -> Networks:
        of_dit, of_text = jax.random.split(key)
        model = {"dit": load("model", "dit") or draw(config.model, of_dit)}
        if not self.train_text:
            return Networks({"model": model}, frozen_parts(load, "model", "text", "vae"))
        model["text"] = load("model", "text") or draw(config.text, of_text)
        return Networks({"model": model}, frozen_parts(load, "model", "vae"))

    def updates(self, step: int) -> tuple[str, ...]:
        return ("model",)

    def gradients(
        self,
        name: str,
        trained: dict[str, Any],
        frozen: dict[str, Any],
        batch: dict[str, Array],
        key: Key[Array, ""],
        config: Config,
    ) -> tuple[Any, dict[str, Array]]:
        return differentiate(self.loss, trained[name], frozen, batch, key, config)

    def loss(
        self, model: dict[str, Any], frozen: dict[str, Any], batch: dict[str, Array], key: Key[Array, ""], config: Config
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        of_levels, of_noise, of_captions, of_context, of_given = jax.random.split(key, 5)
        x0 = clean_latents(frozen, batch)
        lengths = self.level_frames(x0.shape[1], config)
        levels = random_levels(of_levels, (x0.shape[0], len(lengths)), self.shift or config.rollout.shift, self.weighting)
        sigma, weight = (jnp.repeat(one, np.asarray(lengths), axis=1, total_repeat_length=x0.shape[1]) for one in levels)
        given = jax.random.bernoulli(of_given, self.given, (x0.shape[0], 1)) & (jnp.arange(x0.shape[1]) == 0)
        sigma, weight = (jnp.where(given, 0.0, one) for one in (sigma, weight))
        noise = jax.random.normal(of_noise, x0.shape)
        x = flow.add_noise(x0, noise, sigma[..., None, None, None])
        prompt = self.captions(model.get("text", frozen.get("text")), batch, of_captions, config)
        velocity = self.velocity(model["dit"], prompt, x, sigma * flow.TRAIN_STEPS, x0, of_context, config)
        error = jnp.square(velocity - flow.training_target(x0, noise)).mean((2, 3, 4))
        return jnp.mean(weight * error), {}

    def captions(self, encoder: Any, batch: dict[str, Array], key: Key[Array, ""], config: Config) -> Array:
        """The embeddings of the prompts, some dropped."""
        prompt = prompt_embeddings(encoder, batch)
        if self.caption_dropout == 0:
            return prompt
        dropped = jax.random.bernoulli(key, self.caption_dropout, (prompt.shape[0], 1, 1))
        return jnp.where(dropped, negative_embeddings(encoder, batch, prompt, config), prompt)

    def level_frames(self, frames: int, config: Config) -> tuple[int, ...]:
        """How many frames in a row share a noise level."""
        return (frames,)

    def velocity(
        self, model: WanDiT, prompt: Array, x: Array, timestep: Array, x0: Array, key: Key[Array, ""], config: Config
    ) -> Float[Array, "b f h w c"]:
        return bidirectional(model, prompt, x, timestep, config, self.remat)


@dataclasses.dataclass(frozen=True)
class TeacherForcing(Flow):
    """Trains a causal network: every chunk at a timestep of its own, reading the clean chunks before it from the cache.

    Attention is as in generation: sparse by `config.sparsity`, with its budgets, and the window of `config.cache`.
    """

    through_cache: bool = True  # train the keys and values that a chunk is cached as for what later chunks make of them

    def __post_init__(self):
        super().__post_init__()
        check(self.given == 0, f"{self.given=} is for networks that see a whole video: a causal one has clean chunks before it")

    def level_frames(self, frames: int, config: Config) -> tuple[int, ...]:
        return chunk_lengths(frames, config.rollout.chunk_frames, config.rollout.independent_first_frame)

    def velocity(
        self, model: WanDiT, prompt: Array, x: Array, timestep: Array, x0: Array, key: Key[Array, ""], config: Config
    ) -> Float[Array, "b f h w c"]:
        keys = jax.random.split(key, x.shape[0])
        return causal_pass(model, prompt, x, timestep, keys, config, x0, self.through_cache, self.remat)
