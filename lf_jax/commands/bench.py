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
    """Time a whole video on this machine, chunk by chunk and stage by stage.

    Speed does not depend on the values of weights or prompts, so a preset with random weights will do. Compilation is in
    the column `first` only.

    With --attention: one layer of the last chunk instead, selection and attention alone and together, and dense attention.
    Needs no weights.

    Example: lf-jax bench --model self_forcing_1_3b --json bench.json
    """

    model: str  # converted folder, or a preset for random weights
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    num_frames: int | None = None  # pixel frames; short for --video.num-frames
    repeats: int = 3  # videos timed after the first; rounds with --attention
    text: bool = False  # also load and time the text encoder
    attention: bool = False  # time the attention of a layer instead
    json: pathlib.Path | None = None  # file for the figures
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = pipeline.with_frames(self.settings, self.num_frames)
        check(self.repeats > 0, f"--repeats {self.repeats} must be positive")
        show_config(config, model=self.model)
        check_runs(config)
        if self.attention:
            check(not self.text, "--attention has no --text")
            report = bench_attention.measure(config, self.repeats)
        else:
            report = bench.measure(pipeline.load(self.model, config), config, self.repeats, self.text)
        if self.json is not None:
            with replaced_file(self.json) as partial:
                partial.write_text(json.dumps(dataclasses.asdict(report), indent=2))
        show(report)


def show(report: bench.Report) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for name, fact in report.facts.items():
        console.print(f"{name}: {fact}")
    table = Table("stage", "chunk", *(f"{name} ms" for name in ("first", "median", "least", "most")))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report.rows:
        chunk = "" if row.chunk is None else str(row.chunk)
        table.add_row(row.stage, chunk, *map(_digits, (row.first, row.median, row.least, row.most)))
    console.print(table)


def _digits(ms: float) -> str:
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.4f}"
