"""Training of `world`, stage 6: the teacher learns to read clean chunks of the past only (teacher forcing)."""

import dataclasses

from lf_jax import presets
from lf_jax.config import Sparsity
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import Latents
from lf_jax.train.objectives import TeacherForcing

TRAIN = Train(
    objective=TeacherForcing(),
    data=Latents("runs/world_latents", seed=1),
    optimizers={
        "model": Optimizer(
            learning_rate=5e-4, betas=(0.9, 0.99), clip=1.0, warmup=100, decay="cosine", final=0.05, ema=0.995, ema_start=200
        )
    },
    config=dataclasses.replace(presets.load("world"), sparsity=Sparsity()),
    init={"model": "runs/world_teacher/model"},
    steps=1200,
    batch=64,
    save_every=200,
    log_every=20,
)
