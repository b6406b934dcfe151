"""Training of `world`, stage 4: the bidirectional teacher and the text encoder, on the latents of stage 3's autoencoder."""

import dataclasses

from lf_jax import presets
from lf_jax.config import Rollout, Sparsity
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import Latents
from lf_jax.train.objectives import Flow

WORLD = presets.load("world")
SAMPLING = Rollout(chunk_frames=21, sampler="unipc", num_inference_steps=30, guidance_scale=3.0, shift=WORLD.rollout.shift)

TRAIN = Train(
    objective=Flow(train_text=True),
    data=Latents("runs/world_latents"),
    optimizers={
        "model": Optimizer(
            learning_rate=1e-3, betas=(0.9, 0.99), clip=1.0, warmup=300, decay="cosine", final=0.05, ema=0.999, ema_start=500
        )
    },
    config=dataclasses.replace(WORLD, sparsity=Sparsity(), rollout=SAMPLING),
    init={"model": "runs/world_vae_sharp/model"},
    steps=4500,
    batch=64,
    save_every=500,
    log_every=20,
)
