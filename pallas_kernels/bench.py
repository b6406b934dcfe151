"""One table: implementations of attention x workloads. `python -m pallas_kernels.bench --help`

How it is timed, the same for all: a workload's implementations are compiled first. Then come `--repeats` rounds, in each
of which every implementation in turn is launched many times back to back, about 50 ms of work, and waited for once at the
end; a round gives the wall time divided by the launches. The table has the median over the rounds, in which all see the
same clocks and temperatures. Work of the host does not count: launches of JAX run ahead of the GPU, those of torch are
replays of a CUDA graph (where one cannot be captured the table says so).

ms         of one launch: all that a user's call costs on the device, with what prepares the lists and joins partial results
TFLOP/s    over the live tokens of the listed blocks only: two products for the output, five for the gradients
error      relative L2 distance from the definition in float32, the worst of the first and last head, and for gradients of
           those of queries, keys and values

A workload's name says: backward or not, live keys, share of the blocks kept, block sizes, where the lists come from.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata

import numpy as np

from pallas_kernels import platform, runs, workloads
from pallas_kernels.workloads import Workload

ROUND = 0.05  # seconds of one implementation in one round
VERSIONS = ("jax", "jaxlib", "nvidia-cudnn-cu13", "torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl")


@dataclasses.dataclass(frozen=True)
class Row:
    workload: str
    implementation: str
    ms: float | None = None  # median over the rounds; None: it did not run
    least: float | None = None
    most: float | None = None
    tflops: float | None = None  # of the median
    error: float | None = None
    note: str = ""  # how it was launched, or why it did not run


def measure(workload: Workload, implementations: Sequence[str], repeats: int) -> list[Row]:
    """Times one workload, the implementations by turns. One that cannot run has a row with the reason."""
    case = workloads.case(workload)
    flops = case.flops()
    heads = sorted({0, workload.heads - 1})
    expected = [runs.expected(case, head) for head in heads]
    ready, rows = {}, {}
    for name in implementations:
        try:
            run = runs.prepare(name, case)
            worst = max(_error(run, head, want) for head, want in zip(heads, expected, strict=True))
            ready[name] = run, worst, math.ceil(ROUND / _seconds(run, 1)), []
        except runs.Missing as missing:
            rows[name] = Row(workload.name, name, note=str(missing))
        except Exception as error:  # of others' compilers and kernels, of any kind: the table says which
            rows[name] = Row(workload.name, name, note=f"{type(error).__name__}: {error}".strip().replace("\n", " "))
    for _ in range(repeats):
        for run, _, launches, times in ready.values():
            times.append(1000 * _seconds(run, launches))
    for name, (run, worst, _, times) in ready.items():
        ms = statistics.median(times)
        rows[name] = Row(workload.name, name, ms, min(times), max(times), flops / ms / 1e9, worst, run.launched)
    return [rows[name] for name in implementations]


def _seconds(run: runs.Run, launches: int) -> float:
    """Wall time of one of `launches` launches."""
    start = time.perf_counter()
    for _ in range(launches):
        outputs = run.launch()
    run.wait(outputs)
    return (time.perf_counter() - start) / launches


def _error(run: runs.Run, head: int, expected: Sequence[np.ndarray]) -> float:
    outputs = run.launch()
    run.wait(outputs)
    found = (run.head(output, head) for output in outputs)
    pairs = zip(found, expected, strict=True)
    return max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in pairs)


def facts(repeats: int) -> dict[str, str]:
    """What a figure must name to mean anything."""
    return {
        "device": platform.describe(),
        "versions": ", ".join(f"{name} {version}" for name in VERSIONS if (version := _version(name))),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "timed": f"wall time of back-to-back launches, {1000 * ROUND:.0f} ms a round; median of {repeats} rounds by turns",
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


def line(row: Row) -> str:
    figures = ["-"] * 3 if row.ms is None else [f"{row.ms:.4f}", f"{row.tflops:.1f}", f"{row.error:.1e}"]
    return _line(row.workload, row.implementation, *figures, row.note[:300])


def _line(workload: str, implementation: str, ms: str, tflops: str, error: str, note: str) -> str:
    return f"{workload:34} {implementation:14} {ms:>10} {tflops:>9} {error:>9}  {note}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats} must be positive")
    if given.json is not None and not given.json.resolve().parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.parent}")
    names = given.workloads or [work.name for work in workloads.FORWARD]
    if given.backward:
        names += [work.name for work in workloads.BACKWARD]
    try:
        chosen = workloads.named(names)
    except ValueError as error:
        parser.error(str(error))
    say = partial(print, flush=True)
    report, rows = facts(given.repeats), []
    for name, fact in report.items():
        say(f"{name}: {fact}")
    say(_line("workload", "implementation", "ms", "TFLOP/s", "error", "launched as"))
    for workload in chosen:
        for row in measure(workload, tuple(dict.fromkeys(given.implementations)), given.repeats):
            rows.append(row)
            say(line(row))
        if given.json is not None:
            given.json.write_text(json.dumps({"facts": report, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))


def _parser() -> argparse.ArgumentParser:
    title, _, explanation = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=title.partition("`")[0],
        epilog=f"{explanation}\nworkloads:\n  " + "\n  ".join(workloads.WORKLOADS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = partial(parser.add_argument, metavar="NAME")
    usual = [name for name in runs.NAMES if name != "reference"]
    known = f"of {', '.join(runs.NAMES)}; all but reference if not given"
    option("--implementations", nargs="+", choices=runs.NAMES, default=usual, help=known)
    option("--workloads", nargs="+", help="names or patterns with *; all forward ones if not given")
    parser.add_argument("--backward", action="store_true", help="add every backward workload")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="file for the figures, rewritten after each workload")
    return parser


if __name__ == "__main__":
    main()
