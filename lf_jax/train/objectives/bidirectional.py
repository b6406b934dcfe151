"""Networks that see a whole video at once: the causal network's pass over one chunk of all frames, with nothing cached."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import cache as kv
from lf_jax import flow
from lf_jax.arrays import Array, Float, Key
from lf_jax.config import Cache, Config, Sparsity
from lf_jax.dit.model import WanDiT, forward, text_cache
from lf_jax.tokens import Grid

DENSE = Sparsity()

# How levels count in a loss: all the same, or by the bell of Wan's scheduler, which leaves out pure noise. Sampling starts
# at pure noise, so training from scratch wants the former.
Weighting = Literal["uniform", "bell"]


def bidirectional(
    model: WanDiT,
    prompt: Float[Array, "b n text_dim"],
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    config: Config,
    remat: bool | None = None,
) -> Float[Array, "b f h w c"]:
    """The velocity of a whole video. Dense whatever `config.sparsity` says: a chunk without a past keeps all its blocks.

    The transformer may be another than `config.model`, for a teacher is.
    """
    grid = Grid.of(dataclasses.replace(config, model=model.config, sparsity=DENSE))
    nothing = kv.empty(model.config, grid, Cache(), sparse=False, batch=x.shape[0], frames=0)
    return forward(model, x, timestep, text_cache(model, prompt), nothing, None, grid, DENSE, remat)[0]


def guided(
    model: WanDiT,
    prompt: Float[Array, "b n text_dim"],
    negative: Float[Array, "b n text_dim"],
    scale: float,
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    config: Config,
) -> Float[Array, "b f h w c"]:
    """The velocity under classifier-free guidance, u + scale (c - u), as `chunk.guided_velocity` has it."""
    x, timestep, text = jnp.tile(x, (2, 1, 1, 1, 1)), jnp.tile(timestep, (2, 1)), jnp.concatenate([prompt, negative])
    conditional, unconditional = jnp.split(bidirectional(model, text, x, timestep, config), 2)
    return unconditional + scale * (conditional - unconditional)


def random_levels(
    key: Key[Array, ""], shape: tuple[int, ...], shift: float, weighting: Weighting = "uniform"
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Noise levels drawn from the shifted grid of `flow`, every grid point alike, and their weights in a loss."""
    index = jax.random.randint(key, shape, 0, flow.TRAIN_STEPS)
    weights = np.ones(flow.TRAIN_STEPS) if weighting == "uniform" else flow.training_weights(shift)
    table = jnp.asarray(np.stack([flow.sigma_grid(shift), weights]), jnp.float32)
    sigma, weight = table[:, index]
    return sigma, weight
