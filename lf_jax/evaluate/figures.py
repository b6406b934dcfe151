"""Pictures for the page, each as a data URI: curves with confidence bands, heat maps, what is read when."""

import base64
import io
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")  # the next round of colours has the next style
SIZE = (5.2, 3.2)  # inches


def curves(
    policies: Mapping[str, Mapping[str, Sequence]], order: Sequence[str], across: str, up: str, start: int, log: bool = False
) -> str:
    """One line a policy over chunks or seconds, with its confidence band.

    Args:
        policies: an `Interval` as JSON by name; every entry a curve.
        order: all policies of the page, so that each has one colour throughout.
        across, up: what the axes say.
        start: the number of the first point.
    """
    figure, axes = _figure()
    for name, curve in policies.items():
        colour, style = _look(order, name)
        mean, low, high = (np.asarray(curve[key], np.float64) for key in ("mean", "low", "high"))
        if log:  # exact agreement has no logarithm
            mean, low, high = (np.where(values > 0, values, np.nan) for values in (mean, low, high))
        where = np.arange(start, start + len(mean))
        axes.plot(where, mean, style, color=colour, label=name, marker="." if len(mean) < 20 else None)
        axes.fill_between(where, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=across, ylabel=up, yscale="log" if log else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def heat(policies: Mapping[str, Sequence]) -> str:
    """Small multiples of [chunk][layer] in 0..1, chunks across and layers up."""
    figure = Figure(figsize=(1.7 * len(policies) + 0.9, 2.8), layout="constrained")
    panels = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, policies.items(), strict=True):
        image = axes.imshow(np.asarray(values, np.float64).T, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
        _label(axes, name, "chunk")
    panels[0].set_ylabel("layer")
    panels[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=panels, shrink=0.8)
    return _svg(figure)


def reading(policies: Mapping[str, Sequence[Mapping]], blocks: int) -> str:
    """Which key blocks a query block in the middle of a chunk reads: one row a chunk, time across, darker for more heads.

    Args:
        policies: of every chunk its `reads` as `forcing.measure` has them.
        blocks: key blocks of a frame.
    """
    figure = Figure(figsize=(10, 0.5 + 1.0 * len(policies)), layout="constrained")
    panels = figure.subplots(len(policies), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, chunks) in zip(panels, policies.items(), strict=True):
        frames = 1 + max(frame for chunk in chunks for frame in chunk["frames"])
        picture = np.full((len(chunks), frames * blocks), np.nan)
        for row, chunk in zip(picture, chunks, strict=True):
            where = (np.asarray(chunk["frames"])[:, None] * blocks + np.arange(blocks)).reshape(-1)
            row[where] = chunk["share"]
        edges = (0, frames, len(chunks), 0)
        axes.imshow(picture, vmin=0, vmax=1, extent=edges, aspect="auto", interpolation="nearest", cmap=_reads_map())
        _label(axes, name, "")
        axes.set_ylabel("chunk")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("latent frame")
    return _svg(figure)


def picture(path: pathlib.Path) -> str:
    """A JPEG file."""
    return _uri("image/jpeg", path.read_bytes())


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _label(axes: Axes, title: str, across: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(across)
    axes.tick_params(labelsize=7)


def _look(order: Sequence[str], name: str) -> tuple[str, str]:
    turn, colour = divmod(list(order).index(name), len(COLOURS))
    return COLOURS[colour], STYLES[turn % len(STYLES)]


def _reads_map() -> matplotlib.colors.Colormap:
    """Light where a visible block is left out, dark where it is read, grey where nothing is visible."""
    return matplotlib.colormaps["Blues"].with_extremes(bad="#d0d0d0")


def _svg(figure: Figure) -> str:
    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lf_jax"}):  # the same figures give the same file
        figure.savefig(data, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", data.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
