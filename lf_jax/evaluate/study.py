"""The evaluation itself: videos of every policy from the same prompts and noise, and what is measured of each.

    rollouts    free-running: every policy generates its own video, as `lf-jax sample` would
    scores      those videos, beside the dense one of the same prompt and seed
    forced      every policy with the dense video as its past: the error of one network pass, and of its choice of blocks

Each step leaves files in the `Store` and makes only those that are missing, so an interrupted evaluation goes on.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Float, UInt8
from lf_jax.config import Config
from lf_jax.dit import text_cache
from lf_jax.evaluate import forcing, pixels
from lf_jax.evaluate.cases import Case, judge
from lf_jax.evaluate.policies import average, densities, meaning
from lf_jax.evaluate.statistics import LEVEL, nested
from lf_jax.evaluate.store import Store
from lf_jax.evaluate.summary import summarise
from lf_jax.evaluate.vmaf import find_ffmpeg, vmaf
from lf_jax.generate import begin, decode
from lf_jax.inputs import video_chunks
from lf_jax.pipeline import Pipeline
from lf_jax.rollout import stream
from lf_jax.text import Embeddings
from lf_jax.tokens import Grid
from lf_jax.video import write_mp4

DENSE = "dense"  # the policy that the others are measured against
Advance = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared: `policies` holds the config of each, which differ in `sparsity` only; "dense" is one of them."""

    pipe: Pipeline
    policies: Mapping[str, Config]
    cases: Sequence[Case]
    embeddings: Embeddings  # of all prompts, and of the negative one under guidance
    store: Store

    def rollouts(self, batch: int, advance: Advance) -> None:
        """Makes the latents that are missing, `batch` videos at a time; `advance` is called for each video there then is."""
        for policy, settings in self.policies.items():
            missing = [i for i in range(len(self.cases)) if not self.store.has_latents(policy, i)]
            for _ in range(len(self.cases) - len(missing)):
                advance()
            for start in range(0, len(missing), batch):
                together = missing[start : start + batch]
                filled = together + together[-1:] * (batch - len(together))  # one size of batch compiles once
                videos = roll_out(self.pipe, settings, [self.cases[i] for i in filled], self.embeddings)
                for i, latents in zip(together, videos, strict=False):
                    self.store.save_latents(policy, i, latents)
                    advance()

    def scores(self, advance: Advance) -> None:
        """Writes an mp4 and the scores of every video that has none: decoded here, encoded and judged by threads."""
        with ThreadPoolExecutor() as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # as the evaluator does itself, but not safely among threads
            under_way: list[Future] = []  # of the prompt before: no more videos than two prompts' are in memory
            for i in range(len(self.cases)):
                missing = [policy for policy in self.policies if not self._scored(policy, i)]
                for _ in range(len(self.policies) - len(missing)):
                    advance()
                videos = {policy: self._pixels(policy, i) for policy in dict.fromkeys((DENSE, *missing)) if missing}
                jobs = [pool.submit(self._score, policy, i, videos[policy], videos[DENSE]) for policy in missing]
                for job in under_way:
                    job.result()
                    advance()
                under_way = jobs
            for job in under_way:
                job.result()
                advance()

    def forced(self, number: int, advance: Advance) -> None:
        """Measures the policies with the dense latents of the first `number` prompts as their past."""
        for i in range(number):
            wanted = {
                policy: settings
                for policy, settings in self.policies.items()
                if policy != DENSE and self.store.notes(policy, i, "forced") is None
            }
            if wanted:
                case, dense = self.cases[i], self.policies[DENSE]
                text = _text_cache(self.pipe.model, self.pipe.text([case.prompt], dense, self.embeddings))
                keys = self.pipe.keys([case.prompt], case.seed)
                found = forcing.measure(self.pipe.model, text, keys, self.store.latents(DENSE, i), dense, wanted)
                for policy, notes in found.items():
                    self.store.save_notes(policy, i, "forced", notes)
            advance()

    def results(self, forced: int) -> dict[str, Any]:
        """Everything that was measured and what it was measured on, as JSON can hold it; all steps must have run.

        Args:
            forced: prompts that were teacher-forced.
        """
        number, dense = range(len(self.cases)), self.policies[DENSE]
        videos = {policy: [self.store.notes(policy, i, "scores") for i in number] for policy in self.policies}
        passes = {
            policy: [self.store.notes(policy, i, "forced") for i in range(forced)]
            for policy in self.policies
            if policy != DENSE and forced
        }
        _, no_vmaf = find_ffmpeg()
        some = next((settings for policy, settings in self.policies.items() if policy != DENSE), dense)
        return {
            "level": LEVEL,
            "reference": DENSE,
            "forced_prompts": forced,
            "video": {
                **{name: getattr(dense.video, name) for name in ("height", "width", "num_frames", "fps")},
                "chunks": video_chunks(dense),
                "frame_blocks": Grid.of(some).frame_blocks,
            },
            "prompts": [dataclasses.asdict(case) for case in self.cases],
            "policies": {
                policy: {
                    "meaning": meaning(policy),
                    "sparsity": dataclasses.asdict(settings.sparsity),
                    "planned_density": average(densities(settings), settings),
                    "computed_density": _computed(passes.get(policy), settings),
                }
                for policy, settings in self.policies.items()
            },
            "left_out": _left_out(self.cases, no_vmaf, forced),
            "summary": summarise(videos, passes, DENSE),
            "videos": videos,
            "forced": passes,
        }

    def _scored(self, policy: str, i: int) -> bool:
        return self.store.path(policy, i, "mp4").exists() and self.store.notes(policy, i, "scores") is not None

    def _score(self, policy: str, i: int, video: UInt8[np.ndarray, "f h w 3"], dense: UInt8[np.ndarray, "f h w 3"]) -> None:
        settings = self.policies[policy]
        write_mp4(self.store.path(policy, i, "mp4"), video, settings.video.fps)
        other = None if policy == DENSE else dense
        self.store.save_notes(policy, i, "scores", score(video, other, self.cases[i], settings))

    def _pixels(self, policy: str, i: int) -> UInt8[np.ndarray, "f h w 3"]:
        return to_pixels(self.pipe, self.policies[policy], self.store.latents(policy, i))


