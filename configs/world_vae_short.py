"""Training of `world`, stage 1: the autoencoder, on clips of 5 frames: a batch holds four times as many scenes as one of 17.

Weighs squared errors most, and those of coloured pixels, because objects are small: the absolute error of a clip without them
is small too, and 1900 steps that began with it, on clips of 17 frames, left them grey. The divergence keeps the latents'
distribution as wide as pictures bear, so that the decoder takes latents that are a little wrong, as generated ones are.
"""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import World
from lf_jax.train.objectives import Autoencoder

TRAIN = Train(
    objective=Autoencoder(l1=0.5, l2=2.0, temporal=0.25, focus=3.0, kl=3e-3),
    data=World(frames=5),
    optimizers={
        "model": Optimizer(
            learning_rate=5e-4, betas=(0.9, 0.99), clip=1.0, warmup=200, decay="cosine", final=0.4, ema=0.998, ema_start=200
        )
    },
    config=presets.load("world"),
    steps=2200,
    batch=32,
    save_every=550,
    log_every=20,
)
