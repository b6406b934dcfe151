"""One table: implementations of attention x workloads. `python -m pallas_kernels.bench --help`

How it is timed, the same for all: a workload's implementations are compiled first, in one process. Then come `--repeats`
rounds, in each of which every implementation in turn is launched a few times back to back, about 5 ms of work after a pause
of 30 ms; a launch is some calls one after the other. The profiler says how long the device was at work, the gaps between
kernels included. The table has the median over the rounds. So all are seen at the same full clocks, and work of the host does
not count: launches of JAX, one XLA program, run ahead of the GPU, those of torch are replays of a CUDA graph (where one cannot
be captured the table says so). An implementation that kills the process is named, and the workload measured again without it.

ms         of one call: all that it costs on the device, with what prepares the lists and joins partial results
TFLOP/s    over the live tokens of the listed blocks only: two products for the output, five for the gradients
sustained  ms of one call where all run by turns without pauses, 50 ms each: a GPU at its power limit lowers its clocks
error      relative L2 distance from the definition in float32, the worst of the first and last head, and for gradients of
           those of queries, keys and values

A workload's name says: backward or not, live keys, share of the blocks kept, block sizes, where the lists come from.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial

from pallas_kernels import command, platform, runs, timing, workloads
from pallas_kernels.worker import Worker, begin, one_line, survivors
from pallas_kernels.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Row:
    workload: str
    implementation: str
    ms: float | None = None  # median over the rounds; None: it did not run
    least: float | None = None
    most: float | None = None
    tflops: float | None = None  # of the median
    sustained: float | None = None  # ms, median, without pauses
    error: float | None = None
    note: str = ""  # how it was launched, or why it did not run


def measure(workload: Workload, implementations: Sequence[str], repeats: int) -> list[Row]:
    """Times one workload, the implementations by turns. One that cannot run has a row with the reason."""
    case = workloads.case(workload)
    flops = case.flops()
    heads = sorted({0, workload.heads - 1})
    expected = [runs.expected(case, head) for head in heads]
    ready, errors, rows = {}, {}, {}
    for name in implementations:
        begin(name)
        try:
            run = runs.prepare(name, case)
            errors[name] = max(runs.error(run, head, want) for head, want in zip(heads, expected, strict=True))
            ready[name] = run
        except runs.Missing as missing:
            rows[name] = Row(workload.name, name, note=str(missing))
        except Exception as error:  # of others' compilers and kernels, of any kind: the table says which
            if not timing.device_is_well():
                raise
            rows[name] = Row(workload.name, name, note=one_line(error))
    cool, hot = timing.bursts(ready, repeats), timing.sustained(ready, repeats)
    for name, times in cool.items():
        ms = statistics.median(times)
        figures = ms, min(times), max(times), flops / ms / 1e9, statistics.median(hot[name]), errors[name]
        rows[name] = Row(workload.name, name, *figures, ready[name].launched)
    return [rows[name] for name in implementations]


def rows_of(worker: Worker, workload: Workload, implementations: Sequence[str], repeats: int) -> list[Row]:
    """`measure` in a worker: rows also of those that killed it."""
    rows, dead = survivors(worker, measure, workload, implementations, repeats)
    rows += [Row(workload.name, name, note=how) for name, how in dead.items()]
    return sorted(rows, key=lambda row: implementations.index(row.implementation))


def line(row: Row) -> str:
    known = row.ms is not None
    figures = [f"{row.ms:.4f}", f"{row.tflops:.1f}", f"{row.sustained:.4f}", f"{row.error:.1e}"] if known else ["-"] * 4
    return _line(row.workload, row.implementation, *figures, row.note[:300])


def _line(workload: str, implementation: str, ms: str, tflops: str, sustained: str, error: str, note: str) -> str:
    return f"{workload:34} {implementation:14} {ms:>10} {tflops:>9} {sustained:>10} {error:>9}  {note}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = command.parse(parser, arguments)
    names = given.workloads or [work.name for work in workloads.FORWARD]
    if given.backward:
        names += [work.name for work in workloads.BACKWARD]
    try:
        chosen = workloads.named(names)
    except ValueError as error:
        parser.error(str(error))
    say = partial(print, flush=True)
    implementations = list(dict.fromkeys(given.implementations))
    with Worker() as worker:
        report, rows = timing.facts(worker.ask(platform.describe), given.repeats), []
        for name, fact in report.items():
            say(f"{name}: {fact}")
        say(_line("workload", "implementation", "ms", "TFLOP/s", "sustained", "error", "launched as"))
        for workload in chosen:
            for row in rows_of(worker, workload, implementations, given.repeats):
                rows.append(row)
                if row.note != runs.DENSE_ONLY:
                    say(line(row))
            if given.json is not None:
                timing.write_json(given.json, {"facts": report, "rows": [dataclasses.asdict(row) for row in rows]})


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
    command.add_options(parser, 7, "file for the figures, rewritten after each workload")
    return parser


if __name__ == "__main__":
    main()
