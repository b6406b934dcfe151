"""What an objective is, and what its batches hold.

A batch is a dict of arrays:

    latents    [b, f, h, w, c] normalised, or `video` [b, f, h, w, 3] in [-1, 1], which the frozen autoencoder encodes
    ids        [b, n] int32 and `lengths` [b]: prompts, which the text encoder encodes; or `text` [b, n, text_dim]
    negative   [b, n, text_dim]: embeddings of the negative prompt, where they are not those of the empty prompt
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import loading, text, vae
from lf_jax.arrays import Array, Float, Key, Leaf
from lf_jax.config import Config, Model, Text, Vae, check
from lf_jax.text.tokenizer import EOS

ENCODED_FRAMES = 4  # latent frames that the frozen autoencoder makes at a time

# The component "dit", "text" or "vae" of what a role is to start from, or None where nothing is named for it.
Load = Callable[[str, str], nnx.Module | None]


class Networks(NamedTuple):
    """The networks of an objective, by role; below a trained role, by component."""

    trained: dict[str, dict[str, nnx.Module]]
    frozen: dict[str, nnx.Module]


@runtime_checkable
class Objective(Protocol):
    """A loss, or several that take turns. Objectives are frozen dataclasses: static arguments of the compiled step."""

    def build(self, config: Config, load: Load, key: Key[Array, ""]) -> Networks:
        """The networks, loaded or drawn from `key`."""
        ...

    def updates(self, step: int) -> tuple[str, ...]:
        """The trained networks that step `step` updates, in this order."""
        ...

    def gradients(
        self,
        name: str,
        trained: dict[str, Any],
        frozen: dict[str, Any],
        batch: dict[str, Array],
        key: Key[Array, ""],
        config: Config,
    ) -> tuple[Any, dict[str, Array]]:
        """The gradient of `trained[name]`, in float32, and scalar metrics of which "loss" is one. Pure; `name` is static."""
        ...


def differentiate(loss: Callable, network: Leaf, *arguments: Any) -> tuple[Leaf, dict[str, Array]]:
    """The gradient, in float32, of `loss(network, *arguments) -> (scalar, metrics)` by `network`, and all metrics."""
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(network, *arguments)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient), {"loss": value, **metrics}


def draw(part: Model | Vae | Text, key: Key[Array, ""]) -> nnx.Module:
    """A component to be trained from scratch. A transformer's last kernel is zero, as Wan starts it: it predicts nothing."""
    module = loading.random_module(part, int(jax.random.bits(key)))
    if isinstance(part, Model):
        module.head.linear.kernel = nnx.Param(jnp.zeros_like(module.head.linear.kernel[...]))
    return module


def frozen_parts(load: Load, role: str, *components: str) -> dict[str, nnx.Module]:
    """The components that `load` has for a role, by name. Batches may make them unnecessary."""
    found = {name: load(role, name) for name in components}
    return {name: module for name, module in found.items() if module is not None}


def clean_latents(frozen: dict[str, Any], batch: dict[str, Array]) -> Float[Array, "b f h w c"]:
    """The batch's latents, float32.

    Raises:
        ValueError: if it has only pixels and there is no autoencoder.
    """
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    check("video" in batch, f"batch has {sorted(batch)}, expected 'latents' or 'video'")
    check("vae" in frozen, "batch has 'video' and there is no autoencoder to encode it: expected 'latents'")
    return vae.encode(frozen["vae"], batch["video"], ENCODED_FRAMES).astype(jnp.float32)


def prompt_embeddings(encoder: text.UMT5 | None, batch: dict[str, Array]) -> Float[Array, "b n text_dim"]:
    """The embeddings of the batch's prompts.

    Raises:
        ValueError: if it has token ids and there is no encoder.
    """
    if "text" in batch:
        return batch["text"]
    check("ids" in batch, f"batch has {sorted(batch)}, expected 'text', or 'ids' and 'lengths'")
    check(encoder is not None, "batch has 'ids' and there is no text encoder: expected 'text'")
    return text.encode(encoder, batch["ids"], batch["lengths"])


def negative_embeddings(
    encoder: text.UMT5 | None, batch: dict[str, Array], prompt: Float[Array, "b n text_dim"], config: Config
) -> Float[Array, "b n text_dim"]:
    """What the unconditional branch reads: the negative prompt, as when sampling with guidance, with as many rows as `prompt`.

    The embeddings of the empty prompt, which is the end token alone, are made here; those of another one, and any where
    prompts come as embeddings, stand in the batch. Zero rows would not do for either: no sampler uses them.

    Raises:
        ValueError: if they are neither given nor can be made.
    """
    if "negative" not in batch:
        check(
            "text" not in batch and not config.video.negative_prompt,
            f"batch has {sorted(batch)}, expected 'negative' too: the embeddings of {config.video.negative_prompt!r}",
        )
        ids = jnp.zeros_like(batch["ids"][:1]).at[:, 0].set(EOS)
        empty = text.encode(encoder, ids, jnp.ones(1, jnp.int32))
        return jnp.broadcast_to(empty, prompt.shape).astype(prompt.dtype)
    rows, wanted = batch["negative"].shape[1], prompt.shape[1]
    check(rows <= wanted, f"batch['negative'] has {rows} rows, expected at most {wanted}, those of the prompts")
    return jnp.pad(batch["negative"], ((0, 0), (0, wanted - rows), (0, 0))).astype(prompt.dtype)
