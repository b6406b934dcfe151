"""Training of `world`, stage 3: the transformer and the text encoder, from nothing, on single frames.

What a caption says of colours, shapes, sizes and backgrounds is in a picture, and twenty of them cost what a video does.
"""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import Latents
from lf_jax.train.objectives import Flow

TRAIN = Train(
    objective=Flow(train_text=True),
    data=Latents("runs/world_images", frames=1, seed=5),
    optimizers={
        "model": Optimizer(
            learning_rate=1e-3, betas=(0.9, 0.99), clip=1.0, warmup=300, decay="cosine", final=0.5, ema=0.998, ema_start=300
        )
    },
    config=presets.load("world_teacher"),
    init={"model": "runs/world_vae/model"},
    steps=3000,
    batch=512,
    save_every=500,
    log_every=20,
)
