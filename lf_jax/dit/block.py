"""One transformer block of Wan2.1: self-attention, cross-attention to the text, feed-forward."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import attention, config
from lf_jax.arrays import Array, Float
from lf_jax.cache import ChunkKV
from lf_jax.dit.linears import Mlp, linear
from lf_jax.layers import LayerNorm, Linear, RMSNorm
from lf_jax.tokens import Grid
from pallas_kernels import fused
from pallas_kernels.linear import Quantised

Turn = tuple[Float[Array, "t half"], Float[Array, "t half"]]  # cosines and sines of the rotary angles of every token


class Attention(nnx.Module):
    """What both kinds have. q and k are normalised over the full width, before the head split."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(model)
        self.heads = model.heads
        self.o = linear(model, model.dim, model.dim, rngs=rngs)
        self.norm_q = RMSNorm(model.dim, eps=model.eps, dtype=dtype)
        self.norm_k = RMSNorm(model.dim, eps=model.eps, dtype=dtype)

    def normed(self, x: Float[Array, "b t p"], norm: RMSNorm, turn: Turn | None, **place) -> tuple[Array, Array | None]:
        """Heads of a projection, normalised and rotated; `place` as in `pallas_kernels.fused.norm_rope`."""
        cos, sin = turn or (None, None)
        return fused.norm_rope(x, norm.scale[...], cos, sin, heads=self.heads, eps=norm.eps, **place)

    def split(self, x: Float[Array, "b t d"]) -> Float[Array, "b t head e"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class SelfAttention(Attention):
    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        super().__init__(model, rngs=rngs)
        self.qkv = linear(model, model.dim, model.dim, parts=3, rngs=rngs)

    def queries_keys(
        self, qkv: Float[Array, "b t p"], turn: Turn | None, grid: Grid, pool: bool
    ) -> tuple[Float[Array, "b t head e"], Float[Array, "b block head e"] | None, ChunkKV]:
        """The queries, what the layer adds to the cache, and where `pool` the mean query of every block.

        Args:
            qkv: the three projections side by side.
            turn: None leaves positions out.
            pool: whether selection will need mean queries and keys.
        """
        v = attention.with_padding(self.split(qkv[..., 2 * qkv.shape[-1] // 3 :]), grid)
        if not pool:
            (q, _), (k, _) = (self.normed(qkv, norm, turn, part=i) for i, norm in enumerate((self.norm_q, self.norm_k)))
            return q, None, ChunkKV(attention.with_padding(k, grid), v, None)
        q, means = self.normed(qkv, self.norm_q, turn, part=0, block=grid.block_q)
        k, pooled = self.normed(qkv, self.norm_k, turn, part=1, block=grid.block_k, frame_tokens=grid.frame_tokens)
        return q, means, ChunkKV(k, v, pooled)


class CrossAttention(Attention):
    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        super().__init__(model, rngs=rngs)
        self.q = linear(model, model.dim, model.dim, rngs=rngs)
        self.k = linear(model, model.dim, model.dim, rngs=rngs)
        self.v = linear(model, model.dim, model.dim, rngs=rngs)

    def queries(self, x: Float[Array, "b t d"] | Quantised) -> Float[Array, "b t head e"]:
        return self.normed(self.q(x), self.norm_q, None)[0]

    def keys_values(
        self, x: Float[Array, "b n d"] | Quantised
    ) -> tuple[Float[Array, "b n head e"], Float[Array, "b n head e"]]:
        return self.normed(self.k(x), self.norm_k, None)[0], self.split(self.v(x))


# (the layer's self-attention, its projections [b, t, 3 d]) -> what every token reads, and what the layer adds to the cache
Attend = Callable[[SelfAttention, Array], tuple[Float[Array, "b t head e"], ChunkKV]]


class Block(nnx.Module):
    """Reads the past through `attend` and returns the keys and values it made; writes nothing."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(model)
        self.eps = model.eps
        self.quantised = model.linears == "fp8"
        spread = jax.nn.initializers.normal(model.dim**-0.5)
        self.modulation = nnx.Param(spread(rngs.params(), (6, model.dim), dtype))
        self.self_attention = SelfAttention(model, rngs=rngs)
        self.cross_norm = LayerNorm(model.dim, eps=model.eps, dtype=dtype)
        self.cross_attention = CrossAttention(model, rngs=rngs)
        self.ffn = Mlp(model, rngs=rngs)
        # What `attend` may add to the attention of the listed blocks, one projection for all heads. Zero changes nothing.
        nothing, wide = jax.nn.initializers.zeros, (model.head_dim, model.head_dim)
        self.marginal = Linear(*wide, init=nothing, dtype=dtype, rngs=rngs) if model.linear_branch else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        modulation: Float[Array, "b f 6 d"],
        text_k: Float[Array, "b n head e"],
        text_v: Float[Array, "b n head e"],
        attend: Attend,
    ) -> tuple[Float[Array, "b t d"], ChunkKV]:
        """
        Args:
            modulation: float32; what the timestep of every frame adds to the block's own six vectors
                (shift, scale, gate of the self-attention, then of the feed-forward).
            text_k, text_v: keys and values of the text for this layer; all rows are attended to.
        """
        vectors = (own.astype(jnp.float32) + modulation[:, :, i] for i, own in enumerate(self.modulation[...]))
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors
        cross, own, quantise = self.cross_attention, self.self_attention, self.quantised
        with jax.named_scope("block"):
            with jax.named_scope("attention"):
                with jax.named_scope("qkv"):
                    qkv = own.qkv(fused.norm_modulate(x, shift, scale, eps=self.eps, quantise=quantise))
                read, new = attend(own, qkv)
                with jax.named_scope("output"):
                    x = own.o(self.rows(read), gate=gate, residual=x)
            with jax.named_scope("cross_attention"):
                q = cross.queries(self.cross_norm(x, quantise=quantise))
                x = cross.o(self.rows(attention.cross_attention(q, text_k, text_v)), residual=x)
            with jax.named_scope("ffn"):
                hidden = self.ffn.up(
                    fused.norm_modulate(x, ffn_shift, ffn_scale, eps=self.eps, quantise=quantise), activation="gelu"
                )
                x = self.ffn.down(hidden, gate=ffn_gate, residual=x)
        return x, new

    def rows(self, x: Float[Array, "b t *width"]) -> Float[Array, "b t d"] | Quantised:
        """Tokens as the linear layers take them."""
        x = x.reshape(*x.shape[:2], -1)
        return fused.quantise(x) if self.quantised else x
