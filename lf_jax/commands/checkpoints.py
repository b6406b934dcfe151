"""`lf-jax convert`, `lf-jax quantise` and `lf-jax export`."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Annotated, Literal

import tyro
from rich.progress import Progress

import convert
from lf_jax import checkpoint
from lf_jax.commands.console import byte_progress, note, show_config
from lf_jax.config import check

Family = Literal[tuple(convert.FAMILIES)]  # type: ignore[valid-type]
FAMILY = tyro.conf.arg(
    metavar="FAMILY", help="\n\n".join(f"{name}: {family.about}" for name, family in convert.FAMILIES.items())
)
Source = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="SOURCE")]
Target = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="TARGET")]
Dtype = Literal["keep", "bfloat16", "float32", "float16"]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a PyTorch checkpoint into a folder that the other commands load, without torch from then on.

    Components are added to TARGET one by one: transformer, autoencoder and text encoder often come in separate files. All
    names and shapes are checked before the first byte is written, and every fault is reported. A component appears when
    it is complete: an interrupted conversion leaves nothing behind.

    Example: lf-jax convert self_forcing self_forcing_dmd.pt DIR
             lf-jax convert wan_vae Wan2.1_VAE.pth DIR
             lf-jax convert umt5 models_t5_umt5-xxl-enc-bf16.pth DIR
    """

    family: Annotated[tyro.conf.Positional[Family], FAMILY]
    source: Source  # file, index of files, or folder
    target: Target  # converted folder; made if it is absent
    preset: str | None = None  # preset or Python file that the source must fit and whose settings the folder takes
    ema: bool = False  # take the averaged weights of a training checkpoint
    dtype: Dtype = "keep"  # of the tensors in the folder; keep: as they are in the source
    format: Literal["safetensors", "orbax"] = "safetensors"
    lora: pathlib.Path | None = None  # LoRA file to merge into the transformer
    lora_scale: float = 1.0  # factor on the LoRA
    overwrite: bool = False  # replace components that the folder has already

    def run(self) -> None:
        with byte_progress() as bar:
            written = convert.convert(
                self.family,
                self.source,
                self.target,
                ema=self.ema,
                dtype=self.dtype,
                preset=self.preset,
                format=self.format,
                lora=self.lora,
                lora_scale=self.lora_scale,
                overwrite=self.overwrite,
                progress=follow(bar),
            )
        if "dit" in checkpoint.components(self.target):
            show_config(checkpoint.load_config(self.target), source=self.source, target=self.target)
        missing = [name for name in checkpoint.COMPONENTS if name not in checkpoint.components(self.target)]
        if missing:
            note(f"{self.target} has no {' and no '.join(missing)} yet")
        for path in written.values():
            print(path)


@dataclasses.dataclass(frozen=True)
class Quantise:
    """Store the transformer of a converted folder with the linear layers of its blocks in float8 (e4m3).

    The numbers are those of LightX2V's files: one scale for every output channel. Without this command,
    `--model.linears fp8` does the same whenever a folder is loaded.

    Example: lf-jax quantise DIR DIR-fp8
    """

    source: Source  # converted folder
    target: Target  # folder for the transformer and its settings; made if it is absent
    overwrite: bool = False  # replace the transformer that TARGET has already; TARGET may be SOURCE

    def run(self) -> None:
        there = self.target / "dit"
        check(self.overwrite or not there.exists(), f"{there} is there already; --overwrite replaces it")
        settings, notes = checkpoint.load_config(self.source), checkpoint.load_notes(self.source, "dit")
        part, model = checkpoint.load_component(self.source, "dit", linears="fp8")
        print(checkpoint.save_component(self.target, "dit", part, model, family=notes["family"]))
        checkpoint.save_settings(self.target, settings)


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a component of a converted folder back as a PyTorch checkpoint, with the names and layout of a family.

    The inverse of `lf-jax convert`: tensor for tensor the same bits, unless --dtype asks for other ones.

    Example: lf-jax export self_forcing DIR self_forcing.pt
    """

    family: Annotated[tyro.conf.Positional[Family], FAMILY]
    source: Source  # converted folder
    target: Target  # file to write: .safetensors, or .pt and .pth, which need torch
    component: Literal["dit", "vae", "text"] | None = None  # which one, where the family has several
    dtype: Dtype = "keep"  # of the tensors in the file
    overwrite: bool = False  # replace the file if it exists

    def run(self) -> None:
        has = [part.module.COMPONENT for part in convert.FAMILIES[self.family].parts]
        named = self.component is not None
        check(named or len(has) == 1, f"family {self.family} has {', '.join(has)}: name one with --component")
        with byte_progress() as bar:
            component = self.component or has[0]
            print(
                convert.export(
                    self.source,
                    component,
                    self.family,
                    self.target,
                    dtype=self.dtype,
                    overwrite=self.overwrite,
                    progress=follow(bar),
                )
            )


def follow(bar: Progress) -> Callable[[str, int, int], None]:
    """A callback that moves `bar`: what is written now, bytes done, bytes in all."""
    task = bar.add_task("reading", total=None)
    return lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
