"""Training: a config, an objective and data to a model folder (`loop`), in slices that can be killed and resumed."""

from lf_jax.train.config import Lora, Mesh, Optimizer, Train, load
from lf_jax.train.loop import Outcome, run

__all__ = ["Lora", "Mesh", "Optimizer", "Outcome", "Train", "load", "run"]
