"""Linear layers in float8 (e4m3): one scale for every output channel of the weights and one for every token.

The numbers are those of LightX2V's files (tools/convert/quant/quant.py): scale = max|row| / 448. For inference only.
"""

from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax.arrays import Array, Float, Int
from lf_jax.layers import xavier
from pallas_kernels.linear import Quantised, linear, quantise_rows, reach

FORM = ("values", "scale", "reach")  # names of parameters


class Linear(nnx.Module):
    """`x @ w.T + bias` of quantised rows of activations; of one layer, or of a stack of them, which is read in place."""

    def __init__(
        self, inputs: int, outputs: int, *, parts: int | None = None, onward: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """
        Args:
            parts: number of layers that read the same input; their outputs lie side by side, `parts * outputs` in all.
            onward: whether the output goes, quantised, into another such layer.
            dtype: of the output, where that is not quantised.
        """
        self.dtype = jnp.dtype(dtype)
        keys = jax.random.split(rngs.params(), parts or 1)
        drawn = jax.vmap(lambda key: xavier(key, (inputs, outputs), dtype).T)(keys)
        rows = quantise_rows(drawn[0] if parts is None else drawn)
        self.values = nnx.Param(rows.values)  # [out, in] or [parts, out, in]
        self.scale = nnx.Param(rows.scale)  # [out] or [parts, out], float32
        self.bias = nnx.Param(jnp.zeros(rows.scale.shape, jnp.float32))  # as `scale`
        self.reach = nnx.Param(reach(rows, self.bias[...])) if onward else None  # [2] float32: bounds the output

    def __call__(
        self,
        x: Quantised,
        *,
        layer: Int[Array, ""] | None = None,
        activation: str | None = None,
        gate: Float[Array, "b f out"] | None = None,
        residual: Float[Array, "b t out"] | None = None,
    ) -> Float[Array, "b t out"] | Quantised:
        """As `pallas_kernels.linear.linear`.

        Args:
            layer: which one, where the parameters are those of a stack.
        """
        values, lead = self.values[...], () if layer is None else self.values.shape[:1]
        return linear(
            x,
            Quantised(values.reshape(*lead, -1, values.shape[-1]), self.scale[...].reshape(*lead, -1)),
            self.bias[...].reshape(*lead, -1),
            layer=layer,
            activation=activation,
            gate=gate,
            residual=residual,
            quantise=self.reach is not None,
            reach=None if self.reach is None else self.reach[...],
            dtype=self.dtype,
        )


def is_form(name: str, names: Container[str]) -> bool:
    """Whether a dotted name, of a module's `names`, is what a layer has here in place of its kernel."""
    of, _, leaf = name.rpartition(".")
    return leaf in FORM and f"{of}.{FORM[0]}" in names


def of_other_form(name: str, read: Callable[[str], Array]) -> Array:
    """A parameter of a transformer in one form of its linear layers, made of the other form's, for example of a checkpoint.

    Args:
        name: dotted, ends in "kernel" or a word of `FORM`; the arrays have a leading [layer] axis.
        read: gives the other form's parameters by dotted name.
    """
    of, _, leaf = name.rpartition(".")
    if leaf == "kernel":
        rows = read(f"{of}.values").astype(jnp.float32) * read(f"{of}.scale")[..., None]
        return _turned(rows)
    rows = quantise_rows(_turned(read(f"{of}.kernel")))
    return reach(rows, read(f"{of}.bias")) if leaf == "reach" else getattr(rows, leaf)


def _turned(kernel: Array) -> Array:
    """[layer, in, out] <-> [layer, out, in]; joined layers lie as [layer, part, out, in] in either form."""
    return kernel if kernel.ndim == 4 else kernel.swapaxes(1, 2)
