"""Self-Forcing: distribution matching distillation on rollouts of the generator's own (arXiv 2506.08009; DMD: 2311.18828).

    generator   few steps, causal, dense or sparse by `config.sparsity`: the network that is wanted
    teacher     frozen, bidirectional, many steps: knows the distribution of real videos
    critic      bidirectional, starts as the teacher: learns the distribution of the generator's videos

Noise is put on a video of the generator's; where teacher and critic disagree on what is under it, the video moves towards
the teacher's belief. The critic learns that belief of its own from further rollouts, several updates for each of the
generator's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import flow
from lf_jax.arrays import Array, Float, Int, Key
from lf_jax.config import Config, check
from lf_jax.dit.model import WanDiT
from lf_jax.tokens import chunk_lengths, latent_frames
from lf_jax.train.objectives.bidirectional import bidirectional, guided
from lf_jax.train.objectives.objective import (
    Load,
    Networks,
    differentiate,
    frozen_parts,
    negative_embeddings,
    prompt_embeddings,
)
from lf_jax.train.rollouts import exit_gradient, self_rollout


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Trains "generator" and "critic". Batches are prompts; the videos have `config.video.num_frames`.

    `score_shift` decides the noise level at which teacher and critic are read, x0 = x - sigma velocity. Self-Forcing puts
    noise on at the levels of shift 5 but builds both networks with a table of shift 8, and looks sigma up there: at
    timestep 20 that is nearly 1.2 times too much, at 50 1.1 times, from 200 on within 1.5 %. The critic learns to make up
    for it, the teacher cannot, so its belief overshoots at low noise. None, our choice, takes sigma = timestep / 1000, the
    level that the noise was put on at: the only one at which a velocity leads to x0, and the one that our samplers use.
    8.0 does as Self-Forcing does.
    """

    guidance_scale: float = 4.0  # of the teacher, u + g (c - u); Self-Forcing writes the same as c + 3 (c - u)
    critic_updates: int = 5  # for each update of the generator
    same_exit: bool = True  # all chunks leave at the same random step; False: each at its own
    score_shift: float | None = None
    min_timestep: float = 20.0  # of the noise that teacher and critic see
    max_timestep: float = 980.0
    remat: bool = False  # compute layers again in gradients instead of keeping what is in them

    def __post_init__(self):
        check(self.critic_updates > 0, f"{self.critic_updates=} must be positive")
        check(self.score_shift is None or self.score_shift > 0, f"{self.score_shift=} must be positive, or None")
        check(
            0 < self.min_timestep <= self.max_timestep <= flow.TRAIN_STEPS,
            f"{self.min_timestep=} and {self.max_timestep=} must lie in (0, 1000], in this order",
        )

    def build(self, config: Config, load: Load, key: Key[Array, ""]) -> Networks:
        """Generator and teacher must be given; the critic starts from the teacher unless it is given too.

        Raises:
            ValueError: naming the one that is missing.
        """
        found = {role: load(role, "dit") for role in ("generator", "teacher", "critic")}
        for role in ("generator", "teacher"):
            check(found[role] is not None, f"distillation starts from trained networks: expected a model for {role!r}")
        critic = jax.tree.map(jnp.copy, found["teacher"]) if found["critic"] is None else found["critic"]
        trained = {"generator": {"dit": found["generator"]}, "critic": {"dit": critic}}
        return Networks(trained, {"teacher": found["teacher"], **frozen_parts(load, "generator", "text")})

    def updates(self, step: int) -> tuple[str, ...]:
        """The critic every time, the generator before it in one of `critic_updates`."""
        return ("generator", "critic") if step % self.critic_updates == 0 else ("critic",)

    def gradients(
        self,
        name: str,
        trained: dict[str, Any],
        frozen: dict[str, Any],
        batch: dict[str, Array],
        key: Key[Array, ""],
        config: Config,
    ) -> tuple[Any, dict[str, Array]]:
        """The gradient of one network by rollouts of its own: those of generator and critic differ under one key."""
        key = jax.random.fold_in(key, ("generator", "critic").index(name))
        of_videos, of_exits, of_score = jax.random.split(key, 3)
        encoder = frozen.get("text")
        prompt = prompt_embeddings(encoder, batch)
        videos, exits = jax.random.split(of_videos, prompt.shape[0]), self.exits(of_exits, config)
        generator = trained["generator"]["dit"]
        frames = latent_frames(config.video.num_frames, config.vae.temporal_stride)
        inputs, x0 = self_rollout(generator, prompt, videos, exits, config, frames)
        left = {"exit": jnp.mean(exits.astype(jnp.float32))}
        if name == "critic":
            gradient, metrics = differentiate(self.critic_loss, trained["critic"], prompt, x0, of_score, config)
            return gradient, metrics | left
        negative = negative_embeddings(encoder, batch, prompt, config)
        direction = self.direction(frozen["teacher"], trained["critic"]["dit"], prompt, negative, x0, of_score, config)
        gradient = exit_gradient(generator, prompt, inputs, direction / direction.size, videos, exits, config, remat=self.remat)
        metrics = {"loss": 0.5 * jnp.mean(jnp.square(direction)), "direction": jnp.mean(jnp.abs(direction))}
        return {"dit": gradient}, metrics | left

    def exits(self, key: Key[Array, ""], config: Config) -> Int[Array, " chunk"]:
        """The exit step of every chunk: each step is as likely."""
        frames = latent_frames(config.video.num_frames, config.vae.temporal_stride)
        chunks = len(chunk_lengths(frames, config.rollout.chunk_frames, config.rollout.independent_first_frame))
        drawn = jax.random.randint(key, (1 if self.same_exit else chunks,), 0, len(config.rollout.timesteps))
        return jnp.broadcast_to(drawn, (chunks,))

    def direction(
        self,
        teacher: WanDiT,
        critic: WanDiT,
        prompt: Float[Array, "b n text_dim"],
        negative: Float[Array, "b n text_dim"],
        x0: Float[Array, "b f h w c"],
        key: Key[Array, ""],
        config: Config,
    ) -> Float[Array, "b f h w c"]:
        """What the generator's videos are moved against: (critic's x0 - teacher's x0) / mean |x0 - teacher's x0|.

        The loss is 1/2 mean |x0 - stop(x0 - direction)|^2, so its derivative by x0 is direction / size (DMD, equations 7
        and 8). The mean is over each video. What is not finite moves nothing.
        """
        timestep, sigma, _, x = self.noisy(x0, key, config)
        times = jnp.broadcast_to(timestep[:, None], x.shape[:2])
        real = x - sigma * guided(teacher, prompt, negative, self.guidance_scale, x, times, config)
        fake = x - sigma * bidirectional(critic, prompt, x, times, config)
        scale = jnp.mean(jnp.abs(x0 - real), axis=(1, 2, 3, 4), keepdims=True)
        return jax.lax.stop_gradient(jnp.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0))

    def critic_loss(
        self,
        critic: dict[str, Any],
        prompt: Float[Array, "b n text_dim"],
        x0: Float[Array, "b f h w c"],
        key: Key[Array, ""],
        config: Config,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Flow matching on the generator's videos; the velocity is that of the x0 that `direction` reads."""
        timestep, sigma, noise, x = self.noisy(x0, key, config)
        times = jnp.broadcast_to(timestep[:, None], x.shape[:2])
        read = x - sigma * bidirectional(critic["dit"], prompt, x, times, config, self.remat)
        velocity = flow.x0_to_velocity(x, read, _of_video(timestep / flow.TRAIN_STEPS))
        return jnp.mean(jnp.square(velocity - flow.training_target(x0, noise))), {}

    def noisy(self, x0: Float[Array, "b f h w c"], key: Key[Array, ""], config: Config) -> tuple[Array, Array, Array, Array]:
        """Puts noise on videos, each at a timestep of its own: uniform over the steps, then shifted, then clamped.

        Returns:
            Timesteps [b], the levels [b, 1, 1, 1, 1] at which networks told them are read, the noise, and the noisy videos.
        """
        of_timestep, of_noise = jax.random.split(key)
        grid = np.append(flow.sigma_grid(config.rollout.shift), 0.0)[1:] * flow.TRAIN_STEPS
        timestep = jnp.asarray(grid, jnp.float32)[jax.random.randint(of_timestep, x0.shape[:1], 0, flow.TRAIN_STEPS)]
        timestep = jnp.clip(timestep, self.min_timestep, self.max_timestep)
        level = timestep / flow.TRAIN_STEPS
        read = level if self.score_shift is None else flow.nearest_sigma(timestep, self.score_shift)
        noise = jax.random.normal(of_noise, x0.shape)
        return timestep, _of_video(read), noise, flow.add_noise(x0, noise, _of_video(level))


def _of_video(x: Float[Array, " b"]) -> Float[Array, "b 1 1 1 1"]:
    return x[:, None, None, None, None]
