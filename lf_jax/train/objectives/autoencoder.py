"""The autoencoder: pixels through a distribution over latents and back."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import vae
from lf_jax.arrays import Array, Float, Key
from lf_jax.config import Config, check, dtype_of
from lf_jax.train.objectives.objective import Load, Networks, differentiate, draw
from lf_jax.vae.wan import WanVae


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Trains Wan's autoencoder on whole clips of 4n + 1 frames, "video" of the batch. The loss is the weighted sum of

        l1, l2      mean |error|, mean error^2 of the pixels
        temporal    mean |error| of the difference between a frame and the next: against flicker
        edges       mean |error| of the differences between neighbouring pixels of a row and of a column: against blur, in
                    place of a perceptual loss, which would need a pretrained network
        kl          divergence of the latents' distribution from the unit normal, mean over the numbers of a latent

    With `focus` every pixel's error counts 1 + focus * saturation times in all terms but the last, of the video or of what
    is made of it, whichever has more colour: small coloured objects before a pale background decide little otherwise, and
    come out as blots of their colour. A squared error counts the square of it.

    Latents are not normalised here. What normalises them is measured at the end (`finish`).
    """

    l1: float = 1.0
    l2: float = 0.0
    temporal: float = 0.5
    edges: float = 0.5
    kl: float = 1e-5
    focus: float = 0.0
    remat: bool = False  # keep what lies between encoder and decoder only, and compute each again in the gradient
    measured: int = 16  # batches over which the latents' mean and standard deviation are taken at the end

    def __post_init__(self):
        check(self.measured > 0, f"{self.measured=} must be positive")
        for name in ("l1", "l2", "temporal", "edges", "kl", "focus"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")

    def build(self, config: Config, load: Load, key: Key[Array, ""]) -> Networks:
        """
        Raises:
            ValueError: for another autoencoder than Wan's: the tiny one is distilled from it, and has no variances.
        """
        check(config.vae.kind == "wan", f"{config.vae.kind=} cannot be trained here: expected 'wan'")
        return Networks({"model": {"vae": load("model", "vae") or draw(config.vae, key)}}, {})

    def updates(self, step: int) -> tuple[str, ...]:
        return ("model",)

    def gradients(
        self,
        name: str,
        trained: dict[str, Any],
        frozen: dict[str, Any],
        batch: dict[str, Array],
        key: Key[Array, ""],
        config: Config,
    ) -> tuple[Any, dict[str, Array]]:
        check("video" in batch, f"batch has {sorted(batch)}, expected 'video'")
        return differentiate(self.loss, trained[name], batch["video"], key)

    def finish(
        self, config: Config, model: dict[str, Any], frozen: dict[str, Any], batch: Callable[[int], dict[str, Array]]
    ) -> Config:
        """`config` with the latents' statistics over the batches 0 to `measured`."""
        mean, std = latent_statistics(model["vae"], (batch(i)["video"] for i in range(self.measured)))
        return dataclasses.replace(config, vae=dataclasses.replace(config.vae, mean=mean, std=std))

    def loss(
        self, model: dict[str, Any], video: Float[Array, "b f p q 3"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        keep = jax.checkpoint if self.remat else lambda run: run
        mean, log_variance = keep(posterior)(model["vae"], video)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        made = keep(reconstruct)(model["vae"], latents)
        video = video.astype(jnp.float32)
        colourful = jnp.maximum(_saturation(video), jax.lax.stop_gradient(_saturation(made)))
        error = (made - video) * (1 + self.focus * colourful)
        terms = {
            "l1": jnp.mean(jnp.abs(error)),
            "l2": jnp.mean(jnp.square(error)),
            "temporal": _mean_difference(error, axis=1),
            "edges": _mean_difference(error, axis=2) + _mean_difference(error, axis=3),
            "kl": 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance),
        }
        return sum(getattr(self, name) * term for name, term in terms.items()), terms


def posterior(model: WanVae, video: Float[Array, "b f p q 3"]) -> tuple[Float[Array, "b g h w c"], Float[Array, "b g h w c"]]:
    """Mean and logarithm of the variance of a clip's latents, not normalised, float32. The logarithm lies in [-30, 20]."""
    x, _ = model.encoder(video.astype(dtype_of(model.config)), None)
    mean, log_variance = jnp.split(model.quant(x).astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


_posterior = jax.jit(posterior)


def reconstruct(model: WanVae, latents: Float[Array, "b g h w c"]) -> Float[Array, "b f p q 3"]:
    """The pixels of a clip's latents, float32 and not cut off at [-1, 1]: beyond it there would be no gradient back."""
    video, _ = model.decoder(model.post_quant(latents.astype(dtype_of(model.config))), None)
    return video.astype(jnp.float32)


def latent_statistics(
    model: vae.Vae, videos: Iterable[Float[Array, "b f p q 3"]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every latent channel over `videos`, for `config.vae.mean` and `config.vae.std`.

    Of draws from the latents' distribution, not of its means alone: those of a channel that `kl` has put out of use hardly
    differ, and normalised by that little they would be noise as large as what the other channels say.

    Raises:
        ValueError: if there are no videos.
    """
    count, total, squares = 0, np.zeros(model.config.channels), np.zeros(model.config.channels)
    for video in videos:
        mean, log_variance = (np.asarray(part, np.float64) for part in _posterior(model, video))
        count += mean[..., 0].size
        total += mean.sum((0, 1, 2, 3))
        squares += (np.square(mean) + np.exp(log_variance)).sum((0, 1, 2, 3))
    check(count > 0, "videos are empty: expected at least one batch")
    mean = total / count
    return tuple(map(float, mean)), tuple(map(float, np.sqrt(squares / count - np.square(mean))))


def _mean_difference(error: Float[Array, "b f p q 3"], axis: int) -> Float[Array, ""]:
    return jnp.mean(jnp.abs(jnp.diff(error, axis=axis)))


def _saturation(video: Float[Array, "b f p q 3"]) -> Float[Array, "b f p q 1"]:
    """The largest difference of two channels: 0 of a grey, 1 of a pure colour."""
    return (jnp.max(video, axis=-1, keepdims=True) - jnp.min(video, axis=-1, keepdims=True)) / 2
