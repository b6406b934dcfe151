"""Light Forcing 1.3B, short video: 88 % of the key blocks left out, growing towards 98 %, 512x768."""

from lf_jax.config import Config, Sparsity, Video

CONFIG = Config(
    sparsity=Sparsity(policy="light_forcing", target=0.88, base=0.98, keep_frames=6, sink_frames=1, near_frames=2),
    video=Video(height=512, width=768),
)
