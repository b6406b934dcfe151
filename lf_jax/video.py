"""Pixels in and out: floats to uint8 on the device, mp4 files that are complete or absent, images and videos as input."""

import os
import pathlib
from fractions import Fraction

import av
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Float, UInt8


def to_uint8(video: Float[Array, "*b h w 3"]) -> UInt8[Array, "*b h w 3"]:
    """Pixels in [-1, 1] as the nearest of 0..255; what lies outside is clipped."""
    return jnp.round(jnp.clip(video.astype(jnp.float32) * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def from_uint8(video: UInt8[Array, "*b h w 3"] | UInt8[np.ndarray, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
    """The inverse of `to_uint8`, float32."""
    return jnp.asarray(video, jnp.float32) / 127.5 - 1


class Mp4Writer:
    """Writes frames to an mp4 file (H.264, yuv420p) chunk by chunk; a context manager.

    The frames go to `<name>.partial.mp4` beside the target. It takes the target's name when the block ends well, and is
    removed when the block ends by an exception, so a file under the target's name is always complete.

    Args:
        path: the target; an existing file is replaced only at the end.
        fps: frames a second.
        growing: write fragments that a player can show while the file still grows (`lf-jax stream`).
        crf: H.264's constant quality, 0 (lossless) .. 51.

    Raises:
        OSError: if the folder cannot be written to.
    """

    def __init__(self, path: str | os.PathLike, fps: int, *, growing: bool = False, crf: int = 18):
        self.path = pathlib.Path(path)
        self.partial = self.path.with_name(f"{self.path.stem}.partial.mp4")
        self.fps, self.growing, self.crf = fps, growing, crf
        self.frames = 0
        self._container = self._stream = None

    def __enter__(self) -> "Mp4Writer":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = {"movflags": "faststart"}
        if self.growing:
            options = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(str(self.partial), "w", format="mp4", options=options)
        return self

    def add(self, frames: UInt8[Array, "f h w 3"] | UInt8[np.ndarray, "f h w 3"]) -> None:
        """Appends `frames`; waits for them if they are still being computed.

        Raises:
            ValueError: if the size is odd, or not that of the frames before.
        """
        frames = np.asarray(frames)
        height, width = frames.shape[1:3]
        if self._stream is None:
            if height % 2 or width % 2:
                raise ValueError(f"frames of {height}x{width} cannot be written: yuv420p needs even sizes")
            self._stream = self._container.add_stream("libx264", rate=Fraction(self.fps))
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
            self._stream.options = {"crf": str(self.crf)}
            if self.growing:
                self._stream.options |= {"tune": "zerolatency"}  # no look-ahead: every frame is out at once
        if (height, width) != (self._stream.height, self._stream.width):
            raise ValueError(f"frames of {height}x{width} follow frames of {self._stream.height}x{self._stream.width}")
        for frame in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        self.frames += len(frames)

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                if self._stream is None:
                    raise ValueError(f"no frames for {self.path}")
                self._container.mux(self._stream.encode(None))
                self._container.close()
                os.replace(self.partial, self.path)
        finally:  # nothing is left to remove after the rename
            self._container.close()
            self.partial.unlink(missing_ok=True)


def write_mp4(
    path: str | os.PathLike, frames: UInt8[Array, "f h w 3"] | UInt8[np.ndarray, "f h w 3"], fps: int, crf: int = 18
) -> None:
    """Writes one video; errors and completeness as `Mp4Writer`."""
    with Mp4Writer(path, fps, crf=crf) as writer:
        writer.add(frames)


def read_video(
    path: str | os.PathLike, height: int, width: int, max_frames: int | None = None
) -> UInt8[np.ndarray, "f {height} {width} 3"]:
    """The frames of a video or image file, scaled to cover `height` x `width` and cropped around the centre.

    Raises:
        ValueError: if the file holds no picture that can be decoded.
        OSError: if it cannot be opened.
    """
    frames = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frames.append(cover(frame, height, width))
                if max_frames is not None and len(frames) == max_frames:
                    break
    except (av.error.InvalidDataError, IndexError) as error:
        raise ValueError(f"{path} is not an image or a video that can be decoded") from error
    if not frames:
        raise ValueError(f"{path} holds no frames")
    return np.stack(frames)


def cover(frame: av.VideoFrame, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """A decoded frame, turned as its file says (telephones film sideways), scaled to cover the size, cropped to its centre."""
    turns = round(frame.rotation / 90) % 4
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    size = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    pixels = frame.reformat(height=size[0], width=size[1], format="rgb24", interpolation="BICUBIC").to_ndarray()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return np.rot90(pixels[top : top + height, left : left + width], turns)
