"""Video autoencoders: pixels [b, f, h, w, 3] in [-1, 1] to normalised latents [b, f, h, w, c] and back.

A video of 4n + 1 pixel frames is n + 1 latent frames, eight times smaller in rows and columns. Everything is causal in
time, so a video can be decoded as it is made: `decode_chunk` returns, beside its pixels, what the next chunk needs. All
functions are pure and can be jitted.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lf_jax import config
from lf_jax.arrays import Array, Float, Leaf
from lf_jax.vae.tiny import TinyVae
from lf_jax.vae.wan import WanVae

__all__ = ["PARTS", "TinyVae", "VaeState", "WanVae", "build", "decode", "decode_chunk", "encode", "encode_chunk"]

Vae = WanVae | TinyVae
PARTS = {  # autoencoders of Wan2.1's latents, by the names they go by: any transformer of these latents goes with each
    "wan": config.Vae(),
    "light": config.Vae(base=24),  # LightVAE
    "tiny": config.Vae(kind="tiny", temporal=(True, True, False)),  # TAEHV
}


@partial(jax.tree_util.register_dataclass, data_fields=["past"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class VaeState:
    """What a decoder or an encoder keeps between two chunks of a video."""

    past: Leaf  # nested tuples of [b, 1 or 2, h, w, c]: the last input frames of every layer that looks back


def build(part: config.Vae, *, rngs: nnx.Rngs) -> Vae:
    """The autoencoder that `part` describes, with random weights."""
    return {"wan": WanVae, "tiny": TinyVae}[part.kind](part, rngs=rngs)


def encode_chunk(
    vae: Vae, video: Float[Array, "b f p q 3"], state: VaeState | None = None
) -> tuple[Float[Array, "b g h w c"], VaeState]:
    """Encodes the next frames of a video; `state` is None before the first.

    Chunks have multiples of 4 frames. The first has one frame more with the Wan autoencoder, whose first latent frame
    stands for one pixel frame; the tiny one's stands for four.

    Raises:
        ValueError: the number of frames, rows, columns or channels does not fit.
    """
    _check_video(vae, video, vae.first_frames if state is None else 0)
    with jax.named_scope("encode"):
        latents, past = vae.encode_chunk(video, None if state is None else state.past)
    return latents, VaeState(past)


def decode_chunk(
    vae: Vae, latents: Float[Array, "b f h w c"], state: VaeState | None = None
) -> tuple[Float[Array, "b g p q 3"], VaeState]:
    """Decodes the next latent frames of a video, four pixel frames each; `state` is None before the first, which gives one.

    Decoding in chunks, of any sizes, gives the frames that decoding at once gives.

    Raises:
        ValueError: the number of frames or channels does not fit.
    """
    _check_latents(vae, latents)
    with jax.named_scope("decode"):
        video, past = vae.decode_chunk(latents, None if state is None else state.past)
    return video, VaeState(past)


def encode(vae: Vae, video: Float[Array, "b f p q 3"], step: int = 1) -> Float[Array, "b g h w c"]:
    """Encodes a whole video of 4n + 1 frames into n + 1 latent frames.

    The tiny autoencoder takes four frames for every latent frame, so it sees the last frame four times, as in its
    reference.

    Args:
        step: latent frames made at a time; memory grows with it.

    Raises:
        ValueError: the number of frames, rows, columns or channels does not fit.
    """
    _check_video(vae, video, 1)
    stride = vae.config.temporal_stride
    missing = (vae.first_frames - 1) % stride
    video = jnp.concatenate([video, *[video[:, -1:]] * missing], axis=1)
    first = vae.first_frames + (video.shape[1] - vae.first_frames) % (stride * step)
    return _stream(partial(encode_chunk, vae), video, first, stride * step)


def decode(vae: Vae, latents: Float[Array, "b f h w c"], step: int = 1) -> Float[Array, "b g p q 3"]:
    """Decodes the n + 1 latent frames of a whole video into 4n + 1 frames.

    Args:
        step: latent frames decoded at a time; memory grows with it.

    Raises:
        ValueError: the number of frames or channels does not fit.
    """
    _check_latents(vae, latents)
    return _stream(partial(decode_chunk, vae), latents, 1 + (latents.shape[1] - 1) % step, step)


def _stream(chunk: Callable, x: Float[Array, "b f h w c"], first: int, step: int) -> Float[Array, "b g p q d"]:
    """Applies `chunk` to the first `first` frames, then to `step` at a time, so that memory does not grow with the video."""
    start, state = chunk(x[:, :first], None)
    if first == x.shape[1]:
        return start
    rest = x[:, first:].reshape(x.shape[0], -1, step, *x.shape[2:])

    def body(state: VaeState, frames: Float[Array, "b s h w c"]) -> tuple[VaeState, Float[Array, "b t p q d"]]:
        return chunk(frames, state)[::-1]

    _, parts = jax.lax.scan(body, state, jnp.moveaxis(rest, 1, 0))
    parts = jnp.moveaxis(parts, 0, 1).reshape(x.shape[0], -1, *start.shape[2:])
    return jnp.concatenate([start, parts], axis=1)


def _check_video(vae: Vae, video: Array, first: int) -> None:
    stride, unit = vae.config.temporal_stride, vae.config.spatial_stride
    _, frames, height, width, _ = video.shape
    config.check(
        frames > 0 and frames % stride == first % stride,
        f"video has {frames} frames; expected {stride} n{f' + {first}' if first % stride else ''}",
    )
    config.check(height % unit == 0 and width % unit == 0, f"video is {height}x{width}; both must be multiples of {unit}")


def _check_latents(vae: Vae, latents: Array) -> None:
    config.check(latents.shape[1] > 0, f"latents {latents.shape} have no frames")
    config.check(
        latents.shape[-1] == vae.config.channels,
        f"latents have {latents.shape[-1]} channels; this autoencoder has {vae.config.channels}",
    )
