"""Measures configurations of the Hopper kernels and writes down the fastest: `python -m pallas_kernels.tune --help`

Every workload stands for a class of calls (`pallas_kernels.tuned.Call`). Its configurations are timed as
`python -m pallas_kernels.bench` times implementations; those that do not compile, or are wrong, are named and left out. The
table is rewritten after each workload; what it says of other classes stays, so that it can be made in several runs.

A second measurement is the break-even: the share of the key blocks from which on attending to all of them costs no more than
to select and attend. It needs the milliseconds of selection at the size of the workloads (`lf-jax bench --attention`) and,
for blocks of B queries and K keys, the workloads "32256-*-BxK*" in the same run.
"""

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels import command, platform, runs, timing, tuned, workloads
from pallas_kernels.block_sparse.hopper_common import Config
from pallas_kernels.worker import Worker, begin, one_line, survivors
from pallas_kernels.workloads import Workload

SPACE = {  # None: the default
    "forward": {"stages": (2, 3, 4)},
    "backward": {"stages": (2, 3), "key_stages": (2, 3)},
}
LONG = 32256  # keys of the workloads that have all lengths of lists
ACCURACY = 1e-2  # relative L2; a sum of bfloat16 products has 3e-3
Results = Mapping[str, list[float] | str]  # of a configuration: milliseconds in every round, or why it has none
USUAL = [
    work.name
    for work in (*workloads.FORWARD, *workloads.BACKWARD, *workloads.TUNING)
    if work.lists != "random" and not work.padded and (work.backward or work.keys == LONG)
]


class Selection(NamedTuple):
    """The time that selection takes, and the workloads that say what attention takes for shares of such blocks."""

    block_q: int
    block_k: int
    milliseconds: float
    needed: list[Workload]


def candidates(direction: str) -> dict[str, dict[str, int]]:
    """Every configuration that is tried, by what it is called."""
    fields = SPACE[direction]
    choices = (dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values()))
    return {
        " ".join(f"{name}={value}" for name, value in choice.items()): {
            name: value for name, value in choice.items() if value is not None
        }
        for choice in choices
    }


def measure(workload: Workload, names: Sequence[str], repeats: int) -> list[tuple[str, list[float] | str]]:
    """`Results` of these configurations."""
    case, choices = workloads.case(workload), candidates(direction(workload))
    expected = runs.expected(case, 0)
    ready, results = {}, {}
    for name in names:
        begin(name)
        try:
            run = runs.configured(case, Config(**choices[name]))
            error = runs.error(run, 0, expected)
        except Exception as why:  # of the compiler: too much shared memory, too many registers
            if not timing.device_is_well():
                raise
            results[name] = one_line(why)
        else:
            if error < ACCURACY:
                ready[name] = run
            else:
                results[name] = f"wrong: relative L2 error {error:.1e}"
    results |= timing.bursts(ready, repeats)
    return [(name, results[name]) for name in names]


def direction(workload: Workload) -> str:
    return "backward" if workload.backward else "forward"


def call(workload: Workload, multiprocessors: int) -> tuned.Call:
    """The class that a workload stands for."""
    queries = workload.batch, workload.queries, workload.heads, workload.head_dim
    return tuned.Call.of(direction(workload), queries, workload.block_q, workload.block_k, workload.width, multiprocessors)


def break_even(attention: Mapping[float, float], selection: float) -> float:
    """The share of the blocks from which on all of them cost no more than a selection.

    Args:
        attention: milliseconds by share of the blocks, among them 1; between two shares they are taken to be on a line.
        selection: milliseconds.
    """
    shares = sorted(attention)
    times = np.maximum.accumulate([attention[share] for share in shares])  # np.interp asks for it; noise may break it
    return float(np.interp(attention[1.0] - selection, times, shares))


def best(results: Results) -> tuple[str, float] | None:
    """The fastest configuration and its median, None if none ran."""
    medians = {name: statistics.median(times) for name, times in results.items() if not isinstance(times, str)}
    return min(medians.items(), key=lambda item: item[1], default=None)


