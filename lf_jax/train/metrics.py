"""What a run says about itself: one line of JSON every few steps, and how to interrupt it."""

import contextlib
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lf_jax.arrays import Array
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import check


class Metrics:
    """`metrics.jsonl`: a line has the step, the time (seconds since 1970), the seconds of training so far, all slices of the
    run together, samples a second, the most memory that this process has taken on its first device, in bytes, where the
    device says so, and the mean of every metric since the line before.

    Args:
        path: of the file; lines after `step` are of work that was lost, and go.
        step: that the run goes on from.
    """

    def __init__(self, path: str | os.PathLike, step: int):
        self.path, self._values, self._samples = pathlib.Path(path), [], 0
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        with replaced_file(self.path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))
        self._before = json.loads(kept[-1])["seconds"] if kept else 0.0
        self._start = self._last = time.monotonic()

    def add(self, values: dict[str, Array], samples: int) -> None:
        """Takes scalars as they come from the device, without waiting for them. At most two updates are under way at a time:
        every one that is holds a batch in the device's memory."""
        self._values.append(values)
        self._samples += samples
        if len(self._values) > 2:
            jax.block_until_ready(self._values[-3])

    def write(self, step: int) -> dict[str, Any]:
        """Adds a line, waiting for the device, and returns it.

        Raises:
            ValueError: if a metric is not finite.
        """
        found: dict[str, list[float]] = {}
        for values in jax.device_get(self._values):
            for name, value in values.items():
                found.setdefault(name, []).append(float(value))
        now = time.monotonic()
        memory = jax.local_devices()[0].memory_stats() or {}  # None on CPUs
        line = {
            "step": step,
            "time": round(time.time(), 3),
            "seconds": round(self._before + now - self._start, 3),
            "samples_per_second": round(self._samples / (now - self._last), 3),
            **({"peak_bytes": memory["peak_bytes_in_use"]} if "peak_bytes_in_use" in memory else {}),
            **{name: math.fsum(values) / len(values) for name, values in found.items()},
        }
        bad = [f"{name}={line[name]}" for name in found if not math.isfinite(line[name])]
        check(not bad, f"training broke down by step {step}: {', '.join(bad)}")
        self._last, self._values, self._samples = now, [], 0
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def _lines(path: pathlib.Path) -> list[str]:
    """Whole ones: a killed process may leave half a line."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


@contextlib.contextmanager
def interruptible(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come, as a function. The second one raises KeyboardInterrupt."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        note("stopping after this step; once more to stop at once, back to the last checkpoint")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
