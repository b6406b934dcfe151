"""What was measured, to choose by: a JSON file for each kind of device, which `python -m pallas_kernels.tune` makes.

A kernel's configuration is looked up by what is static in a call, its shapes, and never by what its lists hold. A call of a
class that nobody measured, and every call on a device without a table, takes the defaults.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from pallas_kernels import platform

FOLDER = pathlib.Path(__file__).parent
FIELDS = ("stages", "key_stages")  # of a kernel's `Config`; its parts follow from the number of thread blocks
DIRECTIONS = ("forward", "backward")
TILE = 128  # queries of a thread block


@dataclasses.dataclass(frozen=True)
class Call:
    """A class of calls that share a configuration."""

    direction: str  # "forward", or "backward": the gradients
    block_q: int
    block_k: int
    head_dim: int
    fill: int  # n: thread blocks of 128 queries fill the GPU 2**(n-1) to 2**n times, 0: less than once
    length: int  # n: lists may name more than 2**(n-1) keys and up to 2**n

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction!r} must be one of {', '.join(DIRECTIONS)}")
        for name in ("block_q", "block_k", "head_dim", "fill", "length"):
            _whole(name, getattr(self, name), 0)

    @classmethod
    def of(cls, direction: str, queries: tuple[int, ...], block_q: int, block_k: int, width: int, fits: int) -> "Call":
        """The class of a call with queries [b, tq, head, e] and lists of up to `width` blocks, where `fits` thread blocks run
        at a time."""
        b, tokens, heads, e = queries
        filled = b * heads * -(-tokens // TILE) // fits
        return cls(direction, block_q, block_k, e, filled.bit_length(), (width * block_k - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Table:
    """One file. Entries carry the facts of their measurement, which a choice does not need."""

    configs: Mapping[Call, Mapping[str, int]]  # values of `FIELDS`
    break_even: Mapping[tuple[int, int], float]  # (block_q, block_k) -> share of the blocks from which on all are cheaper
    measured: tuple[str, ...]  # date and commit of every measurement in it


def config(direction: str, queries: tuple[int, ...], block_q: int, block_k: int, width: int) -> dict[str, int]:
    """Fields of a kernel's `Config` for such a call (see `Call.of`) on this device; those not named keep their defaults.

    Raises:
        ValueError: if the device's table is broken.
    """
    here = platform.device()
    if here.multiprocessors is None:
        return {}
    found = table(here.kind)
    if found is None:
        return {}
    return dict(found.configs.get(Call.of(direction, queries, block_q, block_k, width, here.multiprocessors), {}))


def break_even(block_q: int, block_k: int) -> float | None:
    """The share of key blocks from which on attending to all of them, unselected, is cheaper on this device than to select.

    None where nobody measured it. Raises ValueError if the device's table is broken.
    """
    found = table(platform.device().kind)
    return None if found is None else found.break_even.get((block_q, block_k))


def file(kind: str) -> pathlib.Path:
    """Where the table of a kind of device is, or would be."""
    return FOLDER / (re.sub("[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")


@functools.cache
def table(kind: str) -> Table | None:
    """The table of a kind of device, None if there is none. Read once. Raises ValueError if it is broken."""
    path = file(kind)
    return parse(load(path), path) if path.exists() else None


def load(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise _broken(path, error) from error


def parse(content: Any, path: pathlib.Path) -> Table:
    """The table in a file's content. Raises ValueError, naming the file, if it is none."""
    try:
        configs = {Call(**entry["call"]): _config(entry["config"]) for entry in content["configs"]}
        shares = {(entry["block_q"], entry["block_k"]): _share(entry["share"]) for entry in content["break_even"]}
        facts = [entry["measured"] for entry in (*content["configs"], *content["break_even"])]
        return Table(configs, shares, tuple(sorted({f"{fact['date']}, commit {fact['commit']}" for fact in facts})))
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: pathlib.Path, error: Exception) -> ValueError:
    why = f"{type(error).__name__}: {error}"
    return ValueError(f"{path} is not a table of measured configurations ({why}); python -m pallas_kernels.tune makes one")


def _config(fields: Mapping[str, int]) -> dict[str, int]:
    for name, value in fields.items():
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}, expected {', '.join(FIELDS)}")
        _whole(name, value, 1)
    return dict(fields)


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


def _share(value: Any) -> float:
    if not isinstance(value, float | int) or not 0 < value <= 1:
        raise ValueError(f"share={value!r} must lie in (0, 1]")
    return float(value)
