"""Trains the model that ships, from nothing to a model folder with a card (docs/recipe.md).

    python tools/recipe.py [--minutes 9] [--until world_teacher]

Every stage is one `lf-jax` command that leaves its result in `runs/STAGE` of the current folder. What is finished is
skipped, what was stopped goes on, so the same command is given until it exits with 0. It exits with 75 when its minutes are
over and there is more to do. The model is `runs/world`.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from lf_jax.checkpoint.replace import replaced_folder
from lf_jax.config import check

RUNS = pathlib.Path("runs")
MODEL = RUNS / "world"
TIMES = RUNS / "times.jsonl"  # how long the command of a stage ran, a line a slice
UNFINISHED = 75  # as `lf-jax train` says it
LEAST = 60.0  # seconds under which no stage is begun: start and compilation would take them
LARGEST = 24_000_000  # bytes of all weights of a model that ships


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    words: tuple[str, ...]  # of the command, without --output
    result: str  # what is in the folder when the stage is finished

    @property
    def folder(self) -> pathlib.Path:
        return RUNS / self.name

    @property
    def finished(self) -> bool:
        return (self.folder / self.result).exists()

    def command(self, seconds: float | None) -> list[str]:
        slices = seconds is not None and self.words[0] == "train"
        return [*self.words, "--output", str(self.folder), *(("--minutes", f"{seconds / 60:.2f}") if slices else ())]


def training(name: str) -> Stage:
    return Stage(name, ("train", "--config", name), "model")


def scoring(name: str, model: str, *more: str) -> Stage:
    words = ("eval", "--model", f"runs/{model}/model", "--prompts", "world", "--num", "200", "--batch", "25", "--mp4s", "0")
    return Stage(name, (*words, *more), "results.json")


def encoding(name: str, *more: str) -> Stage:
    return Stage(name, ("latents", "--model", "runs/world_vae/model", "--data", "world", *more), "manifest.json")


STAGES = (
    training("world_vae_short"),
    training("world_vae"),
    encoding("world_images", "--video.num-frames", "1", "--items", "65536", "--batch", "256", "--shard", "1024", "--seed", "1"),
    training("world_stills"),
    encoding("world_latents", "--items", "10240", "--batch", "16"),
    training("world_clips"),
    training("world_teacher"),
    training("world_causal"),
    training("world_dmd"),
    training("world_light_forcing"),
    scoring("world_dense_eval", "world_dmd", "--policies", "dense"),  # what the last stage must not lose
    scoring("world_eval", "world_light_forcing"),
)
LAST, DENSE, OURS = STAGES[-3:]


def run(stages: Sequence[Stage], minutes: float | None) -> int:
    """Runs what is not finished, in order, for so many minutes or to the end; returns the exit code."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    # A slice need not compile again what one before it did.
    environment = {"JAX_COMPILATION_CACHE_DIR": str((RUNS / "compiled").absolute())} | os.environ
    for stage in stages:
        if stage.finished:
            continue
        left = None if end is None else end - time.monotonic()
        if left is not None and left < LEAST:
            return UNFINISHED
        print(f"{stage.name}: {' '.join(stage.words)}", file=sys.stderr, flush=True)
        command, began = [sys.executable, "-m", "lf_jax", *stage.command(left)], time.monotonic()
        # Training stops by itself, at a checkpoint; the others lose a shard or a few videos.
        code = execute(command, environment, None if stage.words[0] == "train" else left)
        RUNS.mkdir(exist_ok=True)
        with TIMES.open("a") as file:
            file.write(json.dumps({"stage": stage.name, "seconds": round(time.monotonic() - began, 1)}) + "\n")
        if code:
            return code
    return 0


