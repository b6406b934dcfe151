"""`lf-jax plan`."""

import dataclasses
import json
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from lf_jax import pipeline, plan
from lf_jax.commands.console import show_config
from lf_jax.config import Config, check

UNIT = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Show the memory that a run will take, before anything is allocated or loaded.

    Sizes of arrays are exact, those of activations are estimates; --compile asks the compiler instead. The text encoder is
    gone when the rollout begins, so the peak is the larger of the two stages.

    Example: lf-jax plan --config light_forcing_long_1_3b --num-frames 249 --memory 24
    """

    model: str | None = None  # converted folder or preset whose settings are meant
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    batch: int = 1  # videos made together
    num_frames: int | None = None  # pixel frames; short for --video.num-frames
    memory: float | None = None  # GiB of the device; the default is what this machine's device reports
    compile: bool = False  # compile the chunk step and the decoder for exact activations; takes minutes at full size
    json: bool = False  # machine-readable, in bytes
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = pipeline.with_frames(self.settings, self.num_frames)
        check(self.batch > 0, f"--batch {self.batch} must be positive")
        budget = plan.memory(config, self.batch, compiled=self.compile)
        memory = plan.device_memory() if self.memory is None else int(self.memory * UNIT)
        if self.json:
            print(json.dumps(as_json(budget, memory), indent=2))
            return
        show_config(config, batch=self.batch)
        Console().print(as_table(budget))
        frame = f"; each latent frame in the cache takes {budget.frame_bytes / 2**20:.0f} MiB" if budget.cache_bytes else ""
        print(f"peak {budget.peak / UNIT:.2f} GiB{frame}")
        if memory is not None:
            verdict = "fits" if budget.peak <= memory else "does NOT fit"
            window = f"; the cache could hold {budget.window_that_fits(memory)} latent frames" if budget.cache_bytes else ""
            print(f"{verdict} into {memory / UNIT:.1f} GiB ({(memory - budget.peak) / UNIT:+.2f} GiB){window}")


def as_table(budget: plan.Budget) -> Table:
    table = Table("stage", "what", "GiB", "")
    table.columns[2].justify = "right"
    for when in ("encoding", "rollout"):
        for item in budget.items:
            if item.when == when:
                table.add_row(when, item.name, f"{'' if item.exact else '~'}{item.bytes / UNIT:.3f}", item.detail)
        table.add_row(when, "total", f"{budget.total(when) / UNIT:.3f}", "", end_section=True)
    return table


def as_json(budget: plan.Budget, memory: int | None) -> dict:
    return {
        "items": [dataclasses.asdict(item) for item in budget.items],
        "total": {when: budget.total(when) for when in ("encoding", "rollout")},
        "peak": budget.peak,
        "frame_bytes": budget.frame_bytes,
        "memory": memory,
    }
