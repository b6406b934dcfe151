"""The linear layer in plain XLA: runs on any backend, and is what the kernel is checked against."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear.types import FLOAT8, Quantised, row_scale


def linear(x, w, bias, layer, *, activation, gate, residual, reach, dtype):
    """See `api.linear`, of float8; every argument is required, `reach` is None where the output is not quantised."""
    if layer is not None:
        w, bias, reach = jax.tree.map(lambda stack: stack[layer], (w, bias, reach))
    # bfloat16 holds every float8 number, and float32 the products: what is rounded is their sum.
    x16, w16 = x.values.astype(jnp.bfloat16), w.values.astype(jnp.bfloat16)
    y = jnp.einsum("...i,oi->...o", x16, w16, preferred_element_type=jnp.float32)
    y = y * x.scale[..., None] * w.scale + bias.astype(jnp.float32)
    if activation == "gelu":
        y = gelu(y)
    if gate is not None:
        y = gated(y, gate)
    if residual is not None:
        y = residual.astype(jnp.float32) + y
    if reach is None:
        return y.astype(dtype)
    scale = row_scale(reach[0] * x.scale + reach[1])
    return Quantised((y / scale[..., None]).astype(FLOAT8), scale)


def plain(x, w, bias, layer, sliced, *, activation, gate, residual, turned):
    """See `api.linear`, of plain arrays: computed and rounded in the dtype of x, as one writes it; the gated sum in float32."""
    if layer is not None:
        w, bias = (w[layer], bias[layer]) if sliced is None else sliced
    w = w.astype(x.dtype)
    y = x @ (w.T if turned else w) + bias.astype(x.dtype)
    if activation == "gelu":
        y = gelu(y)
    if residual is None:
        return y
    return residual + y if gate is None else gated_sum(residual, gate, y)


@jax.checkpoint  # for the gradient keeps its input, instead of four steps of it as wide as that
def gelu(y: jax.Array) -> jax.Array:
    return jax.nn.gelu(y, approximate=True)


@jax.checkpoint  # keeps y as it is, not in float32
def gated_sum(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """`x + gate * y`; float32 inside, rounded once."""
    return (x + gated(y.astype(jnp.float32), gate)).astype(x.dtype)


def gated(y: jax.Array, gate: jax.Array) -> jax.Array:
    """Every frame's tokens times its gate, in float32."""
    return (y.reshape(*gate.shape[:2], -1, gate.shape[-1]) * gate.astype(jnp.float32)[:, :, None]).reshape(y.shape)
