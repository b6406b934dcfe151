"""What is done with a video by another process, so that the one that makes videos goes on: judged, and written to files.

The evaluator is thousands of short calls of numpy, which threads would only take turns at. Nothing here may use a device:
every process would take its memory.
"""

import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from lf_jax.arrays import UInt8
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import Config
from lf_jax.evaluate.cases import Case, judge
from lf_jax.evaluate.statistics import nested
from lf_jax.evaluate.store import MP4, STRIP
from lf_jax.evaluate.vmaf import find_ffmpeg, vmaf
from lf_jax.inputs import video_chunks
from lf_jax.video import write_mp4

Notes = dict[str, dict[str, Any]]
COLUMNS, HEIGHT = 9, 112  # frames of a film strip, and pixels


def workers() -> ProcessPoolExecutor:
    """Processes for `record`, one a core, started as they are needed. They end with this one, however it does."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process would have its device's threads, dead
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(mp_context=context, initializer=_follow)


def record(
    video: UInt8[np.ndarray, "f h w 3"],
    case: Case,
    settings: Config,
    measures: Mapping[str, Mapping[str, np.ndarray]],
    files: Mapping[str, pathlib.Path],
    dense: UInt8[np.ndarray, "f h w 3"] | None,
) -> Notes:
    """Writes the files that are wanted of a video, and returns everything that is measured of it, as JSON can hold it.

    Args:
        measures: what is known already, in the same parts.
        files: STRIP, MP4 or both, and where they go.
        dense: the video to be like, where VMAF is wanted.

    Returns:
        `scores`, a number or None by name; `chunks`, a number a chunk; `seconds`, a number a second. Names that begin
        with "world." are of the evaluator of the procedural world, of prompts that are its captions.
    """
    if MP4 in files:
        write_mp4(files[MP4], video, settings.video.fps)
    if STRIP in files:
        write_strip(files[STRIP], video)
    scores, chunks, seconds = (dict(measures[part]) for part in ("scores", "chunks", "seconds"))
    if dense is not None:
        values = vmaf(video, dense, settings.video.fps, find_ffmpeg()[0])
        scores["vmaf"] = np.mean(values)
        chunks["vmaf"] = [np.mean(part) for part in np.split(values, np.cumsum(chunk_sizes(settings))[:-1])]
    if case.facts is not None:
        judged = judge(case.facts, video, settings)
        asked = judged.whole()
        known = [value for value in asked.values() if value is not None]
        scores |= {f"world.{name}": value for name, value in asked.items()} | {"world.mean": np.mean(known)}
        seconds |= {f"world.{name}": values for name, values in judged.seconds.items()}
    parts = {"scores": scores, "chunks": chunks, "seconds": seconds}
    return {name: {key: nested(value) for key, value in part.items()} for name, part in parts.items()}


def write_strip(path: pathlib.Path, video: UInt8[np.ndarray, "f h w 3"]) -> None:
    """Frames at equal distances, the first and the last among them, side by side; JPEG."""
    from PIL import Image  # of the extra `report`

    chosen = np.linspace(0, len(video) - 1, min(COLUMNS, len(video))).round().astype(int)
    strip = Image.fromarray(np.concatenate(list(video[chosen]), axis=1))
    scale = min(1, HEIGHT / strip.height)
    with replaced_file(path) as partial:
        strip.resize((round(strip.width * scale), round(strip.height * scale))).save(partial, "JPEG", quality=85)


def chunk_sizes(settings: Config) -> list[int]:
    """Pixel frames of every chunk."""
    stride = settings.vae.temporal_stride
    sizes = [frames * stride for frames in video_chunks(settings)]
    sizes[0] -= stride - 1  # the first latent frame is one of pixels
    return sizes


def _follow() -> None:
    """Of a worker: Ctrl-C is for the process that it works for, and it ends when that one is gone, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocessing.Process) -> None:
    parent.join()
    os._exit(1)
