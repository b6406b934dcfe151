"""Training of `world`, stage 5: the bidirectional teacher and the text encoder, on whole videos."""

import dataclasses

from lf_jax import presets
from lf_jax.config import Rollout, Sparsity
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import Latents
from lf_jax.train.objectives import Flow

WORLD = presets.load("world")
SAMPLING = Rollout(chunk_frames=21, sampler="unipc", num_inference_steps=30, guidance_scale=3.0, shift=WORLD.rollout.shift)

TRAIN = Train(
    objective=Flow(train_text=True, shift=5.0, given=0.25),
    data=Latents("runs/world_latents"),
    optimizers={
        "model": Optimizer(
            learning_rate=8e-4, betas=(0.9, 0.99), clip=1.0, warmup=100, decay="cosine", final=0.03, ema=0.998, ema_start=300
        )
    },
    config=dataclasses.replace(WORLD, sparsity=Sparsity(), rollout=SAMPLING),
    init={"model": "runs/world_clips/model"},
    steps=3500,
    batch=64,
    save_every=500,
    log_every=20,
)
