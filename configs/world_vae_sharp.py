"""Training of `world`, stage 3: the autoencoder once more, with an eye to the objects, which were blots of the right colour.

Clips of 41 frames: twice as many scenes a batch as of whole videos.
"""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import World
from lf_jax.train.objectives import Autoencoder

TRAIN = Train(
    objective=Autoencoder(l2=2.0, temporal=0.25, focus=3.0),
    data=World(frames=41, seed=4),
    optimizers={
        "model": Optimizer(
            learning_rate=4e-4, betas=(0.9, 0.99), clip=1.0, warmup=100, decay="cosine", final=0.02, ema=0.995, ema_start=100
        )
    },
    config=presets.load("world"),
    init={"model": "runs/world_vae/model"},
    steps=3500,
    batch=4,
    save_every=500,
    log_every=20,
)
