"""The small model that ships with the package: videos of the procedural world (docs/world.md), 128x192, 5 s.

11.4 million weights, 23 MB in bfloat16. A frame is 8 x 12 = 96 tokens, 6 key blocks. How it is trained: docs/recipe.md.
"""

from lf_jax.config import Config, Model, Rollout, Sparsity, Text, Vae, Video

CONFIG = Config(
    model=Model(dim=256, ffn_dim=1024, heads=4, layers=6, text_dim=128, text_len=64),
    vae=Vae(base=16, mean=(0.0,) * 16, std=(1.0,) * 16),  # measured when the autoencoder is trained
    text=Text(vocab=512, dim=128, ffn_dim=320, heads=4, head_dim=32, layers=4, length=64),
    sparsity=Sparsity(policy="light_forcing", target=0.8, base=0.9, block_q=32, block_k=16),
    rollout=Rollout(shift=3.0),
    video=Video(height=128, width=192),
)
