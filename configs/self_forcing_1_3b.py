"""Self-Forcing 1.3B: four steps a chunk, dense attention to all 21 latent frames, 480x832."""

from lf_jax.config import Config

CONFIG = Config()
