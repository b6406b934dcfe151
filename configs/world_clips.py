"""Training of `world`, stage 4: the same networks on the first 6 latent frames of videos, 21 frames, where things move."""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import Latents
from lf_jax.train.objectives import Flow

TRAIN = Train(
    objective=Flow(train_text=True, shift=8.0, given=0.5),
    data=Latents("runs/world_latents", frames=6, seed=4),
    optimizers={
        "model": Optimizer(
            learning_rate=1e-3, betas=(0.9, 0.99), clip=1.0, warmup=100, decay="cosine", final=0.5, ema=0.998, ema_start=300
        )
    },
    config=presets.load("world_teacher"),
    init={"model": "runs/world_stills/model"},
    steps=4000,
    batch=192,
    save_every=500,
    log_every=20,
)
