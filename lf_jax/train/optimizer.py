"""AdamW by name of parameter: what is clipped, averaged and decayed, and how fast."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from lf_jax.arrays import Array, Float, Int
from lf_jax.train.config import Optimizer

UNDECAYED = ("scale", "bias", "modulation", "position_bias")  # last word of a parameter's name


def direction(settings: Optimizer) -> optax.GradientTransformation:
    """What is subtracted from the parameters, times the learning rate: AdamW (Loshchilov & Hutter) on clipped gradients.

    Works on dictionaries of parameters by dotted name.
    """
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    adam = optax.scale_by_adam(*settings.betas, eps=settings.eps)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decayed) if settings.weight_decay else optax.identity()
    return optax.chain(clip, adam, decay)


def decayed(parameters: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters weight decay is for."""
    return {name: name.rpartition(".")[2] not in UNDECAYED for name in parameters}


def learning_rate(settings: Optimizer, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """Of the step counted from 0: linear to full over the warmup, then the decay, which ends with the run."""
    rise = jnp.minimum((step + 1) / settings.warmup, 1.0) if settings.warmup else 1.0
    done = jnp.clip((step - settings.warmup) / max(steps - settings.warmup, 1), 0.0, 1.0)
    left = {"constant": jnp.float32(1), "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}[settings.decay]
    return jnp.asarray(settings.learning_rate * rise * (settings.final + (1 - settings.final) * left), jnp.float32)


def averaged(settings: Optimizer, average: Any, parameters: Any, step: Int[Array, ""]) -> Any:
    """The average after an update; before `ema_start` it is the parameters themselves."""
    if average is None:
        return None
    keep = jnp.where(step < settings.ema_start, 0.0, settings.ema)
    return {name: keep * average[name] + (1 - keep) * parameters[name] for name in parameters}
