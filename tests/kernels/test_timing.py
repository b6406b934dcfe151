"""Bursts and sustained load, the commit of a figure, and the process that the work is done in."""

import contextlib
import math
import os
import subprocess
import time

import numpy as np
import pytest
from jax.profiler import ProfileData

from pallas_kernels import runs, timing, trace, worker


@pytest.mark.parametrize("timed", [timing.bursts, timing.sustained])
def test_runs_are_timed_by_turns(timed):
    """By the wall clock: the profiler sees no GPU here, and would see no sleep."""
    order = []

    def sleeper(name, duration):
        def launch():
            order.append(name)
            time.sleep(duration)
            return ()

        return runs.Run(launch, lambda outputs: None, None, "calls")

    times = timed({"slow": sleeper("slow", 0.02), "fast": sleeper("fast", 0.01)}, rounds=2)
    assert [len(figures) for figures in times.values()] == [2, 2]
    assert 20 <= min(times["slow"]) and 10 <= min(times["fast"]) < min(times["slow"])
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns == ["slow", "fast"] * 3  # one launch each to count launches, then the rounds


class Device:
    """A GPU that works as long as it is told; the profiler sees it."""

    def __init__(self, monkeypatch):
        self.now, self.kernels = 0.0, []
        monkeypatch.setattr(timing.trace, "recorded", self.recorded)
        monkeypatch.setattr(timing.time, "sleep", self.work)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    @contextlib.contextmanager
    def recorded(self):
        self.kernels.clear()
        yield self.kernels

    def work(self, duration):
        self.now += duration

    def run(self, duration, gap, calls=1, hiccups=()):
        """Each call is a kernel; `hiccups`: launches that are late."""
        late = iter(hiccups)

        def launch():
            self.work(next(late, 0.0))
            for _ in range(calls):
                self.kernels.append((self.now, self.now + duration))
                self.work(duration + gap)
            return ()

        return runs.Run(launch, lambda outputs: self.work(0.002), None, "program", calls)


def test_a_burst_lasts_from_its_first_kernel_to_its_last(monkeypatch):
    device = Device(monkeypatch)
    pair = {"one": device.run(0.0005, 0.0001, calls=2), "other": device.run(0.001, 0)}
    times = timing.bursts(pair, rounds=3)
    assert times["other"] == pytest.approx([1.0] * 3)  # waiting for the end takes the host 2 ms, which do not count
    launches = 5 / (2 * (0.5 + 0.1) + 2)  # of 5 ms, by the wall
    calls = 2 * math.ceil(launches)
    assert times["one"] == pytest.approx([0.5 + 0.1 * (calls - 1) / calls] * 3)
    assert timing.bursts(pair, 2, trace.busy)["one"] == pytest.approx([0.5] * 2)  # without the gaps


def test_a_burst_with_a_pause_in_it_is_measured_again(monkeypatch):
    device = Device(monkeypatch)
    late = [0, 0, 0.02]  # counted once, then in the first burst
    assert timing.bursts({"one": device.run(0.001, 0, hiccups=late)}, rounds=2)["one"] == pytest.approx([1.0] * 2)
    with pytest.raises(RuntimeError, match=r"saw 4 bursts of work on the device, expected 2"):
        timing.bursts({"one": device.run(0.001, 0, hiccups=[0] + [0, 0.02] * 6)}, rounds=2)


def test_kernels_are_read_from_a_profile():
    """Of all streams of GPUs; not of the host, nor of the lines that summarise them."""

    def line(name, *events):
        spans = "".join(f"events {{ metadata_id: 1 offset_ps: {at} duration_ps: {long} }} " for at, long in events)
        return f'lines {{ name: "{name}" timestamp_ns: 1000 {spans} }} '

    kernel = 'event_metadata { key: 1 value { id: 1 name: "kernel" } }'
    gpu = line("Stream #1(Compute)", (5_000_000, 1_000_000)) + line("Stream #2", (0, 2_000_000)) + line("XLA Ops", (0, 9_000))
    host = line("Stream of a host", (0, 7_000_000))
    text = f'planes {{ name: "/device:GPU:0" {gpu}{kernel} }} planes {{ name: "/host:CPU" {host}{kernel} }}'
    data = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))
    assert np.array(trace.intervals(data)) == pytest.approx(np.array([(1e-6, 3e-6), (6e-6, 7e-6)]))


def test_work_is_grouped_by_pauses():
    assert trace.groups([], 1) == []
    assert trace.groups([(0, 4), (1, 2), (4.5, 5), (6, 7)], 1) == [[(0, 4), (4.5, 5)], [(6, 7)]]
    assert trace.span([(0, 4), (4.5, 5)]) == 5 and trace.busy([(0, 4), (4.5, 5)]) == 4.5


def test_a_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "figures.json"
    with pytest.raises(TypeError, match="not JSON serializable"):
        timing.write_json(file, {"device": object()})
    assert not file.exists()
    timing.write_json(file, {"device": "cpu"})
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_worker_is_one_process_until_it_dies():
    with worker.Worker() as process:
        first = process.ask(os.getpid)
        assert first == process.ask(os.getpid) != os.getpid()
        with pytest.raises(worker.Died, match=r"exit code 3") as died:
            process.ask(os._exit, 3)
        assert died.value.step is None
        with pytest.raises(worker.Died, match="TypeError: .*getpid.* takes no arguments"):
            process.ask(os.getpid, 1)
        assert process.ask(os.getpid) not in (first, os.getpid())


def test_a_worker_that_hangs_is_ended():
    with worker.Worker(stuck=5) as process:
        process.ask(os.getpid)
        process.stuck = 0.1
        with pytest.raises(worker.Died, match="no sign of life for 0.1 s"):
            process.ask(time.sleep, 60)


def test_outside_a_worker_there_is_nobody_to_tell():
    worker.begin("anything")


def test_the_commit_is_of_this_project_or_none(tmp_path, monkeypatch):
    """An installed package may lie inside the checkout of another project."""
    file = tmp_path / "bench.py"
    file.touch()
    monkeypatch.setattr(timing, "__file__", str(file))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert timing.commit() == "installed"
    subprocess.run([*git, "add", "bench.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert len(timing.commit()) >= 7 and head.startswith(timing.commit())
    monkeypatch.setenv("PATH", "")
    assert timing.commit() == "installed"
