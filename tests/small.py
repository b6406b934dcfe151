"""The smallest model that takes every path, made once a process: what takes time in these tests is compilation."""

import dataclasses
import functools
import pathlib

import lf_jax
from lf_jax import checkpoint, presets
from lf_jax.config import Config, Vae, Video

VAE = Vae(kind="tiny", widths=(8, 8, 8, 8), temporal=(True, True, False), dtype="float32")
CONFIG: Config = dataclasses.replace(presets.load("tiny"), vae=VAE, video=Video(height=32, width=48, num_frames=33))


@functools.cache
def pipe() -> lf_jax.Pipeline:
    return lf_jax.load("tiny", CONFIG)


def save(folder: pathlib.Path) -> pathlib.Path:
    """The model of `pipe` as a converted folder."""
    encoder, tokenizer = pipe().source.text()
    for name, part, module in (("dit", CONFIG.model, pipe().model), ("vae", VAE, pipe().vae), ("text", CONFIG.text, encoder)):
        checkpoint.save_component(folder, name, part, module)
    (folder / "text" / "spiece.model").write_bytes(tokenizer.model)
    checkpoint.save_settings(folder, CONFIG)
    return folder
