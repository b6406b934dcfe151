"""Light Forcing 1.3B, long video: 63 latent frames through a window of 12 with positions relative to it, 512x768."""

from lf_jax.config import Cache, Config, Sparsity, Video

CONFIG = Config(
    cache=Cache(window=12, sink=1, positions="relative"),
    sparsity=Sparsity(policy="light_forcing", target=0.85, base=0.95, keep_frames=3, sink_frames=1, near_frames=1),
    video=Video(height=512, width=768, num_frames=249),
)
