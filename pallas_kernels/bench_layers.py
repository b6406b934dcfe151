"""One table: the operations around attention, ours beside XLA's. `python -m pallas_kernels.bench_layers --help`

Both sides of an operation are compiled in one process and launched by turns in bursts, and what counts is the median of their
times on the device: `pallas_kernels.bench` says how. A launch has four calls, each with its own input and weights, like layers
of a network; of a convolution, whose input no cache holds, it has one.

ours       ms of one call of our kernel, also where a network would choose XLA. A linear layer is one of bfloat16, out of a
           stack, with "bf16" in its name, otherwise one of float8; where the network has to quantise its input first
           ("quantise" in the name), that is included, and elsewhere what comes before has done it
XLA        ms of the same by XLA; of a linear layer, x @ w + bias in bfloat16, then GELU or gate and residual
ratio      XLA over ours: above 1 where ours is faster
speed      of ours: TFLOP/s, or GB/s of what has to be read and written once
error      relative L2 distance of ours from float32, nothing quantised; without the residual, of the worst output, of the
           last frame of a convolution
XLA error  the same of XLA's

A name says: operation, shape (tokens x inputs x outputs; frames x rows x columns - inputs - outputs), what is fused in.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import command, platform, timing
from pallas_kernels.operations import OPERATIONS, SMALL, Arrays, Operation, arguments, full
from pallas_kernels.runs import Run
from pallas_kernels.worker import Worker, begin, one_line, survivors

SIDES = ("ours", "XLA")
TOO_LARGE = "not at full size on a CPU: --small"


@dataclasses.dataclass(frozen=True)
class Side:
    name: str
    rounds: tuple[float, ...] = ()  # ms of one call
    error: float | None = None
    note: str = ""  # why it did not run, or what ran in its place

    @property
    def ms(self) -> float | None:
        return statistics.median(self.rounds) if self.rounds else None


@dataclasses.dataclass(frozen=True)
class Row:
    operation: str
    unit: str
    ours: float | None = None  # ms, median over the rounds; None: it did not run
    xla: float | None = None
    ratio: float | None = None
    speed: float | None = None
    error: float | None = None
    xla_error: float | None = None
    ours_rounds: tuple[float, ...] = ()
    xla_rounds: tuple[float, ...] = ()
    note: str = ""


def measure(operation: Operation, sides: Sequence[str], repeats: int) -> list[Side]:
    """Times those sides of one operation by turns. One that cannot run says why."""
    small = operation in SMALL
    if platform.device().backend == "cpu" and not small:
        return [Side(name, note=TOO_LARGE) for name in sides]
    sets = [arguments(operation, seed) for seed in range(operation.calls)]
    ready, errors, notes = {}, {}, dict.fromkeys(sides, "")
    for name in sides:
        begin(name)
        try:
            ready[name], notes[name] = _prepared(operation, name, sets, small)
            errors[name] = error(operation, sets[0], ready[name].launch()[0])
        except Exception as failure:  # of a compiler or a kernel, of any kind: the table says which
            if not timing.device_is_well():
                raise
            ready.pop(name, None)
            notes[name] = str(failure) if isinstance(failure, NotImplementedError) else one_line(failure)
    times = timing.bursts(ready, repeats) if ready else {}
    return [Side(name, tuple(times.get(name, ())), errors.get(name), notes[name]) for name in sides]


def _prepared(operation: Operation, side: str, sets: list, small: bool) -> tuple[Run, str]:
    """What is launched for a side, compiled, and a note. At a small size XLA stands in for a kernel that cannot run here."""
    if side == "XLA":
        return _compiled(operation.xla, sets), ""
    try:
        return _compiled(partial(operation.ours, implementation=operation.kernel), sets), ""
    except NotImplementedError as missing:
        if not small:
            raise
        return _compiled(partial(operation.ours, implementation="xla"), sets), f"XLA stands in: {missing}"


def _compiled(call: Callable, sets: list) -> Run:
    @jax.jit
    def program(sets: list) -> list:
        every = []
        for i in range(len(sets)):  # one after the other, as in a network
            sets, outputs = jax.lax.optimization_barrier((sets, call(sets[i])))
            every.append(outputs)
        return every

    return Run(partial(program.lower(sets).compile(), sets), jax.block_until_ready, None, "program", len(sets))


def error(operation: Operation, drawn: Arrays, outputs: Any) -> float:
    """Relative L2 distance of the outputs of a call from those in float32, the worst of them."""

    @jax.jit
    def distances(drawn: Arrays, outputs: Any) -> list:
        pairs = zip(*map(jax.tree.leaves, operation.compared(full(drawn), full(outputs))), strict=True)
        return [jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()) for got, want in pairs]

    with jax.default_matmul_precision("highest"):
        return max(map(float, distances(drawn, outputs)))


def row_of(worker: Worker, operation: Operation, repeats: int) -> Row:
    """`measure` in a worker: a side that kills it is noted, and the other measured without it."""
    sides, dead = survivors(worker, measure, operation, SIDES, repeats)
    return row(operation, [*sides, *(Side(name, note=how) for name, how in dead.items())])


def row(operation: Operation, sides: Sequence[Side]) -> Row:
    found = {side.name: side for side in sides}
    ours, xla = (found[name] for name in SIDES)
    notes = [ours.note] if ours.note == xla.note else [f"{side.name}: {side.note}" for side in (ours, xla) if side.note]
    return Row(
        operation.name,
        operation.unit,
        ours=ours.ms,
        xla=xla.ms,
        ratio=xla.ms / ours.ms if ours.ms and xla.ms else None,
        speed=operation.speed(ours.ms) if ours.ms else None,
        error=ours.error,
        xla_error=xla.error,
        ours_rounds=ours.rounds,
        xla_rounds=xla.rounds,
        note="; ".join(notes),
    )


def line(row: Row) -> str:
    figures = (
        (row.ours, ".4f"),
        (row.xla, ".4f"),
        (row.ratio, ".2f"),
        (row.speed, ".0f"),
        (row.error, ".1e"),
        (row.xla_error, ".1e"),
    )
    ours, xla, ratio, speed, *errors = ("-" if figure is None else format(figure, form) for figure, form in figures)
    return _line(row.operation, ours, xla, ratio, f"{speed} {row.unit}" if row.speed else "-", *errors, row.note[:300])


def _line(operation: str, ours: str, xla: str, ratio: str, speed: str, error: str, xla_error: str, note: str) -> str:
    return f"{operation:36} {ours:>9} {xla:>9} {ratio:>6} {speed:>13} {error:>8} {xla_error:>9}  {note}".rstrip()


def chosen(patterns: Sequence[str], operations: Sequence[Operation]) -> list[Operation]:
    """Those whose names match any of the patterns, in the order of the table.

    Raises:
        ValueError: for a pattern that matches none.
    """
    known = {operation.name: operation for operation in operations}
    return [known[name] for name in command.matching("operation", patterns, tuple(known))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = command.parse(parser, arguments)
    try:
        operations = chosen(given.operations, SMALL if given.small else OPERATIONS)
    except ValueError as error:
        parser.error(str(error))
    say = partial(print, flush=True)
    with Worker() as worker:
        report, rows = timing.facts(worker.ask(platform.describe), given.repeats), []
        for name, fact in report.items():
            say(f"{name}: {fact}")
        say(_line("operation", "ours", "XLA", "ratio", "speed", "error", "XLA error", "note"))
        for operation in operations:
            rows.append(row_of(worker, operation, given.repeats))
            say(line(rows[-1]))
            if given.json is not None:
                timing.write_json(given.json, {"facts": report, "rows": [dataclasses.asdict(row) for row in rows]})


def _parser() -> argparse.ArgumentParser:
    title, _, explanation = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench_layers",
        description=title.partition("`")[0],
        epilog=f"{explanation}\noperations:\n  " + "\n  ".join(operation.name for operation in OPERATIONS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "operations", nargs="*", default=["*"], metavar="NAME", help="names or patterns with *; all if not given"
    )
    parser.add_argument("--small", action="store_true", help="one of each kind at a small size, to try the command anywhere")
    command.add_options(parser, 7, "file for the figures, rewritten after each operation")
    return parser


if __name__ == "__main__":
    main()
