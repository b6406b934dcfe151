"""Training of `world`, stage 2: the autoencoder on clips of 41 frames. Trained on 5 frames only, it loses what follows them."""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import World
from lf_jax.train.objectives import Autoencoder

TRAIN = Train(
    objective=Autoencoder(l1=0.5, l2=2.0, temporal=0.25, focus=3.0, kl=3e-3),
    data=World(frames=41, seed=1),
    optimizers={
        "model": Optimizer(
            learning_rate=4e-4, betas=(0.9, 0.99), clip=1.0, warmup=100, decay="cosine", final=0.02, ema=0.995, ema_start=100
        )
    },
    config=presets.load("world"),
    init={"model": "runs/world_vae_short/model"},
    steps=3200,
    batch=4,
    save_every=800,
    log_every=20,
)
