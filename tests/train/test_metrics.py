"""The log of a run, and how it is interrupted."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from lf_jax.train.metrics import Metrics, interruptible


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_the_means_since_the_line_before(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    for step in range(1, 5):
        metrics.add({"critic/loss": jnp.float32(step)}, 8)
        if step % 2 == 0:
            metrics.add({"generator/loss": jnp.float32(10 * step)}, 8)
            assert metrics.write(step) == lines(tmp_path / "m.jsonl")[-1]  # flushed
    first, second = lines(tmp_path / "m.jsonl")
    assert (first["step"], first["critic/loss"], first["generator/loss"]) == (2, 1.5, 20.0)
    assert (second["step"], second["critic/loss"], second["generator/loss"]) == (4, 3.5, 40.0)
    assert second["time"] > 1.7e9 and second["seconds"] >= first["seconds"] and second["samples_per_second"] > 0


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


@pytest.mark.parametrize("stats, says", [(None, False), ({}, False), ({"bytes_in_use": 5, "peak_bytes_in_use": 7}, True)])
def test_the_peak_of_the_memory_where_the_device_knows_it(tmp_path, monkeypatch, stats, says):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    metrics.add({"loss": jnp.float32(1)}, 1)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(stats), Device({"peak_bytes_in_use": 9})])
    assert metrics.write(1).get("peak_bytes") == (7 if says else None)
    assert ("peak_bytes" in lines(tmp_path / "m.jsonl")[0]) == says


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"step": 2, "seconds": 50.0}\n{"step": 4, "seconds": 70.0}\n{"step": 6, "seconds": 90.0}\n{"step": 8, "sec'
    )
    metrics = Metrics(path, 4)
    assert [line["step"] for line in lines(path)] == [2, 4]
    metrics.add({"loss": jnp.float32(1)}, 1)
    assert 70 <= metrics.write(5)["seconds"] < 80


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", 0)
    metrics.add({"loss": jnp.float32(1), "grad_norm": jnp.float32("nan")}, 1)
    with pytest.raises(ValueError, match="training broke down by step 3: grad_norm=nan"):
        metrics.write(3)
    assert lines(tmp_path / "m.jsonl") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number):
    before, notes = signal.getsignal(number), []
    with interruptible(notes.append) as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted() and len(notes) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.pause()
    assert signal.getsignal(number) == before
