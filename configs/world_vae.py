"""Training of `world`, stage 1: the autoencoder, on clips of 17 frames that are rendered on the way."""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import World
from lf_jax.train.objectives import Autoencoder

TRAIN = Train(
    objective=Autoencoder(),
    data=World(frames=17),
    optimizers={
        "model": Optimizer(
            learning_rate=1e-3, betas=(0.9, 0.99), clip=1.0, warmup=200, decay="cosine", final=0.02, ema=0.998, ema_start=200
        )
    },
    config=presets.load("world"),
    steps=3000,
    batch=8,
    save_every=500,
    log_every=20,
)
