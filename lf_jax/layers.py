"""Linear layers, norms and the timestep features that the models share.

Parameters live in the config's dtype. A layer computes in the dtype of its input and returns that dtype, so float32
input (the time embedding) stays float32 under bfloat16 parameters; statistics are always float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lf_jax.arrays import Array, Float
from pallas_kernels import fused
from pallas_kernels.linear import Quantised

xavier = jax.nn.initializers.xavier_uniform()


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """GELU in its tanh form, which Wan and UMT5 use."""
    return jax.nn.gelu(x, approximate=True)


def sinusoid(position: Float[Array, "*n"], features: int) -> Float[Array, "*n {features}"]:
    """Cosines, then sines, of `position * 10000 ** (-i / half)`; float32. `position` is a timestep in 0..1000."""
    half = features // 2
    rate = 10000.0 ** (-np.arange(half) / half)  # float64, rounded once: a timestep of 1000 magnifies its error
    angle = position.astype(jnp.float32)[..., None] * rate.astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel [in, out]."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, init: Callable = xavier, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n out"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, init: Callable = xavier, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = Linear(inputs, hidden, init=init, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, outputs, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*n d"], activation: Callable = gelu) -> Float[Array, "*n out"]:
        return self.down(activation(self.up(x)))


class RMSNorm(nnx.Module):
    """Root-mean-square norm along the last axis. Rounds to the dtype of `x` before the weight, as Wan and T5 do."""

    def __init__(self, features: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(square + self.eps)).astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias, in float32; returns the dtype of `x`."""

    def __init__(self, features: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "b t d"], quantise: bool = False) -> Float[Array, "b t d"] | Quantised:
        """`quantise`: the result as the input of a quantised linear layer."""
        return fused.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps, quantise=quantise)
