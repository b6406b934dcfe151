"""Training of `world`, stage 1: the autoencoder, on clips of 5 frames: a batch holds four times as many scenes as one of 17.

Weighs squared errors most, because objects are small: the absolute error of a clip without them is small too, and 1900 steps
that began with it, on clips of 17 frames, left them grey.
"""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import World
from lf_jax.train.objectives import Autoencoder

TRAIN = Train(
    objective=Autoencoder(l1=0.5, l2=2.0, temporal=0.25),
    data=World(frames=5),
    optimizers={
        "model": Optimizer(
            learning_rate=5e-4, betas=(0.9, 0.99), clip=1.0, warmup=200, decay="cosine", final=0.2, ema=0.998, ema_start=200
        )
    },
    config=presets.load("world"),
    steps=2500,
    batch=32,
    save_every=500,
    log_every=20,
)