def replaced(entries: Sequence[Mapping], entry: Mapping, *keys: str) -> list[Mapping]:
    """The entries of a table with this one in the place of that of the same keys."""
    return [old for old in entries if any(old[key] != entry[key] for key in keys)] + [entry]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = command.parse(parser, arguments)
    try:
        chosen = workloads.named(given.workloads)
        selections = [_selection(text, chosen) for text in given.selection]
    except ValueError as error:
        parser.error(str(error))
    say = partial(print, flush=True)
    with Worker() as worker:
        facts, here = timing.facts(worker.ask(platform.describe), given.repeats), worker.ask(platform.device)
        if here.multiprocessors is None:
            parser.error(f"needs an NVIDIA GPU, this is {facts['device']}")
        file = given.json or tuned.file(here.kind)
        table = tuned.load(file) if file.exists() else {"device": here.kind, "configs": [], "break_even": []}
        tuned.parse(table, file)
        if table["device"] != here.kind:
            parser.error(f"{file} is of {table['device']}, this is {here.kind}")
        for name, fact in facts.items():
            say(f"{name}: {fact}")
        fastest: dict[Workload, float] = {}
        for workload in chosen:
            found, dead = survivors(worker, measure, workload, list(candidates(direction(workload))), given.repeats)
            results: Results = dict(found) | dead
            for name in candidates(direction(workload)):
                say(f"{workload.name:34} {name:32} {_told(results[name])}")
            if (winner := best(results)) is not None:
                name, fastest[workload] = winner
                entry = _config_entry(workload, name, results, here.multiprocessors) | {"measured": facts}
                table["configs"] = replaced(table["configs"], entry, "call")
                timing.write_json(file, table)
    for selection in selections:
        attention = {work.keep: fastest[work] for work in selection.needed if work in fastest}
        if 1.0 in attention and len(attention) > 1:
            entry = _break_even_entry(selection, attention) | {"measured": facts}
            say(f"break-even of {selection.block_q}x{selection.block_k}: {entry['share']:.3f} of the blocks")
            table["break_even"] = replaced(table["break_even"], entry, "block_q", "block_k")
            timing.write_json(file, table)
    if not fastest:
        parser.exit(1, "no configuration ran\n")
    say(f"table: {file}")


def _config_entry(workload: Workload, name: str, results: Results, multiprocessors: int) -> dict[str, Any]:
    return {
        "call": vars(call(workload, multiprocessors)),
        "config": candidates(direction(workload))[name],
        "workload": workload.name,
        "milliseconds": results,
    }


def _break_even_entry(selection: Selection, attention: Mapping[float, float]) -> dict[str, Any]:
    return {
        "block_q": selection.block_q,
        "block_k": selection.block_k,
        "share": break_even(attention, selection.milliseconds),
        "selection": selection.milliseconds,
        "attention": {str(share): milliseconds for share, milliseconds in attention.items()},
    }


def _told(result: list[float] | str) -> str:
    return result[:200] if isinstance(result, str) else f"{statistics.median(result):.4f} ms"


def _selection(text: str, chosen: Sequence[Workload]) -> Selection:
    """What "128x64=0.021" says. Raises ValueError if it says something else, or `chosen` lacks the workloads it needs."""
    blocks, _, milliseconds = text.partition("=")
    try:
        block_q, block_k = (int(size) for size in blocks.split("x"))
        selection = Selection(block_q, block_k, float(milliseconds), [])
    except ValueError:
        raise ValueError(f"--selection {text!r} must be like 128x64=0.021") from None
    for work in chosen:
        of_lengths = work.keys == LONG and work.lists != "random" and not work.backward
        if of_lengths and (work.block_q, work.block_k) == (block_q, block_k):
            selection.needed.append(work)
    if len(selection.needed) < 2 or not any(work.full for work in selection.needed):
        raise ValueError(f"--selection {text!r} needs the workloads '{LONG}-*-{block_q}x{block_k}*'")
    return selection


def _parser() -> argparse.ArgumentParser:
    title, _, explanation = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune",
        description=title.partition(":")[0],
        epilog=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = partial(parser.add_argument, nargs="+")
    option("--workloads", default=USUAL, metavar="NAME", help="names or patterns with *, of those of the bench")
    option(
        "--selection", default=[], metavar="BxK=MS", help="milliseconds of selection for these block sizes: adds break-evens"
    )
    command.add_options(parser, 5, "the table; that of this device if not given")
    return parser


if __name__ == "__main__":
    main()
