"""The page: one HTML file with every picture inside it. Needs the extra `report`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from lf_jax.evaluate import figures

TEMPLATE = pathlib.Path(__file__).with_name("page.html.jinja")
WORLD = "world."  # what the names of the evaluator's scores begin with
LABELS = {
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
    "vmaf": "VMAF to dense",
    "flicker": "steadiness (VBench temporal flickering)",
}
FORCED = {  # title, log scale
    "velocity": ("relative L2 error of the velocity", True),
    "recall": ("attention recall, mean", False),
    "worst": ("attention recall, worst 1 %", False),
    "density": ("key blocks read / visible", False),
}


def render(results: Mapping[str, Any], strips: Mapping[str, list[pathlib.Path]]) -> str:
    """The page of `results`, which are those of `results.json`.

    Args:
        strips: of every policy the film strips of the first prompts, JPEG files.
    """
    summary, order = results["summary"], list(results["summary"])
    sparse = {name: part for name, part in summary.items() if "forced" in part}

    def over(part: str, name: str) -> dict[str, Mapping]:
        return {policy: found[part][name] for policy, found in summary.items() if name in found.get(part, {})}

    def curve(part: str, name: str, across: str, up: str, log: bool = False) -> str:
        return figures.curves(over(part, name), order, across, up, start=0, log=log)

    def measured(part: str) -> list[str]:
        """The names in a part of the summary of which there is any number."""
        every = (item for found in summary.values() for item in found[part].items())
        return list(dict.fromkeys(name for name, value in every if np.isfinite(np.asarray(value["mean"], np.float64)).any()))

    names = sorted(measured("scores"), key=lambda name: name != f"{WORLD}mean")  # first what sums up the others
    reads = {policy: results["forced"][policy][0]["reads"] for policy in sparse}
    return _environment().get_template("page").render(
        results=results,
        summary=summary,
        plain=[name for name in names if not name.startswith(WORLD)],
        world=[name for name in names if name.startswith(WORLD)],
        labels=LABELS | {name: name.removeprefix(WORLD) for name in names if name.startswith(WORLD)},
        strips=[
            (case, {policy: figures.picture(paths[i]) for policy, paths in strips.items()})
            for i, case in enumerate(results["prompts"][: len(next(iter(strips.values())))])
        ],
        chunks=[curve("chunks", name, "chunk", LABELS[name]) for name in measured("chunks")],
        forced=[curve("forced", name, "chunk", up, log) for name, (up, log) in FORCED.items()] if sparse else [],
        heat=figures.heat({policy: part["layers"] for policy, part in sparse.items()}) if sparse else None,
        reading=figures.reading(reads, results["video"]["frame_blocks"]) if sparse else None,
        seconds=[curve("seconds", name, "second", name.removeprefix(WORLD)) for name in measured("seconds")],
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    loader = jinja2.DictLoader({"page": TEMPLATE.read_text(encoding="utf-8")})
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["interval"] = _interval
    return environment


def _interval(value: Mapping[str, float | None] | None, signed: bool = False) -> str:
    """A mean and its interval; a dash where nothing was measured."""
    if value is None or value["mean"] is None:
        return "–"
    places = 2 if abs(value["mean"]) >= 10 else 3
    mean, low, high = (f"{value[key]:{'+' if signed else ''}z.{places}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
