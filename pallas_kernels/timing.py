"""How kernels are timed, and what a figure must name to mean anything."""

import json
import math
import os
import pathlib
import subprocess
import time
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import worker
from pallas_kernels.runs import Run

ROUND = 0.05  # seconds of one run in one round
VERSIONS = ("jax", "jaxlib", "nvidia-cudnn-cu13", "torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl")


def by_turns(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call of each run, one figure a round.

    In a round every run in turn is launched back to back, for about `ROUND`, and waited for once at the end. So all see the
    same clocks and temperatures, and work of the host, which runs ahead of the device, does not count.
    """
    launches = {}
    for name, run in runs.items():
        worker.begin(name)
        launches[name] = math.ceil(ROUND / (run.calls * seconds(run, 1)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            worker.begin(name)
            times[name].append(1000 * seconds(run, launches[name]))
    return times


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
        "timed": f"wall time of back-to-back calls, {1000 * ROUND:.0f} ms a round; median of {rounds} rounds by turns",
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
