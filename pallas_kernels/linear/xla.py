"""The linear layer in plain XLA: runs on any backend, and is what the kernel is checked against."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear.types import FLOAT8, Quantised, row_scale


def linear(x, w, bias, layer, *, activation, gate, residual, reach, dtype):
    """See `api.linear`; every argument is required, `reach` is None where the output is not quantised."""
    if layer is not None:
        w, bias, reach = jax.tree.map(lambda stack: stack[layer], (w, bias, reach))
    # bfloat16 holds every float8 number, and float32 the products: what is rounded is their sum.
    x16, w16 = x.values.astype(jnp.bfloat16), w.values.astype(jnp.bfloat16)
    y = jnp.einsum("...i,oi->...o", x16, w16, preferred_element_type=jnp.float32)
    y = y * x.scale[..., None] * w.scale + bias.astype(jnp.float32)
    if activation == "gelu":
        y = jax.nn.gelu(y, approximate=True)
    if gate is not None:
        frames = y.reshape(*gate.shape[:2], -1, gate.shape[-1]) * gate.astype(jnp.float32)[:, :, None]
        y = frames.reshape(y.shape)
    if residual is not None:
        y = residual.astype(jnp.float32) + y
    if reach is None:
        return y.astype(dtype)
    scale = row_scale(reach[0] * x.scale + reach[1])
    return Quantised((y / scale[..., None]).astype(FLOAT8), scale)
