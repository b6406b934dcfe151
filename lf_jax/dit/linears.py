"""The linear layers of a block, in either form: what follows the product is part of the call.

full   in the model's dtype, trainable; kernel [in, out], of joined layers [part, out, in]
fp8    float8 weights and activations (`lf_jax.quant`)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import config, layers, quant
from lf_jax.arrays import Array, Float, Int
from lf_jax.layers import xavier
from pallas_kernels import linear as kernels


class Full(nnx.Module):
    """What both kinds of the first form share. `turned`: whether `matrix` is [out, in]."""

    turned: bool

    def matrix(self) -> tuple[Float[Array, "*l i o"], Float[Array, "*l out"]]:
        """Weights and bias as `pallas_kernels.linear.linear` takes them; of a stack of layers, with its leading axis."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        stack: tuple[Float[Array, "l i o"], Float[Array, "l out"]] | None = None,
        layer: Int[Array, ""] | None = None,
        activation: str | None = None,
        gate: Float[Array, "b f out"] | None = None,
        residual: Float[Array, "b t out"] | None = None,
    ) -> Float[Array, "b t out"]:
        """As `pallas_kernels.linear.linear`.

        Args:
            stack: the `matrix` of a stack in which this is the layer `layer`: a kernel reads it there.
        """
        w, bias = mine = self.matrix()
        more = {"turned": self.turned, "activation": activation, "gate": gate, "residual": residual}
        if stack is None:
            return kernels.linear(x, w, bias, **more)
        return kernels.linear(x, *stack, layer=layer, sliced=mine, **more)


class Linear(Full, layers.Linear):
    turned = False

    def matrix(self):
        return self.kernel[...], self.bias[...]


class Joined(Full):
    """Layers that read the same input, as one product: their outputs lie side by side."""

    turned = True

    def __init__(self, inputs: int, outputs: int, *, parts: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), parts)
        self.kernel = nnx.Param(jax.vmap(lambda key: xavier(key, (inputs, outputs), dtype).T)(keys))  # [part, out, in]
        self.bias = nnx.Param(jnp.zeros((parts, outputs), dtype))

    def matrix(self):
        kernel, bias = self.kernel[...], self.bias[...]
        stack = kernel.shape[:-3]
        return kernel.reshape(*stack, -1, kernel.shape[-1]), bias.reshape(*stack, -1)


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
