"""How long a video takes here, chunk by chunk and stage by stage.

The stages of a chunk are timed one after another, each waited for; `video` is the time of a whole video as users run it,
where the decoder of one chunk and the transformer of the next are under way together. Every figure is of weights in
memory and, but for the column `first`, of compiled programs.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.config import Config
from lf_jax.dit import text_cache
from lf_jax.generate import begin, decode
from lf_jax.pipeline import Pipeline, texts
from lf_jax.rollout import stream
from lf_jax.text import Embeddings, encode
from lf_jax.tokens import chunk_lengths, latent_frames
from pallas_kernels.timing import commit

STAGES = ("denoise", "decode", "copy")  # of a chunk: the transformer's passes, the autoencoder, pixels to the host
PROMPT = "A red ball rolls slowly behind a white wall"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, in milliseconds."""

    stage: str
    chunk: int | None  # None: of the whole video
    first: float  # the first time: compilation included
    median: float
    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Report:
    facts: dict[str, str | int | float]  # device, versions, commit, date, what was timed
    rows: tuple[Row, ...]

    def seconds(self, stage: str) -> float:
        return sum(row.median for row in self.rows if row.stage == stage) / 1000


def measure(pipe: Pipeline, config: Config, repeats: int, text: bool = False) -> Report:
    """Times `repeats` videos of `config` after a first one that compiles.

    Args:
        text: also load and time the text encoder; without it the transformer reads random embeddings.
    """
    rows = []
    if text:
        encoder, tokenizer = pipe.source.text()
        ids, lengths = tokenizer([PROMPT])
        rows.append(timed("text", None, repeats, partial(jax.jit(encode), encoder, ids, lengths)))
        del encoder
    embeddings = random_embeddings(config)
    runs = [_chunks(pipe, config, embeddings) for _ in range(1 + repeats)]
    for chunk in range(len(runs[0])):
        for i, stage in enumerate(STAGES):
            rows.append(row(stage, chunk, [run[chunk][i] for run in runs]))
    rows.append(timed("video", None, repeats, lambda: pipe(PROMPT, embeddings=embeddings)))
    return Report(facts(config), tuple(rows))


def _chunks(pipe: Pipeline, config: Config, embeddings: Embeddings) -> list[tuple[float, float, float]]:
    """The stages of every chunk of one video, in milliseconds."""
    text = jax.block_until_ready(jax.jit(text_cache)(pipe.model, pipe.text([PROMPT], config, embeddings)))
    frames = latent_frames(config.video.num_frames, config.vae.temporal_stride)
    state = begin(config, pipe.keys([PROMPT], 0)).rollout
    chunks, past, found = stream(pipe.model, text, None, state, config, frames), None, []
    for _ in chunk_lengths(frames, config.rollout.chunk_frames, config.rollout.independent_first_frame):
        marks = [time.perf_counter()]
        latents, _ = jax.block_until_ready(next(chunks))
        marks.append(time.perf_counter())
        pixels, past = jax.block_until_ready(decode(pipe.vae, latents, past))
        marks.append(time.perf_counter())
        np.asarray(pixels)
        marks.append(time.perf_counter())
        found.append(tuple(1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)))
    return found


def timed(stage: str, chunk: int | None, repeats: int, run: Callable[[], object]) -> Row:
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1000 * (time.perf_counter() - start))
    return row(stage, chunk, times)


def row(stage: str, chunk: int | None, times: list[float]) -> Row:
    first, *warm = times
    return Row(stage, chunk, first, statistics.median(warm), min(warm), max(warm))


def random_embeddings(config: Config) -> Embeddings:
    """Stand-ins for the encoded prompt and negative prompt: speed does not depend on their values."""
    prompts = tuple(dict.fromkeys(texts([PROMPT], config)))
    shape = (len(prompts), config.text.length, config.text.dim)
    values = np.asarray(jax.random.normal(jax.random.key(0), shape, jnp.dtype(config.text.dtype)))
    return Embeddings(values, np.full(len(prompts), config.text.length, np.int32), prompts, "random")


def facts(config: Config) -> dict[str, str | int | float]:
    """What a figure must name to mean anything."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax")),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "timed": f"{config.video.num_frames} frames of {config.video.height}x{config.video.width}, batch 1, "
        f"{config.sparsity.policy} attention, {config.model.dtype}, {config.vae.kind} VAE at base {config.vae.base}",
        "peak GiB": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
    }
