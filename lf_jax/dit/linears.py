"""The linear layers of a block, in either form: what follows the product is part of the call.

full   in the model's dtype, trainable; kernel [in, out], of joined layers [part, out, in]
fp8    float8 weights and activations (`lf_jax.quant`)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import config, layers, quant
from lf_jax.arrays import Array, Float
from lf_jax.layers import xavier

gelu = jax.checkpoint(layers.gelu)  # for the gradient keeps its input, instead of four steps of it as wide as that


class Linear(layers.Linear):
    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        activation: str | None = None,
        gate: Float[Array, "b f out"] | None = None,
        residual: Float[Array, "b t out"] | None = None,
    ) -> Float[Array, "b t out"]:
        """
        Args:
            activation: "gelu" or None.
            gate: of every frame, float32: what the output is multiplied with before it is added to `residual`.
        """
        y = super().__call__(x)
        y = y if activation is None else gelu(y)
        if residual is None:
            return y
        return residual + y if gate is None else gated_sum(residual, gate, y)


class Joined(nnx.Module):
    """Layers that read the same input, as one product: their outputs lie side by side."""

    def __init__(self, inputs: int, outputs: int, *, parts: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), parts)
        self.kernel = nnx.Param(jax.vmap(lambda key: xavier(key, (inputs, outputs), dtype).T)(keys))  # [part, out, in]
        self.bias = nnx.Param(jnp.zeros((parts, outputs), dtype))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t out"]:
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return x @ kernel.reshape(-1, kernel.shape[-1]).T + bias.reshape(-1)


class Mlp(nnx.Module):
    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.up = linear(model, model.dim, model.ffn_dim, onward=True, rngs=rngs)
        self.down = linear(model, model.ffn_dim, model.dim, rngs=rngs)


def linear(
    model: config.Model, inputs: int, outputs: int, *, parts: int | None = None, onward: bool = False, rngs: nnx.Rngs
) -> Linear | Joined | quant.Linear:
    """A linear layer in the form that `model.linears` names. `parts`, `onward`: as in `lf_jax.quant.Linear`."""
    dtype = config.dtype_of(model)
    if model.linears == "fp8":
        return quant.Linear(inputs, outputs, parts=parts, onward=onward, dtype=dtype, rngs=rngs)
    if parts is None:
        return Linear(inputs, outputs, dtype=dtype, rngs=rngs)
    return Joined(inputs, outputs, parts=parts, dtype=dtype, rngs=rngs)


@jax.checkpoint  # keeps y as it is, not in float32
def gated_sum(x: Float[Array, "b t d"], gate: Float[Array, "b f d"], y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """`x + gate * y` with the gate of the token's frame; float32 inside, rounded once."""
    gated = y.astype(jnp.float32).reshape(*gate.shape[:2], -1, y.shape[-1]) * gate[:, :, None]
    return (x + gated.reshape(x.shape)).astype(x.dtype)
