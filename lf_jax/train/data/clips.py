"""Clips of video files: what a file holds, found out cheaply, and its frames at another rate and size."""

import os
from fractions import Fraction

import av
import numpy as np

from lf_jax.arrays import UInt8
from lf_jax.config import check
from lf_jax.video import cover

JITTER = Fraction(1, 10)  # of a frame: some containers round times to milliseconds


def count(path: str | os.PathLike, fps: int) -> int:
    """How many frames a video file gives at `fps`. Reads its header and the packets after the last key frame.

    Raises:
        ValueError: the file cannot be opened, holds no video, or lacks its end.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(container.duration or 0)
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            check(bool(packets) and not any(packet.is_corrupt for packet in packets), "its end is missing")
            end = max(packet.pts + (packet.duration or 0) for packet in packets)
            return int((end - (stream.start_time or 0)) * stream.time_base * fps + JITTER)
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"not a video that can be decoded ({error})") from error


def read(
    path: str | os.PathLike, start: int, frames: int, fps: int, height: int, width: int
) -> UInt8[np.ndarray, "{frames} {height} {width} 3"]:
    """Frames `start` .. `start + frames - 1` of a video file at `fps`: those nearest in time, cut by `lf_jax.video.cover`.

    A file of a lower rate has frames repeated, one of a higher rate loses some: nothing is blended.

    Raises:
        ValueError: the file cannot be opened or decoded.
    """
    pixels: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            first = stream.start_time or 0
            times = [first + Fraction(start + n, fps) / stream.time_base for n in range(frames)]  # in the stream's unit
            container.seek(int(times[0]), stream=stream)
            before = None
            for frame in container.decode(stream):
                while before is not None and len(pixels) < frames and 2 * times[len(pixels)] <= before.pts + frame.pts:
                    pixels.append(cover(before, height, width))
                if len(pixels) == frames:
                    break
                before = frame
            check(before is not None, f"{path} holds no frames after frame {start}")
            while len(pixels) < frames:  # the last frame lasts until the end
                pixels.append(cover(before, height, width))
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a video that can be decoded ({error})") from error
    return np.stack(pixels)
