"""A model small enough to roll out in a test, and what a rollout needs beside it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lf_jax import config, noise
from lf_jax.dit import model as dit

MODEL = config.Model(dim=24, ffn_dim=32, heads=2, layers=2, channels=4, freq_dim=16, text_dim=8, text_len=6, dtype="float32")
CONFIG = config.Config(  # 2 x 3 tokens a frame; key blocks of 4, so that every frame has a short one
    model=MODEL,
    vae=config.Vae(channels=4, mean=(0.0,) * 4, std=(1.0,) * 4, dtype="float32"),
    text=config.Text(dim=8, length=6, dtype="float32"),
    rollout=config.Rollout(timesteps=(1000.0, 500.0)),
    video=config.Video(height=32, width=48),
)
FRAME = (4, 6, 4)  # height, width and channels of a latent frame
SPARSE = config.Sparsity(policy="light_forcing", target=0.5, base=0.7, keep_frames=4, block_q=4, block_k=4)


# Compiles in half the time; what these programs compute is the same.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def change(settings=CONFIG, **parts):
    """The config with some fields of its parts changed: change(rollout=dict(shift=8.0))."""
    new = {name: value if not isinstance(value, dict) else dataclasses.replace(getattr(settings, name), **value)
           for name, value in parts.items()}  # fmt: skip
    return dataclasses.replace(settings, **new)


@quick
def make_model(seed=0):
    return dit.WanDiT(MODEL, rngs=nnx.Rngs(seed))


def make_text(model, batch, seed=1):
    return quick(dit.text_cache)(model, draw(batch, 4, MODEL.text_dim, seed=seed))


def make_keys(batch, seed=0):
    return jnp.stack([noise.sample_key(seed, f"prompt {i}") for i in range(batch)])


def draw(*shape, seed=3):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
