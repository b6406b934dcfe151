"""Training of `world`, stage 8: the same once more under Light Forcing, with four in five key blocks left out on average."""

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import World
from lf_jax.train.objectives import Distillation

TRAIN = Train(
    objective=Distillation(guidance_scale=3.0),
    data=World(video=False, seed=3),
    optimizers={
        # Slow at first: the critic begins as the teacher, and its belief is worth little until it has seen these videos.
        "generator": Optimizer(learning_rate=3e-5, clip=1.0, warmup=200, ema=0.98, ema_start=200),
        "critic": Optimizer(learning_rate=1e-4, clip=1.0),
    },
    config=presets.load("world"),
    init={"generator": "runs/world_dmd/model", "teacher": "runs/world_teacher/model"},
    steps=1000,
    batch=32,
    save_every=350,
    log_every=20,
)
