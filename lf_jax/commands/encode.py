"""`lf-jax encode`."""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from lf_jax import loading, pipeline, text
from lf_jax.commands import outputs
from lf_jax.commands.console import note, progress, show_config
from lf_jax.commands.prompts import read_prompts
from lf_jax.config import Config, check


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encode prompts once into a file, so that sampling needs no text encoder.

    The encoder is the largest part of a model (11 GB); `lf-jax sample --embeddings FILE` and `lf-jax stream --embeddings
    FILE` run without it. With guidance the negative prompt is encoded too.

    Example: lf-jax encode --model DIR --prompts prompts.txt --output prompts.safetensors
    """

    model: str  # converted folder, or a preset for random weights
    output: pathlib.Path  # the file to write
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    prompt: tuple[str, ...] = ()  # one or more prompts
    prompts: pathlib.Path | None = None  # file with one prompt a line
    weights_seed: int | None = None  # of a preset's random weights, 0 if not given
    overwrite: bool = False  # replace the file if it exists
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        show_config(self.settings, weights=self.model, output=self.output)
        prompts = tuple(dict.fromkeys(pipeline.texts(read_prompts(self.prompt, self.prompts), self.settings)))
        check(self.overwrite or not self.output.exists(), f"--output {self.output} exists; --overwrite replaces it")
        outputs.check_writable("--output", self.output.absolute().parent)
        source = loading.find(self.model, self.settings, self.weights_seed)
        note("loading the text encoder")
        with progress() as bar:
            task = bar.add_task("prompts", total=len(prompts))
            encoded = pipeline.encode_prompts(source, prompts, lambda: bar.advance(task))
        text.save_embeddings(self.output, encoded)
        print(self.output)
