"""Every code path in seconds on a CPU: two layers, small VAE and text encoder, Light Forcing's sparse attention."""

from lf_jax.config import Config, Model, Sparsity, Text, Vae, Video

CONFIG = Config(
    model=Model(dim=64, ffn_dim=128, heads=2, layers=2, freq_dim=32, text_dim=32, dtype="float32"),
    vae=Vae(base=8, res_blocks=1, dtype="float32"),
    text=Text(vocab=512, dim=32, ffn_dim=64, heads=2, head_dim=16, layers=2, dtype="float32"),
    sparsity=Sparsity(policy="light_forcing", target=0.6, base=0.8, block_q=8, block_k=8),
    video=Video(height=64, width=96),
)
