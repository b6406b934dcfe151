"""The smallest model that takes every path: what takes time in these tests is compilation."""

import dataclasses

from lf_jax import presets
from lf_jax.config import Config, Vae, Video

VAE = Vae(kind="tiny", widths=(8, 8, 8, 8), temporal=(True, True, False), dtype="float32")
CONFIG: Config = dataclasses.replace(presets.load("tiny"), vae=VAE, video=Video(height=32, width=48, num_frames=33))
