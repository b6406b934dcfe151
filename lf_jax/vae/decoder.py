"""Wan2.1's decoder: latents to pixels, from the coarsest level to the finest."""

import jax.numpy as jnp
from flax import nnx

from lf_jax import config
from lf_jax.arrays import Array, Float, Leaf
from lf_jax.vae.layers import CausalConv, Conv, Head, Middle, Residual, interleave, run
from pallas_kernels.conv import convolve


class Up(nnx.Module):
    """Doubles rows and columns and halves the channels; with `time`, first makes two frames of every one.

    The first frame of a video stays one, and the convolution over time never sees it: to that convolution the video
    begins, after two frames of zeros, with the second frame. (The reference marks the first frame 'Rep'.)
    """

    def __init__(self, width: int, *, time: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.time = CausalConv(width, 2 * width, space=1, dtype=dtype, rngs=rngs) if time else None
        self.conv = Conv(width, width // 2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q d"], Leaf]:
        if self.time is not None:
            alone = 1 if past is None else 0
            doubled, past = self.time(x[:, alone:], past)
            x = jnp.concatenate([x[:, :alone], interleave(doubled, 2)], axis=1)
        return convolve(x, self.conv.kernel[...][None], self.conv.bias[...], upsample=True), past


class Level(nnx.Module):
    """Residual blocks of one width; every level but the finest ends in an `Up`."""

    def __init__(self, inputs: int, width: int, blocks: int, up: Up | None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths = [inputs] + [width] * blocks
        self.blocks = nnx.List(Residual(a, b, dtype=dtype, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False))
        self.up = up

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q d"], Leaf]:
        return run([*self.blocks] if self.up is None else [*self.blocks, self.up], x, past)


class Decoder(nnx.Module):
    def __init__(self, part: config.Vae, *, rngs: nnx.Rngs):
        dtype = config.dtype_of(part)
        widths = [part.base * m for m in reversed(part.multipliers)]
        self.conv = CausalConv(part.channels, widths[0], dtype=dtype, rngs=rngs)
        self.middle = Middle(widths[0], dtype=dtype, rngs=rngs)
        self.levels = nnx.List()
        inputs = widths[0]
        for width, time in zip(widths, [*reversed(part.temporal), None], strict=True):
            up = None if time is None else Up(width, time=time, dtype=dtype, rngs=rngs)
            self.levels.append(Level(inputs, width, part.res_blocks + 1, up, dtype=dtype, rngs=rngs))
            inputs = width // 2
        self.head = Head(widths[-1], 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q 3"], Leaf]:
        return run([self.conv, self.middle, *self.levels, self.head], x, past)
