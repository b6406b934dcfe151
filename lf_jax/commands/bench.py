"""`lf-jax bench`."""

import dataclasses
import json
import pathlib
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from lf_jax import bench, bench_attention, pipeline
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.commands.console import show_config
from lf_jax.config import Config, check
from lf_jax.inputs import check_runs


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time a whole video on this machine, chunk by chunk and stage by stage, beside the time that no implementation beats.

    Speed does not depend on the values of weights or prompts, so a preset with random weights will do. Compilation is in
    the column `first` only. The floor of a stage is its FLOPs and bytes, from the config, over what this device reaches in
    large products and copies, measured in the same run.

    With --attention: one layer of the last chunk instead, selection and attention alone and together, and dense attention.
    Needs no weights. With --compare: two reports side by side; nothing is measured.

    Example: lf-jax bench --model self_forcing_1_3b --json bench.json
    """

    model: str | None = None  # converted folder, or a preset for random weights
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    vae: str | None = None  # folder with another autoencoder; of a preset with random weights also wan, light or tiny
    num_frames: int | None = None  # pixel frames; short for --video.num-frames
    repeats: int = 3  # videos timed after the first; rounds with --attention
    text: bool = False  # also load and time the text encoder
    stages: bool = True  # also the stages inside the transformer, by the profiler
    attention: bool = False  # time the attention of a layer instead
    trace: pathlib.Path | None = None  # folder for a trace of one video, for XProf
    compare: tuple[pathlib.Path, pathlib.Path] | None = None  # two files of --json
    json: pathlib.Path | None = None  # file for the figures
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        if self.compare is not None:
            show_pairs(*(bench.load(path) for path in self.compare))
            return
        check(self.model is not None, "--model is needed, or --compare")
        config = pipeline.with_frames(self.settings, self.num_frames)
        check(self.repeats > 0, f"--repeats {self.repeats} must be positive")
        show_config(config, model=self.model)
        check_runs(config)
        if self.attention:
            check(not self.text and self.trace is None, "--attention has no --text and no --trace")
            report = bench_attention.measure(config, self.repeats)
        else:
            pipe = pipeline.load(self.model, config, vae=self.vae)
            report = bench.measure(pipe, config, self.repeats, self.text, self.stages)
            if self.trace is not None:
                bench.record(pipe, config, self.trace)
        if self.json is not None:
            with replaced_file(self.json) as partial:
                partial.write_text(json.dumps(dataclasses.asdict(report), indent=2))
        show(report)


def show(report: bench.Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for name, fact in report.facts.items():
        console.print(f"{name}: {fact:.4g}" if isinstance(fact, float) else f"{name}: {fact}")
    table = _table("first", "median", "least", "most", "floor", "reached")
    for row in report.rows:
        share = f"{row.floor / row.median:.0%}" if row.floor and row.median else ""
        spread = (None, None) if row.least == row.most else (row.least, row.most)
        times = (row.first, row.median, *spread, row.floor)
        table.add_row(_indented(row.stage), _chunk(row.chunk), *map(_digits, times), share)
    console.print(table)


def show_pairs(before: bench.Report, after: bench.Report) -> None:
    """Two reports side by side, and what else differs between them."""
    console = Console(highlight=False, soft_wrap=True)
    pairs, differing = bench.compare(before, after)
    for name, (first, second) in differing.items():
        console.print(f"other {name}: {first} | {second}")
    table = _table("before", "after", "before / after")
    for pair in pairs:
        ratio = "" if pair.ratio is None else f"{pair.ratio:.2f}"
        table.add_row(_indented(pair.stage), _chunk(pair.chunk), *map(_digits, pair.medians), ratio)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table("milliseconds of", "chunk", *columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    return table


def _indented(stage: str) -> str:
    """A part below its stage."""
    part = stage.partition(": ")[2]
    return f"  {part}" if part else stage


def _chunk(number: int | None) -> str:
    return "" if number is None else str(number)


def _digits(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.3g}"
