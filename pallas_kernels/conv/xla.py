"""Convolutions in plain XLA: run on any backend, have gradients, and are what the kernel is checked against."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.conv.types import Form


def conv(x, kernel, bias, past, residual, scale, form: Form, eps: float):
    """See `api.convolve`; every argument is required. Every result of a layer is rounded to the dtype of `x`."""
    if form.upsample:
        y = conv2d(upsample(x), kernel[0])
    elif past is None:
        y = conv2d(x, kernel[0])
    else:
        f = x.shape[1]
        # Straight from `past` and `x`: putting those in a row first would be one more copy of `x`.
        frames = [jnp.concatenate([past[:, k : k + f], x[:, : max(f + k - 2, 0)]], axis=1) for k in range(2)] + [x]
        y = conv3d(frames, kernel)
    y = y + bias.astype(x.dtype)
    y = y if residual is None else y + residual
    return y if scale is None else normed(y, scale, eps)


def normed(y: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Channels over their root mean square, scaled, through SiLU. Rounds before the scale, as Wan does."""
    square = jnp.mean(jnp.square(y.astype(jnp.float32)), axis=-1, keepdims=True)
    return jax.nn.silu((y * jax.lax.rsqrt(square + eps)).astype(y.dtype) * scale.astype(y.dtype))


def conv2d(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding: tuple[tuple[int, int], tuple[int, int]] | None = None
) -> jax.Array:
    """Every frame on its own: [*n, h, w, c] with a kernel [kh, kw, c, out].

    Args:
        padding: rows, columns; before, after. None makes the output as large as the input.
    """
    if padding is None:
        padding = tuple((size // 2, size // 2) for size in kernel.shape[:2])
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[-3:]),
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def conv3d(frames: Sequence[jax.Array], kernel: jax.Array) -> jax.Array:
    """A convolution over time too: tap `k` of the kernel [kt, kh, kw, c, out] sees `frames[k]`, [b, f, h, w, c].

    It is one 2-D convolution over the taps side by side as channels, so all are summed in float32 inside it. XLA's 3-D
    convolution would move channels to the front and back; a 2-D one per tap writes three results instead of one, and
    with float32 results it runs in float32.
    """
    taps, *space, inputs, outputs = kernel.shape
    x = jnp.concatenate(frames, axis=-1)
    if space == [1, 1]:
        return x @ kernel.reshape(taps * inputs, outputs).astype(x.dtype)
    return conv2d(x, jnp.moveaxis(kernel, 0, 2).reshape(*space, taps * inputs, outputs))


def upsample(x: jax.Array) -> jax.Array:
    """Doubles rows and columns of [*n, h, w, c] by repeating them."""
    *n, h, w, c = x.shape
    return jnp.broadcast_to(x[..., :, None, :, None, :], (*n, h, 2, w, 2, c)).reshape(*n, 2 * h, 2 * w, c)
