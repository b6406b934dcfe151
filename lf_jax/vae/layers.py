"""What the autoencoders are made of: convolutions over space and causal ones over time, residual and attention blocks.

A module that looks back takes what it saw last beside its input and returns what the next call must be given. That
`past` is None before the first frame of a video; nested tuples of arrays in every later call.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax.arrays import Array, Float, Leaf
from lf_jax.attention import dense_attention
from lf_jax.layers import Linear, RMSNorm
from pallas_kernels.conv import convolve
from pallas_kernels.conv.xla import conv2d

scaled_normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
NORM_EPS = 1e-24  # Wan divides by max(length of the vector, 1e-12)


def interleave(x: Float[Array, "b f h w c"], times: int) -> Float[Array, "b g h w d"]:
    """Unfolds channels into time: one frame of `times * d` channels becomes `times` frames, the first `d` channels first."""
    b, f, h, w, c = x.shape
    return jnp.moveaxis(x.reshape(b, f, h, w, times, c // times), 4, 2).reshape(b, f * times, h, w, c // times)


def run(layers: Sequence[Callable], x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q d"], Leaf]:
    """Applies `layers` in order, each with its own part of `past`."""
    seen = []
    for layer, its_past in zip(layers, past or (None,) * len(layers), strict=True):
        x, new = layer(x, its_past)
        seen.append(new)
    return x, tuple(seen)


class Conv(nnx.Module):
    """A convolution over rows and columns, kernel [kh, kw, in, out]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(scaled_normal(rngs.params(), (3, 3, inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*n h w c"], stride: int = 1, padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    ) -> Float[Array, "*n p q out"]:
        y = conv2d(x, self.kernel[...], stride, padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class CausalConv(nnx.Module):
    """A convolution that sees every frame and the two before it, kernel [3, kh, kw, in, out].

    Before the first frame of a video lie two frames of zeros.
    """

    def __init__(self, inputs: int, outputs: int, *, space: int = 3, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(scaled_normal(rngs.params(), (3, space, space, inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype))

    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        past: Leaf,
        *,
        residual: Float[Array, "b f h w out"] | None = None,
        norm: RMSNorm | None = None,
    ) -> tuple[Float[Array, "b f h w out"], Leaf]:
        """`past`: the last two input frames, [b, 2, h, w, c]. What is given of `residual`, `norm` and SiLU comes after."""
        if past is None:
            past = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        more = {} if norm is None else {"scale": norm.scale[...], "eps": norm.eps}
        y = convolve(x, self.kernel[...], self.bias[...], past=past, residual=residual, **more)
        return y, jnp.concatenate([past[:, x.shape[1] :], x[:, -2:]], axis=1)


class Residual(nnx.Module):
    """Norm, SiLU, causal convolution, twice, beside a shortcut that is a linear map where the widths differ."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(inputs, eps=NORM_EPS, dtype=dtype)
        self.conv1 = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(outputs, eps=NORM_EPS, dtype=dtype)
        self.conv2 = CausalConv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.shortcut = Linear(inputs, outputs, dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b f h w out"], Leaf]:
        past1, past2 = past or (None, None)
        y, past1 = self.conv1(jax.nn.silu(self.norm1(x)), past1, norm=self.norm2)
        y, past2 = self.conv2(y, past2, residual=x if self.shortcut is None else self.shortcut(x))
        return y, (past1, past2)


class Attention(nnx.Module):
    """Self-attention of one head among the pixels of a frame."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = RMSNorm(width, eps=NORM_EPS, dtype=dtype)
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b f h w c"], Leaf]:
        b, f, h, w, c = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(b * f, h * w, 1, 3 * c), 3, axis=-1)
        return x + self.out(dense_attention(q, k, v).reshape(x.shape)), None


class Middle(nnx.Module):
    """The coarsest level: attention between two residual blocks."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.first = Residual(width, width, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, dtype=dtype, rngs=rngs)
        self.last = Residual(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b f h w c"], Leaf]:
        return run((self.first, self.attention, self.last), x, past)


class Head(nnx.Module):
    """Norm, SiLU and the last convolution."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = RMSNorm(inputs, eps=NORM_EPS, dtype=dtype)
        self.conv = CausalConv(inputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b f h w out"], Leaf]:
        return self.conv(jax.nn.silu(self.norm(x)), past)
