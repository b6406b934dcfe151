"""The memory that a run will take, from shapes alone: nothing is allocated and nothing is loaded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import cache, config, tokens, vae
from lf_jax.config import Config
from lf_jax.dit import WanDiT, text_cache
from lf_jax.text import UMT5

DECODED_FRAMES = 3  # latent frames that are decoded in one call


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of the budget."""

    name: str
    bytes: int
    detail: str
    when: str  # "encoding", "rollout": what lives at the same time adds up
    exact: bool = True  # from the shapes of the arrays; False: an estimate of what the compiler will need


@dataclasses.dataclass(frozen=True)
class Budget:
    items: tuple[Item, ...]
    frame_bytes: int  # of keys, values and their means, per cached latent frame

    def total(self, when: str) -> int:
        return sum(item.bytes for item in self.items if item.when == when)

    @property
    def peak(self) -> int:
        """The larger of the two stages: the text encoder is gone before the rollout begins."""
        return max(self.total("encoding"), self.total("rollout"))

    def window_that_fits(self, memory: int) -> int:
        """Latent frames that the cache could hold if the device had `memory` bytes, everything else unchanged."""
        held = sum(item.bytes for item in self.items if item.name in CACHE)
        return max(0, (memory - self.total("rollout") + held) // self.frame_bytes)


CACHE = ("keys and values", "means of key blocks")


def memory(settings: Config, batch: int = 1) -> Budget:
    """The budget of generating `batch` videos at a time.

    Raises:
        ValueError: if `settings.video.num_frames` does not fit the chunks.
    """
    grid = tokens.Grid.of(settings)
    frames = tokens.latent_frames(settings.video.num_frames, settings.vae.temporal_stride)
    lengths = tokens.chunk_lengths(frames, settings.rollout.chunk_frames, settings.rollout.independent_first_frame)
    rows = batch * (1 if settings.rollout.guidance_scale == 1 else 2)
    chunk = max(lengths)

    model = jax.eval_shape(lambda: WanDiT(settings.model, rngs=nnx.Rngs(0)))
    encoder = jax.eval_shape(lambda: UMT5(settings.text, rngs=nnx.Rngs(0)))
    autoencoder = jax.eval_shape(lambda: vae.build(settings.vae, rngs=nnx.Rngs(0)))
    embeddings = jax.ShapeDtypeStruct((rows, settings.model.text_len, settings.model.text_dim), config.dtype_of(settings.text))
    text = jax.eval_shape(text_cache, model, embeddings)
    kv = jax.eval_shape(lambda: cache.empty(settings.model, grid, settings.cache, not settings.sparsity.dense, rows, frames))
    latents = jax.ShapeDtypeStruct(
        (batch, min(chunk, DECODED_FRAMES), *latent_size(settings), settings.vae.channels), config.dtype_of(settings.vae)
    )
    pixels, decoder = jax.eval_shape(vae.decode_chunk, autoencoder, latents)

    kept = f"{kv.frames} latent frames"
    pooled = size(kv.pooled) + size(kv.sink_pooled)
    items = [
        Item("text encoder", size(encoder), f"{count(encoder):,} parameters, dropped after encoding", "encoding"),
        Item(
            "text activations", text_activations(settings, rows), f"{rows * settings.text.length} tokens", "encoding", False
        ),
        Item("transformer", size(model), f"{count(model):,} parameters", "rollout"),
        Item("autoencoder", size(autoencoder), f"{count(autoencoder):,} parameters", "rollout"),
        Item(CACHE[0], size((kv.k, kv.v, kv.sink_k)), kept, "rollout"),
        *([Item(CACHE[1], pooled, f"{kept}, {grid.frame_blocks} blocks each", "rollout")] if pooled else []),
        Item("text keys and values", size(text), f"{settings.model.text_len} rows, every layer", "rollout"),
        Item("decoder cache", size(decoder), "what the autoencoder keeps between chunks", "rollout"),
        Item(
            "activations",
            max(chunk_activations(settings, rows, chunk, kv.frames), decode_activations(settings, pixels)),
            "the larger of one transformer pass and one decoder call",
            "rollout",
            False,
        ),
    ]
    slots = kv.frames + settings.cache.sink * (kv.sink_k is not None)
    return Budget(tuple(items), (size((kv.k, kv.v, kv.sink_k)) + pooled) // slots)


def latent_size(settings: Config) -> tuple[int, int]:
    """Rows and columns of a latent frame."""
    stride = settings.vae.spatial_stride
    return settings.video.height // stride, settings.video.width // stride


def size(tree: Any) -> int:
    """Bytes of all arrays in a tree, real or abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def chunk_activations(settings: Config, rows: int, chunk: int, cached: int) -> int:
    """One pass over a chunk: the stream, q, k, v and the output or the feed-forward's hidden layer, and every layer's new
    keys and values; where attention is dense also one layer's view of the cache."""
    grid, model = tokens.Grid.of(settings), settings.model
    width = jnp.dtype(model.dtype).itemsize
    live, padded = chunk * grid.frame_tokens, chunk * grid.padded_frame
    layer = live * (2 * model.dim + max(4 * model.dim, model.ffn_dim))
    new = 2 * model.layers * padded * model.dim
    view = 2 * cached * grid.padded_frame * model.dim if settings.sparsity.dense else 0
    return rows * (layer + new + view) * width


def decode_activations(settings: Config, pixels: jax.ShapeDtypeStruct) -> int:
    """One decoder call: four arrays of the finest level, where the most pixels are."""
    part = settings.vae
    channels = part.base if part.kind == "wan" else part.widths[-1]
    return 4 * pixels.size // 3 * channels * jnp.dtype(part.dtype).itemsize


def text_activations(settings: Config, rows: int) -> int:
    """One pass of the text encoder: float32 attention weights, and the gated hidden layer."""
    part = settings.text
    width = jnp.dtype(part.dtype).itemsize
    return rows * (2 * 4 * part.heads * part.length**2 + width * part.length * (4 * part.dim + 2 * part.ffn_dim))


def device_memory() -> int | None:
    """Bytes that this process may take on its first device, where the device says so."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")
