"""What can be said of a video without any network: how close it is to another one, and how steady it is in itself."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Float, UInt8
from lf_jax.config import check

SAME = 100.0  # dB that identical frames count as, in place of infinity
WINDOW, SPREAD = 11, 1.5  # pixels and standard deviation of SSIM's Gaussian window
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@jax.jit
def psnr(video: UInt8[Array, "f h w 3"], reference: UInt8[Array, "f h w 3"]) -> Float[Array, " f"]:
    """Peak signal-to-noise ratio of every frame in dB, over all pixels and channels of the frame."""
    difference = video.astype(jnp.float32) - reference.astype(jnp.float32)
    error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return jnp.minimum(10 * (2 * jnp.log10(255.0) - jnp.log10(error)), SAME)


@jax.jit
def ssim(video: UInt8[Array, "f h w 3"], reference: UInt8[Array, "f h w 3"]) -> Float[Array, " f"]:
    """Structural similarity of every frame (Wang, Bovik, Sheikh, Simoncelli, 2004), mean over colour channels.

    A Gaussian window of 11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03, population variances, and only the
    windows that lie within the frame: what scikit-image computes with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=-1, data_range=255`.

    Raises:
        ValueError: for frames smaller than the window.
    """
    check(min(video.shape[1:3]) >= WINDOW, f"frames of {video.shape[1:3]} pixels are smaller than SSIM's window of {WINDOW}")
    offsets = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-(offsets**2) / (2 * SPREAD**2))
    taps /= taps.sum()

    def blurred(image: Array) -> Array:
        for axis in (0, 1):
            size = image.shape[axis] - WINDOW + 1
            image = sum(float(tap) * jax.lax.slice_in_dim(image, i, i + size, axis=axis) for i, tap in enumerate(taps))
        return image

    def frame(pair: tuple[Array, Array]) -> Array:
        x, y = (image.astype(jnp.float32) / 255 for image in pair)
        mean_x, mean_y = blurred(x), blurred(y)
        variances = blurred(x * x + y * y) - mean_x**2 - mean_y**2
        covariance = blurred(x * y) - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        return jnp.mean(alike / ((mean_x**2 + mean_y**2 + c1) * (variances + c2)))

    return jax.lax.map(frame, (video, reference))


@jax.jit
def flicker(video: UInt8[Array, "f h w 3"]) -> Float[Array, ""]:
    """VBench's `temporal_flickering`: (255 - mean absolute difference of neighbouring frames) / 255; 1 is a still."""
    return (255 - jnp.mean(_changes(video))) / 255


@partial(jax.jit, static_argnames="fps")
def appearance(video: UInt8[Array, "f h w 3"], fps: int) -> dict[str, Float[Array, " seconds"]]:
    """How a video looks, second by second: a model that drifts or collapses shows here first. All in 0..1.

    Returns:
        `brightness` and `contrast`, mean and standard deviation of the luma; `saturation`, how far the channels of a
        pixel lie apart; `sharpness`, the mean step between neighbouring pixels; `motion`, that between neighbouring
        frames. Seconds are those of `seconds_of`.
    """
    frames = video.astype(jnp.float32) / 255
    luma = frames @ jnp.asarray(LUMA)
    down, across = (jnp.mean(jnp.abs(jnp.diff(luma, axis=axis)), axis=(1, 2)) for axis in (1, 2))
    moved = _changes(video) / 255
    looks = {
        "brightness": jnp.mean(luma, axis=(1, 2)),
        "contrast": jnp.std(luma, axis=(1, 2)),
        "saturation": jnp.mean(frames.max(-1) - frames.min(-1), axis=(1, 2)),
        "sharpness": (down + across) / 2,
        "motion": jnp.concatenate([moved[:1], moved]),  # the first frame has none before it
    }
    sizes = seconds_of(video.shape[0], fps)
    return {name: grouped(values, sizes) for name, values in looks.items()}


def grouped(values: Float[Array, " f"] | Float[np.ndarray, " f"], sizes: Sequence[int]) -> Float[Array, " groups"]:
    """The means of groups of `sizes` neighbouring values."""
    which = np.repeat(np.arange(len(sizes)), sizes)
    return jax.ops.segment_sum(jnp.asarray(values), which, len(sizes)) / np.asarray(sizes)


def seconds_of(frames: int, fps: int) -> list[int]:
    """Frames of every second of a video; what is left at the end belongs to the last."""
    whole = max(1, frames // fps)
    return [fps] * (whole - 1) + [frames - fps * (whole - 1)]


def _changes(video: Array) -> Array:
    """The mean absolute difference of every two neighbouring frames, in levels of 0..255."""
    return jnp.mean(jnp.abs(jnp.diff(video.astype(jnp.float32), axis=0)), axis=(1, 2, 3))
