"""Training of Light Forcing 1.3B: Self-Forcing's distillation of Wan2.1 1.3B, one video at a time, with the attention sparse.

Learning rates, average and guidance are Self-Forcing's, which had 64 videos an update: --batch 64 --accumulate 64. Its teacher
and Light Forcing's is the 14B model: --init.teacher FOLDER, where there is memory for it.
"""

import dataclasses

from lf_jax import presets
from lf_jax.train import Optimizer, Train
from lf_jax.train.data import Prompts
from lf_jax.train.objectives import Distillation

STUDENT, TEACHER = presets.load("light_forcing_1_3b"), presets.load("wan_1_3b")

TRAIN = Train(
    objective=Distillation(remat=True),
    data=Prompts(path="prompts.txt", embeddings="prompts.safetensors"),
    optimizers={
        "generator": Optimizer(learning_rate=2e-6, ema=0.99, ema_start=200),
        "critic": Optimizer(learning_rate=4e-7),
    },
    config=dataclasses.replace(
        STUDENT, video=dataclasses.replace(STUDENT.video, negative_prompt=TEACHER.video.negative_prompt)
    ),
    init={"generator": "models/self_forcing", "teacher": "models/wan"},
    steps=600,
    batch=1,
    save_every=100,
)
