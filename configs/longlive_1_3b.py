"""LongLive 1.3B: 120 latent frames through a window of 12, the first 3 of the video kept for ever, 480x832."""

from lf_jax.config import Cache, Config, Video

CONFIG = Config(cache=Cache(window=12, sink=3), video=Video(num_frames=477))
