"""The memory that a run will take, from shapes alone: nothing is allocated and nothing is loaded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lf_jax import cache, config, tokens
from lf_jax.checkpoint import component
from lf_jax.chunk import branches, compiled_chunk
from lf_jax.config import Config
from lf_jax.dit import text_cache
from lf_jax.generate import DECODED_FRAMES, decode_pixels
from lf_jax.inputs import video_chunks
from lf_jax.rollout import initial_state


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

    @property
    def cache_bytes(self) -> int:
        """0 for a video of one chunk, which needs no cache."""
        return sum(item.bytes for item in self.items if item.name in CACHE)

    def window_that_fits(self, memory: int) -> int:
        """Latent frames that the cache could hold if the device had `memory` bytes, everything else unchanged."""
        return max(0, (memory - self.total("rollout") + self.cache_bytes) // self.frame_bytes)


CACHE = ("KV cache", "means of key blocks")
SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def memory(settings: Config, batch: int = 1, compiled: bool = False) -> Budget:
    """The budget of generating `batch` videos at a time.

    Args:
        compiled: compile the two programs of the rollout and take their temporary memory from the compiler.

    Raises:
        ValueError: if `settings.video.num_frames` does not fit the chunks.
    """
    grid, lengths, rows = tokens.Grid.of(settings), video_chunks(settings), batch * branches(settings)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(lambda keys: initial_state(settings, batch, sum(lengths), keys), keys)
    kv = state.cache

    model, encoder = component.abstract(settings.model), component.abstract(settings.text)
    autoencoder = component.abstract(settings.vae)
    embeddings = jax.ShapeDtypeStruct((rows, settings.text.length, settings.text.dim), config.dtype_of(settings.text))
    text = jax.eval_shape(text_cache, model, embeddings)
    decoded = min(lengths[-1], DECODED_FRAMES)
    latents = jax.ShapeDtypeStruct((batch, decoded, *latent_size(settings), settings.vae.channels), jnp.float32)
    pixels, decoder = jax.eval_shape(decode_pixels, autoencoder, latents, None)

    if compiled:
        budget = None if state.budgets is None else dataclasses.replace(state.budgets, blocks=SCALAR)
        step = compiled_chunk.lower(model, text, None, kv, keys, SCALAR, budget, settings, lengths[-1])
        passes = temporary(step), temporary(decode_pixels.lower(autoencoder, latents, decoder))
    else:
        passes = chunk_activations(settings, rows, lengths[-1], kv.frames), decode_activations(settings, pixels)
    kept = f"{kv.frames} latent frames" if kv.frames else "one chunk: no past, no future"
    pooled = size((kv.pooled, kv.sink_pooled))
    items = [
        Item("text encoder", size(encoder), f"{count(encoder):,} parameters, dropped after encoding", "encoding"),
        Item("text activations", text_activations(settings), f"{settings.text.length} tokens", "encoding", False),
        Item("transformer", size(model), f"{count(model):,} parameters", "rollout"),
        Item("autoencoder", size(autoencoder), f"{count(autoencoder):,} parameters", "rollout"),
        Item(CACHE[0], size((kv.k, kv.v, kv.sink_k)), kept, "rollout"),
        *([Item(CACHE[1], pooled, f"{kept} of {grid.frame_blocks} blocks", "rollout")] if pooled else []),
        Item("text keys and values", size(text), f"{settings.model.text_len} rows in every layer", "rollout"),
        Item("decoder cache", size(decoder), "what the decoder keeps between chunks", "rollout"),
        Item(
            "activations",
            max(passes),
            f"of a {('transformer', 'decoder')[passes.index(max(passes))]} pass",
            "rollout",
            compiled,
        ),
    ]
    sparse = not settings.sparsity.dense
    slot = jax.eval_shape(lambda: cache.empty(settings.model, grid, config.Cache(), sparse, rows, 1))
    return Budget(tuple(items), size((slot.k, slot.v, slot.pooled)))


def temporary(program: jax.stages.Lowered) -> int:
    """Bytes that a program takes beside its arguments and results."""
    return program.compile().memory_analysis().temp_size_in_bytes


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
    """One pass over a chunk: the stream, q, k, v and the output or the feed-forward's hidden layer; where there is a cache
    also every layer's new keys and values, and where attention is dense one layer's view of it."""
    grid, model = tokens.Grid.of(settings), settings.model
    width = jnp.dtype(model.dtype).itemsize
    live, padded = chunk * grid.frame_tokens, chunk * grid.padded_frame
    layer = live * (2 * model.dim + max(4 * model.dim, model.ffn_dim))
    new = 2 * model.layers * padded * model.dim if cached else 0
    view = 2 * cached * grid.padded_frame * model.dim if settings.sparsity.dense else 0
    return rows * (layer + new + view) * width


def decode_activations(settings: Config, pixels: jax.ShapeDtypeStruct) -> int:
    """One decoder call: six arrays of the finest level, where the most pixels are.

    The last upsampling reads an array of twice that width and writes one; a residual block holds its input, its output
    and the copy, extended by the frames before, that a convolution over time reads.
    """
    part = settings.vae
    channels = part.base if part.kind == "wan" else part.widths[-1]
    return 6 * pixels.size // 3 * channels * jnp.dtype(part.dtype).itemsize


def text_activations(settings: Config) -> int:
    """One prompt in the text encoder: float32 attention scores and weights, the stream, and the gated hidden layer."""
    part = settings.text
    width = jnp.dtype(part.dtype).itemsize
    return 2 * 4 * part.heads * part.length**2 + width * part.length * (4 * part.dim + 2 * part.ffn_dim)


def device_memory() -> int | None:
    """Bytes that this process may take on its first device, where the device says so."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")
