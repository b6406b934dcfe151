"""`lf-jax warmup`."""

import dataclasses
import json
import time
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.table import Table

from lf_jax import loading, pipeline, programs
from lf_jax.commands.console import show_config
from lf_jax.config import Config, check
from lf_jax.inputs import check_runs


@dataclasses.dataclass(frozen=True)
class Warmup:
    """Compile everything that a video takes, so that later commands with the same settings start without compiling.

    The programs go into the persistent compilation cache that all commands use. They are compiled from shapes alone: no
    weights are loaded.

    Example: lf-jax warmup --model DIR --num-frames 81
    """

    model: str  # converted folder, or a preset for random weights
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    vae: str | None = None  # folder with another autoencoder; of a preset with random weights also wan, light or tiny
    batch: int = 1  # videos made together
    num_frames: int | None = None  # pixel frames; short for --video.num-frames
    text: bool = True  # the text encoder's program, too
    json: bool = False  # machine-readable
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = pipeline.with_frames(self.settings, self.num_frames)
        check(self.batch > 0, f"--batch {self.batch} must be positive")
        show_config(config, model=self.model, cache=jax.config.jax_compilation_cache_dir)
        check_runs(config)
        source, start = loading.find(self.model, config, vae=self.vae), time.perf_counter()
        components = ("dit", "vae", "text") if self.text else ("dit", "vae")
        wanted = {**programs.of_videos(config, self.batch), **programs.of_weights(source, *components)}
        if self.text:
            wanted |= programs.of_text(config.text)
        with programs.ahead(wanted) as built:
            pass
        found = {name: future.result() for name, future in built.items()}
        seconds = time.perf_counter() - start
        if self.json:
            report = {"seconds": seconds, "programs": {name: dataclasses.asdict(program) for name, program in found.items()}}
            print(json.dumps(report, indent=2))
            return
        table = Table("program", "seconds", "")
        table.columns[1].justify = "right"
        for name, program in found.items():
            table.add_row(name, f"{program.seconds:.1f}", "was there" if program.cached else "compiled")
        Console(highlight=False).print(table)
        print(f"{len(found)} programs in {seconds:.1f} s")
