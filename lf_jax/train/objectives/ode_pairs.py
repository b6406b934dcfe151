"""ODE pairs: a causal few-step network learns where the teacher's deterministic trajectories end (CausVid, section 4.3)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import flow, solvers
from lf_jax import noise as seeded
from lf_jax.arrays import Array, Float, Key
from lf_jax.chunk import frame_shape
from lf_jax.config import Config, check
from lf_jax.dit.model import WanDiT
from lf_jax.tokens import chunk_lengths, latent_frames
from lf_jax.train.objectives.bidirectional import guided
from lf_jax.train.objectives.objective import (
    Load,
    Networks,
    differentiate,
    draw,
    frozen_parts,
    negative_embeddings,
    prompt_embeddings,
)
from lf_jax.train.rollouts import causal_pass

LEVEL_TOLERANCE = 1e-3  # between a student's noise level and the teacher's nearest: UniPC starts that far below pure noise


@dataclasses.dataclass(frozen=True)
class OdePairs:
    """The mean of |x0 predicted - end of the trajectory|^2, for every chunk at a random one of the student's timesteps.

    The trajectories are the batch's "states", [b, steps + 1, f, h, w, c] with the end last, or are made by the teacher from
    the batch's prompts.
    """

    sampler: Literal["euler", "unipc"] = "euler"  # of the teacher
    num_inference_steps: int = 48  # of the teacher
    guidance_scale: float = 6.0  # of the teacher
    context: Literal["own", "clean"] = "own"  # a chunk reads the noisy states of those before it (CausVid), or their ends
    remat: bool = False

    def __post_init__(self):
        check(self.sampler in ("euler", "unipc"), f"{self.sampler=} must be 'euler' or 'unipc'")
        check(self.num_inference_steps > 0, f"{self.num_inference_steps=} must be positive")
        check(self.context in ("own", "clean"), f"{self.context=} must be 'own' or 'clean'")

    def build(self, config: Config, load: Load, key: Key[Array, ""]) -> Networks:
        model = load("model", "dit") or draw(config.model, key)
        frozen = frozen_parts(load, "model", "text")
        teacher = load("teacher", "dit")
        return Networks({"model": {"dit": model}}, frozen if teacher is None else {**frozen, "teacher": teacher})

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
        of_noise, of_steps, of_context = jax.random.split(key, 3)
        encoder = frozen.get("text")
        prompt = prompt_embeddings(encoder, batch)
        if "states" in batch:
            states = batch["states"]
        else:
            check("teacher" in frozen, f"batch has {sorted(batch)} and there is no teacher: expected 'states'")
            negative = negative_embeddings(encoder, batch, prompt, config)
            states = self.trajectories(frozen["teacher"], prompt, negative, jax.random.split(of_noise, prompt.shape[0]), config)
        return differentiate(self.loss, trained[name], prompt, states, of_steps, of_context, config)

    def loss(
        self,
        model: dict[str, Any],
        prompt: Float[Array, "b n text_dim"],
        states: Float[Array, "b states f h w c"],
        step_key: Key[Array, ""],
        context_key: Key[Array, ""],
        config: Config,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        levels = jnp.asarray(student_levels(config), jnp.float32)
        b, received, frames = states.shape[:3]
        check(received == levels.size + 1, f"batch['states'] has {received} states, expected {levels.size} steps and the end")
        lengths = chunk_lengths(frames, config.rollout.chunk_frames, config.rollout.independent_first_frame)
        step = jax.random.randint(step_key, (b, len(lengths)), 0, levels.size)
        step = jnp.repeat(step, np.asarray(lengths), axis=1, total_repeat_length=frames)
        end, sigma = states[:, -1].astype(jnp.float32), levels[step]
        x = jnp.take_along_axis(states.astype(jnp.float32), step[:, None, :, None, None, None], axis=1)[:, 0]
        context, keys = end if self.context == "clean" else None, jax.random.split(context_key, b)
        velocity = causal_pass(
            model["dit"], prompt, x, sigma * flow.TRAIN_STEPS, keys, config, context, through_cache=True, remat=self.remat
        )
        x0 = flow.velocity_to_x0(x, velocity, sigma[..., None, None, None])
        return jnp.mean(jnp.square(x0 - end)), {}

    def trajectories(
        self,
        teacher: WanDiT,
        prompt: Float[Array, "b n text_dim"],
        negative: Float[Array, "b n text_dim"],
        keys: Key[Array, " b"],
        config: Config,
    ) -> Float[Array, "b states f h w c"]:
        """Samples videos with the teacher and keeps the states at the student's timesteps, and the end.

        Args:
            keys: of the starting noise, one a video.
            config: of the student; the schedule of the teacher has its shift.

        Raises:
            ValueError: if the teacher's schedule does not pass through the student's timesteps.
        """
        settings = dataclasses.replace(
            config.rollout,
            sampler=self.sampler,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        with jax.ensure_compile_time_eval():
            schedule = solvers.schedule(settings)
            levels, wanted = np.asarray(schedule.sigma), student_levels(config)
        nearest = np.abs(levels[:, None] - wanted).argmin(0)
        missed = wanted[np.abs(levels[nearest] - wanted) > LEVEL_TOLERANCE] * flow.TRAIN_STEPS
        check(
            missed.size == 0,
            f"{self.num_inference_steps=} of {self.sampler} do not pass through the student's timesteps {missed.tolist()}",
        )

        def step(carry: tuple[Array, solvers.Memory], at: solvers.Schedule) -> tuple[tuple[Array, solvers.Memory], Array]:
            x, memory = carry
            times = jnp.broadcast_to(at.timestep, x.shape[:2])
            velocity = guided(teacher, prompt, negative, self.guidance_scale, x, times, config)
            return solvers.step(at, x, velocity, memory), x

        frames = latent_frames(config.video.num_frames, config.vae.temporal_stride)
        x = seeded.chunk_noise(keys, 0, (frames, *frame_shape(config)))
        (end, _), states = jax.lax.scan(step, (x, solvers.forget(x)), schedule)
        return jnp.moveaxis(jnp.concatenate([states[nearest], end[None]]), 0, 1)


def student_levels(config: Config) -> np.ndarray:
    """The noise levels of the few-step sampler of `config`, falling, [steps] float32.

    Raises:
        ValueError: if its sampler is another one.
    """
    check(config.rollout.sampler == "few_step", f"{config.rollout.sampler=} must be the student's, 'few_step'")
    with jax.ensure_compile_time_eval():
        return np.asarray(solvers.schedule(config.rollout).sigma)
