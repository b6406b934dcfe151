"""From the notes of single videos to means over prompts, with confidence intervals and paired differences to dense."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lf_jax.evaluate.statistics import Interval, difference, interval, nested

Notes = Mapping[str, Any]


def summarise(videos: Mapping[str, Sequence[Notes]], forced: Mapping[str, Sequence[Notes]], reference: str) -> dict[str, dict]:
    """What the page shows of every policy, as JSON can hold it.

    Args:
        videos: of every policy the notes of `study.score`, prompt by prompt.
        forced: of every policy but `reference` those of `forcing.measure`; empty where nothing was teacher-forced.
        reference: the policy that differences are taken from.

    Returns:
        A policy: `scores`, an `Interval` by name; `differences`, those of the paired differences to `reference`;
        `chunks` and `seconds`, curves by name; `forced`, curves over chunks by name, and `layers`, the mean recall
        [chunk, layer].
    """
    return {
        policy: {
            "scores": {name: interval(values).as_json() for name, values in _columns(notes, "scores").items()},
            "differences": _differences(notes, videos[reference]) if policy != reference else {},
            "chunks": {name: interval(values).as_json() for name, values in _columns(notes, "chunks").items()},
            "seconds": {name: interval(values).as_json() for name, values in _columns(notes, "seconds").items()},
            **_forced(forced.get(policy, ())),
        }
        for policy, notes in videos.items()
    }


def _columns(notes: Sequence[Notes], part: str) -> dict[str, np.ndarray]:
    """The values [prompt, ...] of every name that any video has; NaN where a video has none."""
    names = dict.fromkeys(name for note in notes for name in note[part])
    columns = {}
    for name in names:
        known = next(note[part][name] for note in notes if name in note[part])
        absent = np.full(np.shape(known), np.nan)
        columns[name] = np.stack([np.asarray(note[part].get(name, absent), np.float64) for note in notes])
    return columns


def _differences(notes: Sequence[Notes], reference: Sequence[Notes]) -> dict[str, dict]:
    ours, theirs = _columns(notes, "scores"), _columns(reference, "scores")
    return {name: difference(ours[name], theirs[name]).as_json() for name in ours if name in theirs}


def _forced(notes: Sequence[Notes]) -> dict[str, dict]:
    if not notes:
        return {}
    columns = {
        name: np.asarray([note[name] for note in notes], np.float64) for name in ("velocity", "recall", "worst", "density")
    }
    curves: dict[str, Interval] = {
        "velocity": interval(columns["velocity"].mean(2)),  # over denoising steps
        "recall": interval(columns["recall"].mean((2, 3))),  # over steps and layers
        "worst": interval(columns["worst"].mean((2, 3))),
        "density": interval(columns["density"]),
    }
    return {
        "forced": {name: curve.as_json() for name, curve in curves.items()},
        "layers": nested(columns["recall"].mean((0, 2))),
    }
