"""The evaluation itself: videos of every policy from the same prompts and noise, and what is measured of each.

    videos      free-running: every policy generates its own videos, as `lf-jax sample` would, and they are measured beside
                the dense ones of the same prompts and seeds
    forced      every policy with the dense video as its past: the error of one network pass, and of its choice of blocks

Each step leaves files in the `Store` and makes only those that are missing, so an interrupted evaluation goes on.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Float, UInt8
from lf_jax.config import Config
from lf_jax.evaluate import forcing, pixels
from lf_jax.evaluate.cases import Case
from lf_jax.evaluate.policies import average, densities, meaning
from lf_jax.evaluate.record import Notes, chunk_sizes, record, workers
from lf_jax.evaluate.statistics import LEVEL
from lf_jax.evaluate.store import Store
from lf_jax.evaluate.summary import summarise
from lf_jax.generate import begin, compiled_text_cache, decode
from lf_jax.inputs import video_chunks
from lf_jax.pipeline import Pipeline
from lf_jax.rollout import stream
from lf_jax.text import Embeddings
from lf_jax.tokens import Grid

DENSE = "dense"  # the policy that the others are measured against
Advance = Callable[[], None]
Job = tuple[str, int, Future[Notes]]  # policy, number of the prompt, what is measured of its video


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared: `policies` holds the config of each, which differ in `sparsity` only; "dense" is one of them."""

    pipe: Pipeline
    policies: Mapping[str, Config]
    cases: Sequence[Case]
    embeddings: Embeddings  # of all prompts, and of the negative one under guidance
    store: Store

    def videos(self, batch: int, advance: Advance) -> None:
        """Makes the videos of which anything is missing, `batch` at a time, and what is kept of them; `advance` is called for
        each that is done. Other processes judge and write them while the next ones are made."""
        with workers() as pool:
            under_way: list[Job] = []  # of the batch before: no more videos than those of two batches wait
            for start in range(0, len(self.cases), batch):
                group, dense = range(start, min(start + batch, len(self.cases))), None
                for policy in self.policies:
                    missing = [i for i in group if not self.store.complete(policy, i, policy != DENSE)]
                    for _ in range(len(group) - len(missing)):
                        advance()
                    if not missing:
                        continue
                    dense = self._pixels(DENSE, group, batch) if dense is None else dense
                    beside = dense[np.asarray(_filled(missing, batch)) - start]
                    pair = (beside, None) if policy == DENSE else (self._pixels(policy, missing, batch), beside)
                    jobs = [(policy, i, pool.submit(record, *given)) for i, given in self._found(policy, missing, *pair)]
                    self._finish(under_way, advance)
                    under_way = jobs
            self._finish(under_way, advance)

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
                text = compiled_text_cache(self.pipe.model, self.pipe.text([case.prompt], dense, self.embeddings))
                keys = self.pipe.keys([case.prompt], case.seed)
                (latents,) = self._latents(DENSE, [i], 1)
                found = forcing.measure(self.pipe.model, text, keys, latents, dense, wanted)
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
            "left_out": _left_out(self.cases, self.store.vmaf, forced),
            "summary": summarise(videos, passes, DENSE),
            "videos": videos,
            "forced": passes,
        }

    def _found(
        self, policy: str, indices: Sequence[int], video: UInt8[Array, "b f h w 3"], dense: UInt8[Array, "b f h w 3"] | None
    ) -> Iterator[tuple[int, tuple]]:
        """The arguments of `record` for the first videos of a batch, one for each of `indices`."""
        settings, store = self.policies[policy], self.store
        measures, frames = measure(video, dense, settings), np.asarray(video)
        compared = np.asarray(dense) if store.vmaf and dense is not None else [None] * len(frames)
        for row, i in enumerate(indices):
            files = {kind: store.path(policy, i, kind) for kind in store.kinds(i)}
            own = jax.tree.map(lambda values, row=row: values[row], measures)
            yield i, (frames[row], self.cases[i], settings, own, files, compared[row])

    def _finish(self, jobs: Sequence[Job], advance: Advance) -> None:
        for policy, i, job in jobs:
            self.store.save_notes(policy, i, "scores", job.result())
            advance()

    def _pixels(self, policy: str, indices: Sequence[int], batch: int) -> UInt8[Array, "b f h w 3"]:
        """A whole batch: the last video is repeated, because one size of batch compiles once."""
        latents = self._latents(policy, indices, batch)
        return to_pixels(self.pipe, self.policies[policy], latents[np.minimum(np.arange(batch), len(latents) - 1)])

    def _latents(self, policy: str, indices: Sequence[int], batch: int) -> Float[np.ndarray, "n f h w c"]:
        """Read, and made where they are missing."""
        if missing := [i for i in indices if not self.store.has_latents(policy, i)]:
            together = [self.cases[i] for i in _filled(missing, batch)]
            videos = roll_out(self.pipe, self.policies[policy], together, self.embeddings)
            for i, latents in zip(missing, videos, strict=False):
                self.store.save_latents(policy, i, latents)
        return np.stack([self.store.latents(policy, i) for i in indices])


