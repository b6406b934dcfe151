"""What a call is given: a number of frames that must fit, and images, videos or latents to begin with."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import attention, tokens, vae
from lf_jax.arrays import Array, Float
from lf_jax.config import Config, check
from lf_jax.video import from_uint8, read_video

Pixels = np.ndarray | Array | str | os.PathLike


def video_chunks(config: Config) -> tuple[int, ...]:
    """Latent frames of every chunk of a video of `config.video.num_frames` pixel frames.

    Raises:
        ValueError: if they do not fit, with the nearest numbers of frames that do.
    """
    wanted, stride, settings = config.video.num_frames, config.vae.temporal_stride, config.rollout
    first = 1 if settings.independent_first_frame else settings.chunk_frames
    shortest, chunk = 1 + stride * (first - 1), stride * settings.chunk_frames
    more, over = divmod(wanted - shortest, chunk)
    below = shortest + max(more, 0) * chunk
    near = f"{below}" if more < 0 else f"{below} or {below + chunk}"
    check(
        over == 0 and more >= 0,
        f"num_frames={wanted} does not fit: with chunks of {settings.chunk_frames} latent frames, {stride} pixel frames each, "
        f"the nearest that do are {near}",
    )
    return tokens.chunk_lengths(tokens.latent_frames(wanted, stride), settings.chunk_frames, settings.independent_first_frame)


def check_runs(config: Config) -> None:
    """What can be known before anything is loaded: whether videos of `config` can be made on this machine.

    Raises:
        ValueError: if the frames do not fit, or the selector or the attention's implementation is unknown.
        NotImplementedError: if the implementation that `config` names cannot run here.
    """
    video_chunks(config)
    attention.implementations(config)


def first_frames(
    autoencoder: vae.Vae,
    config: Config,
    batch: int,
    image: Pixels | None = None,
    video: Pixels | None = None,
    latents: Float[Array, "b f h w c"] | None = None,
) -> Float[Array, "b f h w c"] | None:
    """The first frames of all videos as normalised latents, or None where nothing is given.

    Args:
        image: uint8 [*b, h, w, 3], or a file, which is scaled and cropped to the config's size.
        video: uint8 [*b, f, h, w, 3], or a file.

    Raises:
        ValueError: more than one of them, another size or dtype, or frames that are not whole chunks.
        OSError: a file that cannot be opened.
    """
    given = {name: value for name, value in (("image", image), ("video", video), ("latents", latents)) if value is not None}
    if not given:
        return None
    check(len(given) == 1, f"initial {' and '.join(given)} exclude each other")
    ends = [int(end) for end in np.cumsum(video_chunks(config))]
    if latents is None:
        pixels = _pixels(config, batch, 1 if video is None else None, *given.values())
        _check_whole_chunks("frames", pixels.shape[1], [1 + (end - 1) * config.vae.temporal_stride for end in ends])
        return _encode(autoencoder, from_uint8(pixels))
    size = tuple(n // config.vae.spatial_stride for n in (config.video.height, config.video.width))
    expected = (batch, *size, config.vae.channels)
    received = (*latents.shape[:1], *latents.shape[2:])
    check(received == expected, f"initial_latents has [b, h, w, c] = {received}, expected {expected}")
    _check_whole_chunks("latent frames", latents.shape[1], ends)
    return jnp.asarray(latents, jnp.float32)


def _pixels(config: Config, batch: int, frames: int | None, source: Pixels) -> np.ndarray:
    """uint8 [b, f, h, w, 3] of a file or an array; `frames` 1 where the array lacks that axis."""
    height, width = config.video.height, config.video.width
    if isinstance(source, str | os.PathLike):
        source = read_video(source, height, width, frames)
    elif frames == 1:
        source = np.asarray(source)[..., None, :, :, :]
    pixels = np.asarray(source)
    check(pixels.dtype == np.uint8, f"initial frames have dtype {pixels.dtype}, expected uint8")
    pixels = pixels if pixels.ndim == 5 else pixels[None]
    expected = f"[{batch} or nothing, f, {height}, {width}, 3]"
    fits = pixels.ndim == 5 and pixels.shape[0] in (1, batch) and pixels.shape[2:] == (height, width, 3)
    check(fits, f"initial frames have shape {pixels.shape}, expected {expected}")
    return np.broadcast_to(pixels, (batch, *pixels.shape[1:]))


def _check_whole_chunks(unit: str, given: int, ends: Sequence[int]) -> None:
    """`ends`: frames of the video after each of its chunks."""
    advice = "; a single image needs a model with rollout.independent_first_frame" if given == 1 and ends[0] > 1 else ""
    check(len(ends) > 1, f"{given} initial {unit} leave nothing to generate: the whole video is one chunk of {ends[0]}")
    check(
        given in ends[:-1],
        f"{given} initial {unit} must be whole chunks of a longer video, expected one of {list(ends[:-1])}{advice}",
    )


_encode = jax.jit(vae.encode)
