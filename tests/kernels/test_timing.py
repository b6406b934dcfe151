"""Timing by turns, the commit of a figure, and the process that the work is done in."""

import os
import subprocess
import time

import pytest

from pallas_kernels import runs, timing, worker


def test_runs_are_timed_by_turns():
    order = []

    def sleeper(name, duration):
        def launch():
            order.append(name)
            time.sleep(duration)
            return ()

        return runs.Run(launch, lambda outputs: None, None, "calls")

    times = timing.by_turns({"slow": sleeper("slow", 0.02), "fast": sleeper("fast", 0.01)}, rounds=2)
    assert [len(figures) for figures in times.values()] == [2, 2]
    assert 20 <= min(times["slow"]) and 10 <= min(times["fast"]) < min(times["slow"])
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns == ["slow", "fast"] * 3  # one launch each to count launches, then the rounds
    assert order.count("slow") == 1 + 2 * 3


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
