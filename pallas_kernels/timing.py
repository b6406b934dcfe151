"""How kernels are timed, and what a figure must name to mean anything."""

import json
import math
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import trace, worker
from pallas_kernels.runs import Run

BURST = 0.005  # seconds of one run in one round, and of the pause before it
PAUSE = 0.03
ROUND = 0.05  # the same under sustained load
ATTEMPTS = 3  # at a record in which every burst is seen
Burst = Sequence[trace.Interval]  # the kernels of one
VERSIONS = ("jax", "jaxlib", "nvidia-cudnn-cu13", "torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl")


def bursts(runs: Mapping[str, Run], rounds: int, duration: Callable[[Burst], float] = trace.span) -> dict[str, list[float]]:
    """Milliseconds of one call of each run, one figure a round: what the device takes at its full clocks.

    In a round every run in turn is launched back to back for about `BURST`, after a pause. So short, and so far apart, no
    run is slowed by the heat of another or its own. A figure is the time on the device from the beginning of a burst's first
    kernel to the end of its last, gaps included, by the profiler (CUPTI); where it sees no device, the wall time.

    Args:
        duration: of a burst's kernels, in seconds. `trace.busy` leaves the gaps out: of kernels so short that the host cannot
            launch them as fast as they run, it is the time that they take where the host has run ahead.

    Raises:
        RuntimeError: if the profiler does not see every burst as one.
    """
    launches = _launches(runs, BURST)
    for _ in range(ATTEMPTS):
        walls: list[float] = []
        with trace.recorded() as kernels:
            for _ in range(rounds):
                for name, run in runs.items():
                    worker.begin(name)
                    time.sleep(PAUSE)
                    walls.append(seconds(run, launches[name]))
        order = list(runs) * rounds
        seen = trace.groups(kernels, PAUSE / 2)
        if not seen:
            durations = walls
        elif len(seen) == len(order):
            calls = (launches[name] * runs[name].calls for name in order)
            durations = [duration(burst) / n for burst, n in zip(seen, calls, strict=True)]
        else:  # the host was held up amid a burst
            continue
        return {name: [1000 * durations[i] for i in range(at, len(order), len(runs))] for at, name in enumerate(runs)}
    raise RuntimeError(f"the profiler saw {len(seen)} bursts of work on the device, expected {len(order)}")


def sustained(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call of each run, one figure a round: wall time under load without end.

    As `bursts`, but for about `ROUND` and without pauses: the device may lower its clocks to keep to its power. The runs
    share what they heat up, by turns.
    """
    launches = _launches(runs, ROUND)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            worker.begin(name)
            times[name].append(1000 * seconds(run, launches[name]))
    return times


def _launches(runs: Mapping[str, Run], duration: float) -> dict[str, int]:
    """How many launches of each take about so many seconds."""
    found = {}
    for name, run in runs.items():
        worker.begin(name)
        found[name] = math.ceil(duration / (run.calls * seconds(run, 1)))
    return found


def seconds(run: Run, launches: int) -> float:
    """Wall time of one call in `launches` launches."""
    start = time.perf_counter()
    for _ in range(launches):
        outputs = run.launch()
    run.wait(outputs)
    return (time.perf_counter() - start) / (launches * run.calls)


def device_is_well() -> bool:
    """Whether it still computes: after a fault of one kernel it runs no other in the same process."""
    try:
        jax.block_until_ready(jnp.zeros(8) + jnp.ones(8))
    except Exception:  # whatever a dead device raises
        return False
    return True


def facts(device: str, rounds: int) -> dict[str, str]:
    return {
        "device": device,
        "versions": ", ".join(f"{name} {version}" for name in VERSIONS if (version := _version(name))),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "timed": f"on the device, bursts of {1000 * BURST:.0f} ms after pauses of {1000 * PAUSE:.0f} ms; "
        f"median of {rounds} rounds by turns",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of a checkout, marked where files differ from it; "installed" elsewhere.

    An installed package may lie inside a checkout of something else, which does not track this file.
    """
    file = pathlib.Path(__file__).resolve()
    git = partial(subprocess.run, cwd=file.parent, capture_output=True, text=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", file.name])
        return git(["git", "describe", "--always", "--dirty"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # also where there is no git
        return "installed"


def write_json(file: pathlib.Path, content: Any) -> None:
    """To another name first, so that the file is whole at every moment."""
    partial_file = file.with_name(file.name + ".partial")
    partial_file.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial_file, file)
