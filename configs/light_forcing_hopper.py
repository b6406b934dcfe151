"""Light Forcing 1.3B with the blocks of 128 and the lower sparsity that its release uses on Hopper GPUs, 512x768."""

from lf_jax.config import Config, Sparsity, Video

CONFIG = Config(
    sparsity=Sparsity(policy="light_forcing", target=0.8, base=0.9, block_q=128, block_k=128),
    video=Video(height=512, width=768),
)
