"""What the commands of this package share: their usual options, and how they take names of what they measure."""

import argparse
import fnmatch
import pathlib
from collections.abc import Iterable, Sequence


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Ends the process where `--repeats` or `--json` cannot be used, before there is work to lose."""
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats} must be positive")
    if given.json is not None and not given.json.resolve().parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.parent}")
    return given


def add_options(parser: argparse.ArgumentParser, repeats: int, json: str) -> None:
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds (default {repeats})")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help=json)


def matching(kind: str, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that match any of the patterns (`*` stands for anything), in their own order.

    Raises:
        ValueError: for a pattern that matches none.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(f"no {kind} is called {pattern!r}; there are: {', '.join(names)}")
        wanted.update(found)
    return [name for name in names if name in wanted]