def roll_out(pipe: Pipeline, settings: Config, cases: Sequence[Case], embeddings: Embeddings) -> Float[np.ndarray, "b f h w c"]:
    """The latents of the videos that `pipe(prompts, seed=seeds)` makes under `settings`."""
    prompts = [case.prompt for case in cases]
    text = compiled_text_cache(pipe.model, pipe.text(prompts, settings, embeddings))
    state = begin(settings, pipe.keys(prompts, [case.seed for case in cases])).rollout
    chunks = stream(pipe.model, text, None, state, settings, sum(video_chunks(settings)))
    return np.concatenate([latents for latents, _ in list(chunks)], axis=1)  # waits once all are under way


def to_pixels(pipe: Pipeline, settings: Config, latents: Float[np.ndarray, "b f h w c"]) -> UInt8[Array, "b g p q 3"]:
    """The pixels of videos, decoded chunk by chunk as they would have been while they were made."""
    parts, past = [], None
    for chunk in np.split(latents, np.cumsum(video_chunks(settings))[:-1], axis=1):
        frames, past = decode(pipe.vae, jnp.asarray(chunk), past)
        parts.append(frames)
    return jnp.concatenate(parts, axis=1)


def measure(
    video: UInt8[Array, "b f h w 3"], dense: UInt8[Array, "b f h w 3"] | None, settings: Config
) -> dict[str, dict[str, Float[np.ndarray, "b *values"]]]:
    """What pixels alone say of a batch, computed where they are.

    Args:
        dense: the videos to be like; None where `video` are those.

    Returns:
        The parts of `record`'s notes.
    """
    scores, chunks = {"flicker": jax.vmap(pixels.flicker)(video)}, {}
    seconds = jax.vmap(lambda one: pixels.appearance(one, settings.video.fps))(video)
    if dense is not None:
        sizes = chunk_sizes(settings)
        for name, of in (("psnr", pixels.psnr), ("ssim", pixels.ssim)):
            values = jax.vmap(of)(video, dense)
            scores[name] = jnp.mean(values, axis=1)
            chunks[name] = jax.vmap(lambda one: pixels.grouped(one, sizes))(values)
    return jax.device_get({"scores": scores, "chunks": chunks, "seconds": seconds})


def _filled(indices: Sequence[int], batch: int) -> list[int]:
    return [*indices, *indices[-1:] * (batch - len(indices))]


def _computed(passes: Sequence[Mapping] | None, settings: Config) -> float | None:
    """The density that was met; None where nothing was teacher-forced."""
    return None if not passes else average(np.mean([notes["density"] for notes in passes], axis=0), settings)


def _left_out(cases: Sequence[Case], vmaf: bool, forced: int) -> dict[str, str]:
    """What was not measured, and why."""
    asked = {"VMAF": vmaf, "Teacher-forced measures": forced}
    reasons = {name: "" if wanted else "not asked for" for name, wanted in asked.items()}
    strange = sum(case.facts is None for case in cases)
    if strange:
        reasons["Evaluator of the procedural world"] = f"{strange} of {len(cases)} prompts are no captions of one of this size"
    return {name: reason for name, reason in reasons.items() if reason}