def execute(command: Sequence[str], environment: Mapping[str, str], limit: float | None) -> int:
    """The exit code of a command, which is killed after `limit` seconds.

    What to do about a signal is for the command to decide: Ctrl-C reaches it too, SIGTERM is handed on.
    """
    process = subprocess.Popen(command, env=environment)
    handlers = {signal.SIGINT: lambda number, frame: None, signal.SIGTERM: lambda number, frame: process.send_signal(number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return UNFINISHED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def assemble() -> None:
    """Makes `runs/world`: the last stage's model, with a card.

    Raises:
        ValueError: if its weights are larger than a model that ships may be.
    """
    source = LAST.folder / "model"
    size = sum(path.stat().st_size for path in source.glob("*/*.safetensors"))
    check(size <= LARGEST, f"the weights in {source} have {size:,} bytes, expected at most {LARGEST:,}")
    with replaced_folder(MODEL) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        (partial / "README.md").write_text(card(size))


def card(size: int) -> str:
    """The model card: how the model was made and how good it is, all of it read from what the stages left behind."""
    ours, dense = (json.loads((stage.folder / stage.result).read_text()) for stage in (OURS, DENSE))
    facts = ours["facts"]
    seconds = [json.loads(line) for line in TIMES.read_text().splitlines()]
    rows = [stage_row(stage, sum(one["seconds"] for one in seconds if one["stage"] == stage.name)) for stage in STAGES]
    total = sum(one["seconds"] for one in seconds) / 60
    return "\n".join(
        [
            "# world",
            "",
            "A text-to-video model of a procedural world of coloured shapes: 128x192 pixels, 81 frames at 16 a second, in",
            "chunks of 3 latent frames and 4 denoising steps, with Light Forcing's block-sparse attention. It knows the",
            f"captions of that world (docs/world.md) and nothing else. All weights: {size / 1e6:.1f} MB.",
            "",
            f"Trained from nothing by `make recipe` (docs/recipe.md) on {facts['device']} in {total:.0f} minutes, commit",
            f"{facts['commit']}, {facts['date']}, {facts['versions']}.",
            "",
            "| stage | steps | batch | seed | data seed | minutes | last loss |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"## Scores on {len(ours['prompts'])} captions of scenes that it was not trained on, seeds {facts['seeds']}",
            "",
            "In percent with 95 % bootstrap intervals over prompts; the last column is the share of key blocks that is read.",
            "",
            *table({"dense, before Light Forcing": ("dense", dense), **{name: (name, ours) for name in ours["policies"]}}),
            "",
        ]
    )


def stage_row(stage: Stage, seconds: float) -> str:
    if stage.words[0] != "train":
        return f"| `lf-jax {' '.join(stage.words)}` | | | | | {seconds / 60:.1f} | |"
    plan = json.loads((stage.folder / "train.json").read_text())
    last = json.loads((stage.folder / "metrics.jsonl").read_text().splitlines()[-1])
    losses = ", ".join(f"{name.removesuffix('/loss')} {value:.4f}" for name, value in last.items() if name.endswith("/loss"))
    numbers = (plan[name] for name in ("steps", "batch", "seed", "data.seed"))
    return f"| {stage.name} | {' | '.join(map(str, numbers))} | {seconds / 60:.1f} | {losses} |"


def table(policies: dict[str, tuple[str, dict]]) -> list[str]:
    """The evaluator's scores, a row a policy: label -> (policy, results it is in)."""
    summaries = {label: results["summary"][policy]["scores"] for label, (policy, results) in policies.items()}
    names = list(dict.fromkeys(name for scores in summaries.values() for name in scores if name.startswith("world.")))
    lines = [f"| | {' | '.join(name.removeprefix('world.') for name in names)} | read |", "|---" * (len(names) + 2) + "|"]
    for label, (policy, results) in policies.items():
        density = results["policies"][policy]["planned_density"]
        cells = [cell(summaries[label].get(name)) for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} | {100 * density:.0f} % |")
    return lines


def cell(score: dict | None) -> str:
    if score is None or score["mean"] is None:
        return ""
    return "{:.1f} ({:.1f} .. {:.1f})".format(*(100 * score[name] for name in ("mean", "low", "high")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="stop after so many, at a checkpoint; the default is to go on to the end")
    parser.add_argument("--until", choices=[stage.name for stage in STAGES], help="the last stage to run")
    given = parser.parse_args()
    names = [stage.name for stage in STAGES]
    last = len(STAGES) if given.until is None else names.index(given.until) + 1
    code = run(STAGES[:last], given.minutes)
    if code == 0 and last == len(STAGES):
        assemble()
        print(MODEL)
    return code


if __name__ == "__main__":
    sys.exit(main())
