"""When the device was busy, as the profiler saw it."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax
from jax.profiler import ProfileData, ProfileOptions

Interval = tuple[float, float]  # begin and end, seconds


@contextlib.contextmanager
def profiled(host: int = 0) -> Iterator[list[ProfileData]]:
    """Fills the list that it gives, on leaving, with what the profiler saw of the devices, and of the host at that level."""
    options = ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = host, 0
    found: list[ProfileData] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield found
        found += [ProfileData.from_file(str(file)) for file in pathlib.Path(folder).rglob("*.xplane.pb")]


@contextlib.contextmanager
def recorded() -> Iterator[list[Interval]]:
    """Fills the list that it gives, on leaving, with the intervals of every kernel and copy of this process on a GPU; with
    none where there is no GPU."""
    found: list[Interval] = []
    with profiled() as profiles:
        yield found
    for data in profiles:
        found += intervals(data)


def intervals(data: ProfileData) -> list[Interval]:
    """Of all events on the streams of all GPUs, in the order in which they begin."""
    lines = (line for plane in data.planes if "GPU" in plane.name for line in plane.lines if line.name.startswith("Stream"))
    return sorted((event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9) for line in lines for event in line.events)


def groups(intervals: Sequence[Interval], pause: float) -> list[list[Interval]]:
    """Every group of intervals without a pause of so many seconds, or more, within. What overlaps is one interval."""
    found: list[list[Interval]] = []
    for start, end in intervals:
        if found and start <= found[-1][-1][1]:
            found[-1][-1] = found[-1][-1][0], max(found[-1][-1][1], end)
        elif found and start - found[-1][-1][1] < pause:
            found[-1].append((start, end))
        else:
            found.append([(start, end)])
    return found


def span(group: Sequence[Interval]) -> float:
    """Seconds from the beginning of the first interval to the end of the last."""
    return group[-1][1] - group[0][0]


def busy(group: Sequence[Interval]) -> float:
    """Seconds within the intervals."""
    return sum(end - start for start, end in group)
