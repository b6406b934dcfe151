"""What commands print: results on standard output, everything else on standard error."""

import dataclasses
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lf_jax.config import Config


def note(text: str) -> None:
    """One line about what is going on."""
    print(text, file=sys.stderr, flush=True)


def errors() -> Console:
    return Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A bar that counts steps."""
    return _bar(MofNCompleteColumn())


def byte_progress() -> Progress:
    """A bar that counts bytes."""
    return _bar(DownloadColumn(binary_units=True))


def _bar(done: ProgressColumn) -> Progress:
    """On standard error, and only where that is a terminal: a log has `note`s."""
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def show_config(config: Config, **facts: object) -> None:
    """The resolved config, a line a part, and the given facts before it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name.replace("_", " "), str(fact))
    for part in dataclasses.fields(config):
        settings = getattr(config, part.name)
        fields = (f"{f.name}={_brief(getattr(settings, f.name))}" for f in dataclasses.fields(settings))
        table.add_row(part.name, " ".join(fields))
    errors().print(table)


def _brief(value: object) -> str:
    """Long tuples and texts shortened: the 16 channel statistics of the VAE, a negative prompt."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
