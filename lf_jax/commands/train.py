"""`lf-jax train`."""

import dataclasses
import pathlib
import sys
from typing import Annotated, Any

import tyro

from lf_jax import train
from lf_jax.commands.console import note, progress, show_config
from lf_jax.config import check
from lf_jax.train.metrics import interruptible

UNFINISHED = 75  # exit code of a slice that leaves work to be done: EX_TEMPFAIL of sysexits.h, "try again"
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model: one stage, whose result is the model folder OUTPUT/model.

    The config is a Python file that ends in TRAIN = lf_jax.train.Train(...). Any field of it can be given as an option, for
    example --steps 2000 --optimizers.model.learning-rate 1e-4 --video.num-frames 81; with --config, --help lists them.

    The same command again goes on from the last checkpoint. Exit code 0: the stage is finished. 75: its minutes are over and
    there is more to do. 130: it was interrupted (Ctrl-C or SIGTERM), and a checkpoint was saved.

    Example: lf-jax train --config my_stage.py --output runs/my_stage --minutes 10
    """

    config: str  # preset or Python file with the training run
    output: pathlib.Path  # folder of the run: train.json, metrics.jsonl, checkpoints, in the end model
    minutes: float | None = None  # stop with a checkpoint after so many; the default is to go on to the last step
    settings: Annotated[Any, tyro.conf.arg(name="")] = None

    @staticmethod
    def defaults(config: str | None) -> train.Train | None:
        """What options override."""
        return None if config is None else train.load(config)

    def run(self) -> int:
        plan = self.settings
        check(self.minutes is None or self.minutes > 0, f"--minutes {self.minutes} must be positive")
        parts = ("objective", "data", "optimizers", "init", "lora", "mesh")
        rest = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in (*parts, "config")}
        facts = {name: getattr(plan, name) for name in parts}
        show_config(plan.config, output=self.output, **facts, run=" ".join(f"{k}={v}" for k, v in rest.items()))
        with interruptible(note) as interrupted, progress() as bar:
            task = bar.add_task("steps", total=plan.steps)

            def report(step: int, line: dict[str, Any] | None) -> None:
                bar.update(task, completed=step)
                if line is not None:
                    bar.update(task, description=brief(line))
                    if not sys.stderr.isatty():
                        note(f"step {step}/{plan.steps}  {brief(line)}")

            outcome = train.run(
                plan, self.output, minutes=self.minutes, stop=interrupted, note=bar.console.print, report=report
            )
            stopped = interrupted()
        if outcome.finished:
            print(self.output / "model")
            return 0
        note(f"stopped after step {outcome.step} of {plan.steps}; the same command goes on from there")
        return INTERRUPTED if stopped else UNFINISHED


def brief(line: dict[str, Any]) -> str:
    """A line of metrics in a few words."""
    shown = [name for last in ("loss", "grad_norm") for name in line if name.endswith(f"/{last}")]
    return ", ".join([*(f"{name} {line[name]:.4g}" for name in shown), f"{line['samples_per_second']:.3g} samples/s"])
