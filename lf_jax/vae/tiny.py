"""The tiny autoencoder: TAEHV for Wan2.1, and LightTAE. Small 2-D convolutions; memory is the frame before, in every block.

Reference: `taehv.py` of madebyollin/taehv.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import config
from lf_jax.arrays import Array, Float, Leaf
from lf_jax.layers import Linear
from lf_jax.vae.layers import Conv, interleave, run
from lf_jax.vae.wan import statistics
from pallas_kernels.conv.xla import upsample

BLOCKS = 3  # memory blocks of a level


class Memory(nnx.Module):
    """Three convolutions over a frame and the one before it, beside a shortcut; before the first frame lies one of zeros."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv1 = Conv(2 * width, width, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(width, width, dtype=dtype, rngs=rngs)
        self.conv3 = Conv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b f h w c"], Leaf]:
        """`past`: the last input frame, [b, 1, h, w, c]."""
        if past is None:
            past = jnp.zeros_like(x[:, :1])
        before = jnp.concatenate([past, x[:, :-1]], axis=1)
        y = jax.nn.relu(self.conv1(jnp.concatenate([x, before], axis=-1)))
        y = self.conv3(jax.nn.relu(self.conv2(y)))
        return jax.nn.relu(y + x), x[:, -1:]


class Down(nnx.Module):
    """Merges every `times` frames, halves rows and columns, then the memory blocks."""

    def __init__(self, width: int, times: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.times = times
        self.pool = Linear(times * width, width, bias=False, dtype=dtype, rngs=rngs)
        self.conv = Conv(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(Memory(width, dtype=dtype, rngs=rngs) for _ in range(BLOCKS))

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q c"], Leaf]:
        merged = jnp.concatenate([x[:, i :: self.times] for i in range(self.times)], axis=-1)
        return run(self.blocks, self.conv(self.pool(merged), stride=2), past)


class Up(nnx.Module):
    """The memory blocks, then `times` frames of every one, twice the rows and columns, and the next width."""

    def __init__(self, width: int, outputs: int, times: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.times = times
        self.blocks = nnx.List(Memory(width, dtype=dtype, rngs=rngs) for _ in range(BLOCKS))
        self.grow = Linear(width, times * width, bias=False, dtype=dtype, rngs=rngs)
        self.conv = Conv(width, outputs, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q d"], Leaf]:
        x, past = run(self.blocks, x, past)
        # The reference enlarges first; a map of single pixels gives the same after it, for a quarter of the work.
        return self.conv(upsample(interleave(self.grow(x), self.times))), past


class Encoder(nnx.Module):
    def __init__(self, part: config.Vae, *, rngs: nnx.Rngs):
        dtype, width = config.dtype_of(part), part.widths[-1]
        self.conv = Conv(3, width, dtype=dtype, rngs=rngs)
        self.levels = nnx.List(Down(width, 1 + time, dtype=dtype, rngs=rngs) for time in part.temporal)
        self.out = Conv(width, part.channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w 3"], past: Leaf) -> tuple[Float[Array, "b g p q c"], Leaf]:
        x, past = run(self.levels, jax.nn.relu(self.conv(x)), past)
        return self.out(x), past


class Decoder(nnx.Module):
    def __init__(self, part: config.Vae, *, rngs: nnx.Rngs):
        dtype, widths = config.dtype_of(part), part.widths
        self.conv = Conv(part.channels, widths[0], dtype=dtype, rngs=rngs)
        levels = zip(widths, widths[1:], reversed(part.temporal), strict=False)
        self.levels = nnx.List(Up(a, b, 1 + time, dtype=dtype, rngs=rngs) for a, b, time in levels)
        self.out = Conv(widths[-1], 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q 3"], Leaf]:
        x = jnp.tanh(x / 3) * 3
        x, past = run(self.levels, jax.nn.relu(self.conv(x)), past)
        return self.out(jax.nn.relu(x)), past


class TinyVae(nnx.Module):
    """Inside, pixels are in [0, 1]. `config.scaled` is for networks trained on latents that are not normalised (LightTAE)."""

    def __init__(self, part: config.Vae, *, rngs: nnx.Rngs):
        self.config = part
        self.encoder = Encoder(part, rngs=rngs)
        self.decoder = Decoder(part, rngs=rngs)

    @property
    def first_frames(self) -> int:
        """Pixel frames that make the first latent frame."""
        return self.config.temporal_stride

    def encode_chunk(self, video: Float[Array, "b f p q 3"], past: Leaf) -> tuple[Float[Array, "b g h w c"], Leaf]:
        pixels = (video.astype(jnp.float32) + 1) / 2
        z, past = self.encoder(pixels.astype(config.dtype_of(self.config)), past)
        if self.config.scaled:
            mean, std = statistics(self.config)
            z = ((z.astype(jnp.float32) - mean) / std).astype(z.dtype)
        return z, past

    def decode_chunk(self, latents: Float[Array, "b f h w c"], past: Leaf) -> tuple[Float[Array, "b g p q 3"], Leaf]:
        """A video starts with one pixel frame: of the frames of the first latent frame only the last counts."""
        z = latents.astype(jnp.float32)
        if self.config.scaled:
            mean, std = statistics(self.config)
            z = z * std + mean
        pixels, seen = self.decoder(z.astype(config.dtype_of(self.config)), past)
        if past is None:
            pixels = pixels[:, self.config.temporal_stride - 1 :]
        return jnp.clip(pixels, 0, 1) * 2 - 1, seen
