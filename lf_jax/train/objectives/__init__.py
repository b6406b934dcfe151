"""What networks are trained for: losses and their gradients, independent of optimizers, data and devices."""

from lf_jax.train.objectives.autoencoder import Autoencoder, latent_statistics
from lf_jax.train.objectives.distillation import Distillation
from lf_jax.train.objectives.flow_matching import Flow, TeacherForcing
from lf_jax.train.objectives.objective import Load, Networks, Objective
from lf_jax.train.objectives.ode_pairs import OdePairs

__all__ = [
    "Autoencoder",
    "Distillation",
    "Flow",
    "Load",
    "Networks",
    "Objective",
    "OdePairs",
    "TeacherForcing",
    "latent_statistics",
]
