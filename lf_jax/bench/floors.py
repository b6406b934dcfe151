"""What every stage cannot do without: FLOPs and bytes, from the config alone.

A product of matrices costs 2 m n k FLOPs, reads both operands and writes its result once. What lies between products
(activations, norms, residuals, modulation) can in principle be done on the way and costs nothing; norm + rope, which is a
stage of its own, reads and writes what it changes once and makes the means of blocks on the way, which are all that selection
reads.
"""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from lf_jax import config, sparsity
from lf_jax.chunk import branches, frame_shape
from lf_jax.config import Config
from lf_jax.inputs import video_chunks
from lf_jax.solvers import schedule
from lf_jax.tokens import Grid

POSITIONAL = ("full", "window", "random", "sta", "radial")  # policies that choose blocks without reading queries and keys
RGB = 3


Number = int | float


@dataclasses.dataclass(frozen=True)
class Work:
    linear: Number = 0  # FLOPs of products with weights, which may run in 8 bits
    other: Number = 0  # FLOPs of all other products
    bytes: Number = 0  # read from and written to the device's memory
    eight_bits: bool = False  # whether the linear part does run in 8 bits

    def __add__(self, more: "Work") -> "Work":
        eight_bits = self.eight_bits or more.eight_bits
        return Work(self.linear + more.linear, self.other + more.other, self.bytes + more.bytes, eight_bits)

    def __mul__(self, times: Number) -> "Work":
        return Work(times * self.linear, times * self.other, times * self.bytes, self.eight_bits)


def transformer(settings: Config) -> list[dict[str, Work]]:
    """The stages of `lf_jax.bench.stages` of every chunk of a video, all passes together, for one video."""
    grid, lengths, model = Grid.of(settings), video_chunks(settings), settings.model
    seen = [min(int(end), settings.cache.window or int(end)) for end in np.cumsum(lengths)]  # frames, the chunk's included
    if settings.sparsity.dense:
        kept = [frames * grid.frame_tokens for frames in seen]
    else:
        blocks = sparsity.chunk_budgets(lengths, 0, grid, settings.sparsity, settings.cache).blocks
        kept = [int(n) * grid.block_k * grid.frame_tokens / grid.padded_frame for n in blocks]
    cached = len(lengths) > 1 or settings.cache.window is not None
    passes = branches(settings) * (schedule(settings.rollout).steps + cached)
    width = config.dtype_of(model).itemsize
    found = []
    for frames, keys, visible in zip(lengths, kept, seen, strict=True):
        stages = {name: work * passes for name, work in _one_pass(settings, frames, keys, visible).items()}
        new = 2 * model.layers * frames * grid.padded_frame * model.dim * width  # keys and values: made once, cached once
        stages["copies"] = Work(bytes=2 * branches(settings) * new * cached)
        found.append(stages)
    return found


def _one_pass(settings: Config, frames: int, keys: Number, visible: int) -> dict[str, Work]:
    """A chunk of `frames` frames that attends to `keys` of the keys of `visible` frames."""
    grid, model, width = Grid.of(settings), settings.model, config.dtype_of(settings.model).itemsize
    t, d, layers = frames * grid.frame_tokens, model.dim, model.layers
    features = model.channels * model.patch[1] * model.patch[2]
    eight_bits = model.linears == "fp8"
    stream = t * d * width  # bytes of one array of the tokens

    def full(rows: int, inputs: int, outputs: int) -> Work:
        return Work(2 * rows * inputs * outputs, 0, (rows * (inputs + outputs) + inputs * outputs) * width)

    def linear(rows: int, inputs: int, outputs: int) -> Work:
        if not eight_bits:
            return full(rows, inputs, outputs)
        return Work(2 * rows * inputs * outputs, 0, (rows + outputs) * inputs + rows * outputs * width, True)

    def attention(read: Number) -> Work:
        return Work(0, 4 * t * read * d, 2 * stream + 2 * read * d * width)

    selects = not settings.sparsity.dense and settings.sparsity.policy not in POSITIONAL
    means = 4 * (grid.query_blocks(frames) + visible * grid.frame_blocks) * d  # float32, of queries and of keys
    time = full(frames, model.freq_dim, d) + full(frames, d, d) + full(frames, d, 6 * d)
    return {
        "embeddings": full(t, features, d) + time,
        "qkv": linear(t, d, 3 * d) * layers,
        "norm + rope": Work(bytes=4 * stream * layers),
        "selection": Work(bytes=means * layers * selects),
        "attention": attention(keys) * layers,
        "output": linear(t, d, d) * layers,
        "cross-attention": (linear(t, d, d) * 2 + attention(model.text_len)) * layers,
        "ffn": (linear(t, d, model.ffn_dim) + linear(t, model.ffn_dim, d)) * layers,
        "head": full(t, d, features),
    }