def roll_out(pipe: Pipeline, settings: Config, cases: Sequence[Case], embeddings: Embeddings) -> Float[np.ndarray, "b f h w c"]:
    """The latents of the videos that `pipe(prompts, seed=seeds)` makes under `settings`."""
    prompts = [case.prompt for case in cases]
    text = _text_cache(pipe.model, pipe.text(prompts, settings, embeddings))
    state = begin(settings, pipe.keys(prompts, [case.seed for case in cases])).rollout
    chunks = stream(pipe.model, text, None, state, settings, sum(video_chunks(settings)))
    return np.concatenate([latents for latents, _ in list(chunks)], axis=1)  # waits once all are under way


def to_pixels(pipe: Pipeline, settings: Config, latents: Float[np.ndarray, "f h w c"]) -> UInt8[np.ndarray, "g p q 3"]:
    """The pixels of a video, decoded chunk by chunk as they would have been while it was made."""
    parts, past = [], None
    for chunk in np.split(latents, np.cumsum(video_chunks(settings))[:-1]):
        frames, past = decode(pipe.vae, jnp.asarray(chunk)[None], past)
        parts.append(frames[0])
    return np.concatenate(parts)


def score(
    video: UInt8[np.ndarray, "f h w 3"], dense: UInt8[np.ndarray, "f h w 3"] | None, case: Case, settings: Config
) -> dict[str, Any]:
    """Everything that is measured of one video, as JSON can hold it.

    Args:
        dense: the video to be like; None where `video` is that one.

    Returns:
        `scores`, a number or None by name; `chunks`, a number a chunk; `seconds`, a number a second. Names that begin
        with "world." are of the evaluator of the procedural world, of prompts that are its captions.
    """
    stride = settings.vae.temporal_stride
    sizes = [frames * stride for frames in video_chunks(settings)]
    sizes[0] -= stride - 1  # the first latent frame is one of pixels
    scores, chunks = {"flicker": pixels.flicker(video)}, {}
    seconds = dict(pixels.appearance(video, settings.video.fps))
    if dense is not None:
        frames = {"psnr": pixels.psnr(video, dense), "ssim": pixels.ssim(video, dense)}
        ffmpeg, _ = find_ffmpeg()
        if ffmpeg is not None:
            frames["vmaf"] = vmaf(video, dense, settings.video.fps, ffmpeg)
        for name, values in frames.items():
            scores[name] = np.mean(values)
            chunks[name] = pixels.grouped(values, sizes)
    if case.facts is not None:
        judged = judge(case.facts, video, settings)
        asked = judged.whole()
        known = [value for value in asked.values() if value is not None]
        scores |= {f"world.{name}": value for name, value in asked.items()} | {"world.mean": np.mean(known)}
        seconds |= {f"world.{name}": values for name, values in judged.seconds.items()}
    return {
        name: {key: nested(value) for key, value in part.items()}
        for name, part in (("scores", scores), ("chunks", chunks), ("seconds", seconds))
    }


def _computed(passes: Sequence[Mapping] | None, settings: Config) -> float | None:
    """The density that was met; None where nothing was teacher-forced."""
    return None if not passes else average(np.mean([notes["density"] for notes in passes], axis=0), settings)


def _left_out(cases: Sequence[Case], no_vmaf: str, forced: int) -> dict[str, str]:
    """What was not measured, and why."""
    reasons = {"VMAF": no_vmaf, "Teacher-forced measures": "" if forced else "not asked for"}
    strange = sum(case.facts is None for case in cases)
    if strange:
        reasons["Evaluator of the procedural world"] = f"{strange} of {len(cases)} prompts are no captions of one of this size"
    return {name: reason for name, reason in reasons.items() if reason}


_text_cache = jax.jit(text_cache)
