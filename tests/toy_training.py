"""The smallest training: a text encoder that learns to sum up its tokens, and a linear critic. Compiles in a second."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lf_jax import loading, presets
from lf_jax.config import Config, Model, Text
from lf_jax.layers import Linear
from lf_jax.text import UMT5
from lf_jax.train import Optimizer, Train
from lf_jax.train.objectives import Networks

LENGTH, WIDTH = 4, 16
TEXT = Text(vocab=512, dim=WIDTH, ffn_dim=16, heads=2, head_dim=8, layers=1, length=LENGTH, dtype="float32")
MODEL = Model(dim=16, ffn_dim=32, heads=2, layers=2, freq_dim=16, text_dim=WIDTH, text_len=LENGTH, dtype="float32")
CONFIG: Config = dataclasses.replace(presets.load("tiny"), model=MODEL, text=TEXT)

traced: list[str] = []  # the networks whose gradients were traced, once a compilation


@dataclasses.dataclass(frozen=True)
class Sums:
    """One trained network, or two that take turns. Draws noise, so that keys count."""

    names: tuple[str, ...] = ("model",)
    every: int = 1  # steps between updates of the first network
    noise: float = 0.1
    scale: float = 1.0  # of the loss

    def build(self, config: Config, load: Any, key: jax.Array) -> Networks:
        encoder = load(self.names[0], "text") or UMT5(config.text, rngs=nnx.Rngs(0))
        trained = {self.names[0]: {"text": encoder}}
        for name in self.names[1:]:
            trained[name] = {"linear": Linear(WIDTH, 1, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(key))}
        return Networks(trained, {"text": encoder})

    def updates(self, step: int) -> tuple[str, ...]:
        return self.names if step % self.every == 0 else self.names[1:]

    def gradients(self, name, trained, frozen, batch, key, config):
        traced.append(name)

        def loss(network):
            encoder = network["text"] if "text" in network else frozen["text"]
            rows = encoder.token_embedding[...][batch["ids"]].astype(encoder.config.dtype)  # far less to compile than `encode`
            rows = (rows @ encoder.blocks.q.kernel[...][0].astype(rows.dtype)).astype(jnp.float32) * encoder.norm.scale[...]
            found = rows.sum(axis=(1, 2)) if "text" in network else network["linear"](rows.sum(axis=1))[:, 0]
            noise = self.noise * jax.random.normal(key, found.shape)
            return self.scale * jnp.mean((found + noise - batch["sum"]) ** 2)

        value, gradient = jax.value_and_grad(loss)(trained[name])
        return gradient, {"loss": value}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Trains a transformer by its weights alone: hardly anything to compile."""

    names = ("model",)

    def build(self, config: Config, load: Any, key: jax.Array) -> Networks:
        return Networks({"model": {"dit": load("model", "dit") or loading.random_module(config.model, 0)}}, {})

    def updates(self, step: int) -> tuple[str, ...]:
        return self.names

    @staticmethod
    def loss(network: dict[str, nnx.Module]) -> jax.Array:
        blocks = network["dit"].blocks
        return jnp.mean(blocks.self_attention.qkv.kernel[:, 0] ** 2) + jnp.mean(blocks.ffn.up.kernel[...] ** 2)

    def gradients(self, name, trained, frozen, batch, key, config):
        value, gradient = jax.value_and_grad(self.loss)(trained[name])
        return gradient, {"loss": value, "drawn": jax.random.uniform(key)}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Random tokens and their sum."""

    seed: int = 0

    def batch(self, config: Config, step: int, size: int) -> dict[str, np.ndarray]:
        ids = np.random.default_rng([self.seed, step]).integers(2, 64, (size, config.text.length)).astype(np.int32)
        return {"ids": ids, "sum": ids.sum(axis=1).astype(np.float32) / 100}


def training(**changes: Any) -> Train:
    """Eight steps of a run on one device."""
    names = changes.get("objective", Sums()).names
    optimizers = {name: Optimizer(learning_rate=1e-2, ema=0.9, decay="cosine", warmup=2) for name in names}
    plan = Train(
        objective=Sums(), data=Numbers(), optimizers=optimizers, config=CONFIG, steps=8, batch=4,
        compute_dtype="float32", save_every=3, keep=2, log_every=2,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)
