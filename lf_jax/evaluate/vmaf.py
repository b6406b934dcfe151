"""VMAF through an ffmpeg that was built with libvmaf. It says how close a video is to another one, not how good it is."""

import functools
import json
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

from lf_jax.arrays import UInt8


@functools.cache
def find_ffmpeg() -> tuple[str | None, str]:
    """The ffmpeg on PATH, or that of the package imageio-ffmpeg, if it has libvmaf; and why there is none."""
    places = [shutil.which("ffmpeg")]
    try:
        import imageio_ffmpeg  # no dependency: taken where it is there

        places.append(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # the second where the package came without a binary
        pass
    found = [place for place in places if place is not None]
    for place in found:
        listed = subprocess.run([place, "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
        if " libvmaf " in listed.stdout:
            return place, ""
    if found:
        return None, f"{' and '.join(found)} were built without libvmaf"
    return None, "there is no ffmpeg on PATH and no package imageio-ffmpeg"


def vmaf(video: UInt8[np.ndarray, "f h w 3"], reference: UInt8[np.ndarray, "f h w 3"], fps: int, ffmpeg: str) -> np.ndarray:
    """VMAF of every frame, 0..100, by the model that libvmaf takes by default.

    Raises:
        ValueError: if ffmpeg fails, with its last words.
    """
    _, height, width, _ = video.shape
    source = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}", "-framerate", str(fps)]
    with tempfile.TemporaryDirectory() as folder:
        for name, frames in (("video", video), ("reference", reference)):
            pathlib.Path(folder, name).write_bytes(np.ascontiguousarray(frames).tobytes())
        graph = "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:log_path=log.json"
        command = [
            ffmpeg,
            "-hide_banner",
            *source,
            "-i",
            "video",
            *source,
            "-i",
            "reference",
            "-lavfi",
            graph,
            "-f",
            "null",
            "-",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log = pathlib.Path(folder, "log.json")
        if done.returncode or not log.exists():
            raise ValueError(f"VMAF failed: {done.stderr.strip().splitlines()[-1:]}")
        return np.array([frame["metrics"]["vmaf"] for frame in json.loads(log.read_text())["frames"]])
