"""The UMT5 encoder that Wan2.1 reads prompts with: T5 v1.1 whose every layer has its own relative position bias."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lf_jax import config, layers
from lf_jax.arrays import Array, Bool, Float, Int


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair, int32 [length, length]: one half of `buckets` for keys after the query,
    the other for the rest; in each half, one bucket a token up to a quarter of `buckets`, then logarithmic.

    Plain numpy at trace time: the float32 logarithm decides which side of an edge a distance falls on, and a device's
    logarithm may decide otherwise.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(relative)
    octaves = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    far = np.minimum(exact + (octaves * (half - exact)).astype(np.int32), half - 1)
    return (np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class Block(nnx.Module):
    """Self-attention without scaling by head_dim, and a GELU-gated feed-forward; no biases."""

    def __init__(self, part: config.Text, *, rngs: nnx.Rngs):
        self.heads = part.heads
        dtype, inner = config.dtype_of(part), part.heads * part.head_dim
        plain = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.attention_norm = layers.RMSNorm(part.dim, eps=part.eps, dtype=dtype)
        unscaled = jax.nn.initializers.normal((part.dim * part.head_dim) ** -0.5)  # carries the missing 1 / sqrt(head_dim)
        self.q = layers.Linear(part.dim, inner, init=unscaled, **plain)
        self.k = layers.Linear(part.dim, inner, **plain)
        self.v = layers.Linear(part.dim, inner, **plain)
        self.o = layers.Linear(inner, part.dim, **plain)
        self.position_bias = nnx.Param(jax.random.normal(rngs.params(), (part.buckets, part.heads), dtype))
        self.ffn_norm = layers.RMSNorm(part.dim, eps=part.eps, dtype=dtype)
        self.gate = layers.Linear(part.dim, part.ffn_dim, **plain)
        self.up = layers.Linear(part.dim, part.ffn_dim, **plain)
        self.down = layers.Linear(part.ffn_dim, part.dim, **plain)

    def __call__(self, x: Float[Array, "b n d"], buckets: Int[Array, "n n"], live: Bool[Array, "b n"]) -> Float[Array, "b n d"]:
        with jax.named_scope("attention"):
            y = self.attention_norm(x)
            q, k, v = (part(y).reshape(*y.shape[:2], self.heads, -1) for part in (self.q, self.k, self.v))
            scores = jnp.einsum("bqhe,bkhe->bhqk", q, k, preferred_element_type=jnp.float32)
            scores += self.position_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)
            scores = jnp.where(live[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
            x = _finite(x + self.o(jnp.einsum("bhqk,bkhe->bqhe", weights, v).reshape(*x.shape[:2], -1)))
        with jax.named_scope("ffn"):
            y = self.ffn_norm(x)
            return _finite(x + self.down(layers.gelu(self.gate(y)) * self.up(y)))


def _finite(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """float16 cannot hold every activation of the XXL encoder; the original cuts them off at the same value."""
    if x.dtype != jnp.float16:
        return x
    limit = jnp.finfo(jnp.float16).max - 1000
    return jnp.clip(x, -limit, limit)


class UMT5(nnx.Module):
    """The encoder. `blocks` is one `Block` whose every leaf has a leading [layer] axis."""

    def __init__(self, part: config.Text, *, rngs: nnx.Rngs):
        self.config = part
        dtype = config.dtype_of(part)
        self.token_embedding = nnx.Param(jax.random.normal(rngs.params(), (part.vocab, part.dim), dtype))
        keys = jax.random.split(rngs.params(), part.layers)
        self.blocks = jax.vmap(lambda key: Block(part, rngs=nnx.Rngs(key)))(keys)
        self.norm = layers.RMSNorm(part.dim, eps=part.eps, dtype=dtype)


def encode(model: UMT5, ids: Int[Array, "b n"], lengths: Int[Array, " b"]) -> Float[Array, "b n d"]:
    """The embeddings of tokenized prompts, in the dtype of the encoder.

    Args:
        ids: int32, each row a prompt that ends in the end token, then padding; below `config.Text.vocab` (an id that is
            not reads the last row: `Tokenizer(..., vocab=)` checks it where it can be checked).
        lengths: live tokens of every row, at least 1. Keys from there on are masked and rows from there on are zero,
            as in Wan2.1, whose transformer attends to those zero rows too.
    """
    n, part = ids.shape[1], model.config
    buckets = jnp.asarray(position_buckets(n, part.buckets, part.max_distance))
    live = jnp.arange(n) < lengths[:, None]
    x, _ = jax.lax.scan(lambda x, block: (block(x, buckets, live), None), model.token_embedding[...][ids], model.blocks)
    return jnp.where(live[..., None], model.norm(x), 0)
