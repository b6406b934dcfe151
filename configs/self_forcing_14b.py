"""Self-Forcing 14B: the few-step causal student at 14B size, dense attention to all 21 latent frames, 480x832."""

from lf_jax.config import Config, Model

CONFIG = Config(model=Model(dim=5120, ffn_dim=13824, heads=40, layers=40))
