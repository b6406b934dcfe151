"""Training of `world`, stage 7: the causal network learns to make a chunk in four steps from videos of its own, densely."""

import dataclasses

from lf_jax import presets
from lf_jax.config import Sparsity
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import World
from lf_jax.train.objectives import Distillation

TRAIN = Train(
    objective=Distillation(guidance_scale=3.0),
    data=World(video=False, seed=2),
    optimizers={
        "generator": Optimizer(learning_rate=5e-5, clip=1.0, warmup=100, ema=0.98, ema_start=200),
        "critic": Optimizer(learning_rate=1e-4, clip=1.0),
    },
    config=dataclasses.replace(presets.load("world"), sparsity=Sparsity()),
    init={"generator": "runs/world_causal/model", "teacher": "runs/world_teacher/model"},
    steps=2000,
    batch=32,
    save_every=350,
    log_every=20,
)
