"""The figures of a benchmark, what they must name to mean anything, and two reports side by side."""

import dataclasses
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

from lf_jax.config import Config, check
from pallas_kernels.timing import commit

IDENTITY = ("device", "versions", "commit", "timed")  # facts without which two figures cannot be compared


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, in milliseconds."""

    stage: str
    chunk: int | None  # None: of the whole video
    first: float | None  # the first time: compilation included; None where only compiled programs were measured
    median: float
    least: float
    most: float
    floor: float | None = None  # no implementation is faster here; None where nothing bounds it


@dataclasses.dataclass(frozen=True)
class Report:
    facts: dict[str, Any]  # device, versions, commit, date, what was timed
    rows: tuple[Row, ...]

    def seconds(self, stage: str) -> float:
        return sum(row.median for row in self.rows if row.stage == stage) / 1000


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same line of two reports; None where one of them lacks it."""

    stage: str
    chunk: int | None
    medians: tuple[float | None, float | None]

    @property
    def ratio(self) -> float | None:
        """How many times as long the first takes."""
        before, after = self.medians
        return before / after if before is not None and after else None


def timed(stage: str, chunk: int | None, repeats: int, run: Callable[[], object]) -> Row:
    """A first run, which compiles, and `repeats` more, each waited for."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1000 * (time.perf_counter() - start))
    return row(stage, chunk, times)


def row(stage: str, chunk: int | None, times: list[float]) -> Row:
    first, *warm = times
    return Row(stage, chunk, first, statistics.median(warm), min(warm), max(warm))


def facts(config: Config) -> dict[str, Any]:
    """What a figure must name to mean anything."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax")),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "timed": f"{config.video.num_frames} frames of {config.video.height}x{config.video.width}, batch 1, "
        f"{config.sparsity.policy} attention, {config.model.dtype}, {config.model.linears} linears, "
        f"{config.vae.kind} VAE at base {config.vae.base}",
    }


def load(path: str | os.PathLike) -> Report:
    """A report that `lf-jax bench --json` wrote.

    Raises:
        ValueError: if there is none at `path`.
    """
    path = pathlib.Path(path)
    check(path.is_file(), f"no such report: {path}")
    try:
        text = json.loads(path.read_text())
        return Report(text["facts"], tuple(Row(**fields) for fields in text["rows"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no report of `lf-jax bench --json`: {error}") from error


def compare(before: Report, after: Report) -> tuple[list[Pair], dict[str, tuple[Any, Any]]]:
    """The lines of both, those of `before` first, and the facts that differ and so may be why the figures do."""
    medians = [{(row.stage, row.chunk): row.median for row in report.rows} for report in (before, after)]
    pairs = [Pair(*key, tuple(found.get(key) for found in medians)) for key in dict.fromkeys([*medians[0], *medians[1]])]
    both = {name: (before.facts.get(name), after.facts.get(name)) for name in IDENTITY}
    return pairs, {name: values for name, values in both.items() if values[0] != values[1]}
