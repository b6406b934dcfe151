"""Means of notes written by hand, and how the page prints them."""

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra [report] is not installed")

from lf_jax.evaluate.page import _interval
from lf_jax.evaluate.summary import summarise


def video(count, psnr=None, seconds=(1.0, 0.5)):
    scores = {"world.count": count} | ({} if psnr is None else {"psnr": psnr})
    return {"scores": scores, "chunks": {}, "seconds": {"world.count": list(seconds)}}


def passes(error):
    """Two chunks, two steps, three layers."""
    recall = np.full((2, 2, 3), 0.5)
    recall[1, :, 2] = 0.8
    return {
        "velocity": [[0.0, 0.0], [error, 3 * error]],
        "recall": recall.tolist(),
        "worst": (recall / 2).tolist(),
        "density": [1.0, 0.25],
        "reads": [],
    }


def test_means_differences_and_curves():
    videos = {
        "dense": [video(1.0), video(0.5), video(None)],
        "window": [video(0.5, 20.0), video(0.5, 30.0), video(1.0, 40.0, seconds=(None, 0.2))],
    }
    found = summarise(videos, {"window": [passes(0.1), passes(0.3)]}, "dense")
    dense, window = found["dense"], found["window"]
    assert dense["scores"]["world.count"]["mean"] == 0.75 and dense["scores"]["world.count"]["count"] == 2
    assert dense["differences"] == {} and "forced" not in dense and "psnr" not in dense["scores"]
    assert window["scores"]["psnr"]["mean"] == 30
    assert window["differences"].keys() == {"world.count"}  # dense has no distance from itself
    assert window["differences"]["world.count"]["mean"] == -0.25  # over the prompts that both were judged on
    assert window["seconds"]["world.count"]["mean"] == [1.0, 0.4]
    assert window["seconds"]["world.count"]["count"] == [2, 3]
    assert window["forced"]["velocity"]["mean"] == [0.0, 0.4]
    assert window["forced"]["recall"]["mean"] == [0.5, 0.6] and window["forced"]["worst"]["mean"] == [0.25, 0.3]
    assert window["forced"]["density"]["mean"] == [1.0, 0.25]
    assert window["layers"] == [[0.5, 0.5, 0.5], [0.5, 0.5, 0.8]]


def test_how_an_interval_is_printed():
    assert _interval({"mean": 0.12345, "low": 0.1, "high": 0.2, "count": 3}) == "0.123 [0.100, 0.200]"
    assert _interval({"mean": 31.256, "low": 30.0, "high": 32.0, "count": 3}) == "31.26 [30.00, 32.00]"
    assert _interval({"mean": -0.00001, "low": -0.02, "high": 0.01, "count": 3}, signed=True) == "+0.000 [-0.020, +0.010]"
    assert _interval({"mean": None, "low": None, "high": None, "count": 0}) == _interval(None) == "–"
