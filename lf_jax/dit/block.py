"""One transformer block of Wan2.1: self-attention, cross-attention to the text, feed-forward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import attention, config, rope
from lf_jax.arrays import Array, Float
from lf_jax.cache import ChunkKV
from lf_jax.layers import LayerNorm, Linear, Mlp, RMSNorm, layer_norm

# (q, k, v), each [b, t, head, head_dim] -> what every token reads, same shape, and what the layer adds to the cache
Attend = Callable[[Array, Array, Array], tuple[Array, ChunkKV]]


def modulate(
    x: Float[Array, "b t d"], shift: Float[Array, "b f d"], scale: Float[Array, "b f d"], eps: float
) -> Float[Array, "b t d"]:
    """Layer norm, then the scale and shift of the frame that a token belongs to; float32 inside, rounded once."""
    frames = layer_norm(x, eps).reshape(*shift.shape[:2], -1, x.shape[-1])
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(x.shape).astype(x.dtype)


def gated_sum(x: Float[Array, "b t d"], gate: Float[Array, "b f d"], y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """`x + gate * y` with the gate of the token's frame; float32 inside, rounded once."""
    gated = y.astype(jnp.float32).reshape(*gate.shape[:2], -1, y.shape[-1]) * gate[:, :, None]
    return (x + gated.reshape(x.shape)).astype(x.dtype)


class Attention(nnx.Module):
    """The projections of an attention layer. q and k are normalised over the full width, before the head split."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(model)
        self.heads = model.heads
        self.q = Linear(model.dim, model.dim, dtype=dtype, rngs=rngs)
        self.k = Linear(model.dim, model.dim, dtype=dtype, rngs=rngs)
        self.v = Linear(model.dim, model.dim, dtype=dtype, rngs=rngs)
        self.o = Linear(model.dim, model.dim, dtype=dtype, rngs=rngs)
        self.norm_q = RMSNorm(model.dim, eps=model.eps, dtype=dtype)
        self.norm_k = RMSNorm(model.dim, eps=model.eps, dtype=dtype)

    def queries(self, x: Float[Array, "b t d"]) -> Float[Array, "b t head e"]:
        return self._split(self.norm_q(self.q(x)))

    def keys_values(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n head e"], Float[Array, "b n head e"]]:
        return self._split(self.norm_k(self.k(x))), self._split(self.v(x))

    def output(self, x: Float[Array, "b t head e"]) -> Float[Array, "b t d"]:
        return self.o(x.reshape(*x.shape[:2], -1))

    def _split(self, x: Float[Array, "b t d"]) -> Float[Array, "b t head e"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class Block(nnx.Module):
    """Reads the past through `attend` and returns the keys and values it made; writes nothing."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(model)
        self.eps = model.eps
        spread = jax.nn.initializers.normal(model.dim**-0.5)
        self.modulation = nnx.Param(spread(rngs.params(), (6, model.dim), dtype))
        self.self_attention = Attention(model, rngs=rngs)
        self.cross_norm = LayerNorm(model.dim, eps=model.eps, dtype=dtype)
        self.cross_attention = Attention(model, rngs=rngs)
        self.ffn = Mlp(model.dim, model.ffn_dim, model.dim, dtype=dtype, rngs=rngs)
        # What `attend` may add to the attention of the listed blocks, one projection for all heads. Zero changes nothing.
        nothing, wide = jax.nn.initializers.zeros, (model.head_dim, model.head_dim)
        self.marginal = Linear(*wide, init=nothing, dtype=dtype, rngs=rngs) if model.linear_branch else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        modulation: Float[Array, "b f 6 d"],
        angles: Float[Array, "t half"],
        text_k: Float[Array, "b n head e"],
        text_v: Float[Array, "b n head e"],
        attend: Attend,
    ) -> tuple[Float[Array, "b t d"], ChunkKV]:
        """
        Args:
            modulation: float32; what the timestep of every frame adds to the block's own six vectors
                (shift, scale, gate of the self-attention, then of the feed-forward).
            angles: rotary angles of the tokens, radians.
            text_k, text_v: keys and values of the text for this layer; all rows are attended to.
        """
        vectors = jnp.moveaxis(self.modulation[...].astype(jnp.float32) + modulation, 2, 0)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors
        with jax.named_scope("block"):
            with jax.named_scope("attention"):
                normed = modulate(x, shift, scale, self.eps)
                q = rope.rotate(self.self_attention.queries(normed), angles)
                k, v = self.self_attention.keys_values(normed)
                read, new = attend(q, rope.rotate(k, angles), v)
                x = gated_sum(x, gate, self.self_attention.output(read))
            with jax.named_scope("cross_attention"):
                q = self.cross_attention.queries(self.cross_norm(x))
                x = x + self.cross_attention.output(attention.cross_attention(q, text_k, text_v))
            with jax.named_scope("ffn"):
                x = gated_sum(x, ffn_gate, self.ffn(modulate(x, ffn_shift, ffn_scale, self.eps)))
        return x, new
