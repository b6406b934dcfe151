"""The same in plain XLA: runs on any backend, defines the gradients, and is what the kernels are checked against."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fused.types import Layout
from pallas_kernels.linear.types import quantise_rows


def norm(x, shift, scale, unit, eps, quantised):
    """Layer norm times `unit + scale` plus `shift`, both [b or 1, f, d]: `api.norm_modulate` and `api.layer_norm`."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y.reshape(x.shape[0], shift.shape[1], -1, x.shape[2])
    factor, term = (unit + scale.astype(jnp.float32)), shift.astype(jnp.float32)
    y = (y * factor[:, :, None] + term[:, :, None]).reshape(x.shape)
    return quantise_rows(y) if quantised else y.astype(x.dtype)


def quantise(x):
    """See `api.quantise`."""
    return quantise_rows(x)


def norm_rope(x, weight, cos, sin, heads, eps, part, layout: Layout):
    """See `api.norm_rope`."""
    b, t, d = *x.shape[:2], weight.shape[0]
    y = x[..., part * d : (part + 1) * d].astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps) * weight.astype(jnp.float32)
    y = y.reshape(b, t, heads, -1)
    if cos is not None:
        cos, sin = cos[:, None], sin[:, None]
        even, odd = jnp.unstack(y.reshape(b, t, heads, -1, 2), axis=-1)
        y = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(y.shape)
    if layout.block is None:
        return y.astype(x.dtype), None
    tokens, block, blocks = layout.frame_tokens, layout.block, layout.blocks
    frames = y.reshape(b, layout.frames, tokens, *y.shape[2:])
    frames = jnp.pad(frames, ((0, 0), (0, 0), (0, blocks * block - tokens), (0, 0), (0, 0)))
    size = np.tile(np.minimum(tokens - np.arange(blocks) * block, block), layout.frames).astype(np.float32)
    means = jax.lax.stop_gradient(frames).reshape(b, -1, block, *y.shape[2:]).sum(2) / size[:, None, None]
    return (frames.reshape(b, -1, *y.shape[2:]) if layout.padded else y).astype(x.dtype), means