def decoder(settings: Config) -> list[Work]:
    """The autoencoder's decoder of every chunk of a video."""
    part, (rows, columns, _) = settings.vae, frame_shape(settings)
    width, count = jnp.dtype(part.dtype).itemsize, _wan if part.kind == "wan" else _tiny
    found = []
    for number, frames in enumerate(video_chunks(settings)):
        work = Work()
        for pixels, taps, inputs, outputs in count(part, frames, rows * columns, number == 0):
            weights = taps * inputs * outputs
            moved = (pixels * (inputs + outputs) + weights) * width
            work += Work(other=2 * pixels * weights, bytes=moved)
        if part.kind == "wan":  # one head among the pixels of a frame
            work += Work(other=4 * frames * (rows * columns) ** 2 * part.base * part.multipliers[-1])
        found.append(work)
    return found


Convolutions = Iterator[tuple[int, int, int, int]]  # pixels, taps, channels in and out


def _wan(part: config.Vae, frames: int, pixels: int, first: bool) -> Convolutions:
    """`lf_jax.vae.decoder`, in its order; the first frame of a video is not doubled in time."""
    widths = [part.base * m for m in reversed(part.multipliers)]
    inputs = widths[0]
    yield frames * pixels, 1, part.channels, part.channels
    yield frames * pixels, 27, part.channels, inputs
    yield from [(frames * pixels, 27, inputs, inputs)] * 4
    yield frames * pixels, 1, inputs, 3 * inputs
    yield frames * pixels, 1, inputs, inputs
    for width, time in zip(widths, [*reversed(part.temporal), None], strict=True):
        for before in [inputs] + [width] * part.res_blocks:
            yield frames * pixels, 27, before, width
            yield frames * pixels, 27, width, width
            if before != width:
                yield frames * pixels, 1, before, width
        if time:
            yield (frames - first) * pixels, 3, width, 2 * width
            frames = 2 * frames - first
        if time is not None:
            pixels *= 4
            yield frames * pixels, 9, width, width // 2
        inputs = width // 2
    yield frames * pixels, 27, widths[-1], RGB


def _tiny(part: config.Vae, frames: int, pixels: int, first: bool) -> Convolutions:
    """`lf_jax.vae.tiny`, in its order. It makes all frames of the first latent frame, too, and drops all but one."""
    yield frames * pixels, 9, part.channels, part.widths[0]
    for width, outputs, time in zip(part.widths, part.widths[1:], reversed(part.temporal), strict=False):
        yield from [(frames * pixels, 9, 2 * width, width), *[(frames * pixels, 9, width, width)] * 2] * 3
        yield frames * pixels, 1, width, (1 + time) * width
        frames, pixels = frames * (1 + time), pixels * 4
        yield frames * pixels, 9, width, outputs
    yield frames * pixels, 9, part.widths[-1], RGB


def text_encoder(part: config.Text) -> Work:
    """One prompt, padding included; of the table of embeddings only the rows of the prompt are read."""
    heads, width = part.heads * part.head_dim, config.dtype_of(part).itemsize
    weights = part.layers * (4 * part.dim * heads + 3 * part.dim * part.ffn_dim)
    return Work(other=2 * part.length * weights + 4 * part.layers * part.length**2 * heads, bytes=weights * width)


def pixel_bytes(settings: Config) -> list[int]:
    """uint8 pixels of every chunk."""
    stride, lengths = settings.vae.temporal_stride, video_chunks(settings)
    frames = [n * stride - (stride - 1) * (number == 0) for number, n in enumerate(lengths)]
    return [RGB * settings.video.height * settings.video.width * n for n in frames]
