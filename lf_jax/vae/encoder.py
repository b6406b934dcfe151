"""Wan2.1's encoder: pixels to latents, from the finest level to the coarsest."""

import jax.numpy as jnp
from flax import nnx

from lf_jax import config
from lf_jax.arrays import Array, Float, Leaf
from lf_jax.vae.layers import CausalConv, Conv, Head, Middle, Residual, run, scaled_normal
from pallas_kernels.conv.xla import conv3d


class TimeHalf(nnx.Module):
    """One frame of every two, from those two and the one before; the first frame of a video stays as it is.

    Kernel [3, 1, 1, in, out].
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(scaled_normal(rngs.params(), (3, 1, 1, width, width), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g h w c"], Leaf]:
        """`past`: the last input frame, [b, 1, h, w, c]. An odd number of frames comes first, even numbers after it."""
        first = x[:, :1] if past is None else x[:, :0]
        seen = x if past is None else jnp.concatenate([past, x], axis=1)
        if seen.shape[1] > 1:
            frames = [seen[:, k : seen.shape[1] - 2 + k : 2] for k in range(2)] + [seen[:, 2::2]]
            halved = conv3d(frames, self.kernel[...]) + self.bias[...].astype(x.dtype)
            first = jnp.concatenate([first, halved], axis=1)
        return first, x[:, -1:]


class Down(nnx.Module):
    """Halves rows and columns, and then, with `time`, the number of frames."""

    def __init__(self, width: int, *, time: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = Conv(width, width, dtype=dtype, rngs=rngs)
        self.time = TimeHalf(width, dtype=dtype, rngs=rngs) if time else None

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q c"], Leaf]:
        x = self.conv(x, stride=2, padding=((0, 1), (0, 1)))
        return (x, None) if self.time is None else self.time(x, past)


class Level(nnx.Module):
    """Residual blocks of one width; every level but the coarsest ends in a `Down`."""

    def __init__(self, inputs: int, width: int, blocks: int, down: Down | None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths = [inputs] + [width] * blocks
        self.blocks = nnx.List(Residual(a, b, dtype=dtype, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False))
        self.down = down

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q d"], Leaf]:
        return run([*self.blocks] if self.down is None else [*self.blocks, self.down], x, past)


class Encoder(nnx.Module):
    def __init__(self, part: config.Vae, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(part)
        widths = [part.base * m for m in part.multipliers]
        self.conv = CausalConv(3, part.base, dtype=dtype, rngs=rngs)
        self.levels = nnx.List()
        inputs = part.base
        for width, time in zip(widths, [*part.temporal, None], strict=True):
            down = None if time is None else Down(width, time=time, dtype=dtype, rngs=rngs)
            self.levels.append(Level(inputs, width, part.res_blocks, down, dtype=dtype, rngs=rngs))
            inputs = width
        self.middle = Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.head = Head(widths[-1], 2 * part.channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w 3"], past: Leaf) -> tuple[Float[Array, "b g p q c"], Leaf]:
        return run([self.conv, *self.levels, self.middle, self.head], x, past)
