"""The times of a whole video, and inside its transformer, with their floors.

The stages of a chunk are timed one after another, each waited for; `first chunk` and `video` are what users wait for, where
the decoder of one chunk and the transformer of the next are under way together. Every figure is of weights in memory and,
but for the column `first`, of compiled programs.
"""

import dataclasses
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import programs
from lf_jax.bench import ceilings, floors, stages
from lf_jax.bench.ceilings import Ceilings
from lf_jax.bench.report import Report, Row, facts, row, timed
from lf_jax.cache import KVCache
from lf_jax.compilation import counted_hits
from lf_jax.config import Config
from lf_jax.dit import TextCache
from lf_jax.generate import begin, compiled_text_cache, decode
from lf_jax.inputs import video_chunks
from lf_jax.pipeline import Pipeline, texts
from lf_jax.rollout import RolloutState, fork, stream
from lf_jax.text import Embeddings

STAGES = ("denoise", "decode", "copy")  # of a chunk: the transformer's passes, the autoencoder, pixels to the host
PROMPT = "A red ball rolls slowly behind a white wall"


def measure(pipe: Pipeline, config: Config, repeats: int, text: bool = False, inside: bool = True) -> Report:
    """Times `repeats` videos of `config` after a first one that compiles.

    Args:
        text: also load and time the text encoder; without it the transformer reads random embeddings.
        inside: also the stages inside the transformer, each chunk once, by the profiler. On a GPU that takes one more
            compilation of the transformer.
    """
    limits, embeddings, encoding = ceilings.measure(config.model.dtype), random_embeddings(config), []
    with counted_hits() as hits:
        runs = [_chunks(pipe, config, embeddings) for _ in range(1 + repeats)]
    first_chunk = timed("first chunk", None, repeats, lambda: _first_chunk(pipe, embeddings))
    video = timed("video", None, repeats, lambda: pipe(PROMPT, embeddings=embeddings))
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)  # before what only a benchmark holds
    parts = _inside(pipe, config, embeddings) if inside else [{}] * len(runs[0])
    if text:
        encoder, tokenizer = pipe.source.text()
        ids, lengths = tokenizer([PROMPT])
        encoding = [timed("text", None, repeats, partial(programs.encode_text, encoder, ids, lengths))]
        encoding[0] = dataclasses.replace(encoding[0], floor=limits.floor(floors.text_encoder(config.text)))
        del encoder

    least, chunks = _floors(config, limits), []
    for chunk, bounds in enumerate(least):
        for i, stage in enumerate(STAGES):
            whole = row(stage, chunk, [run[chunk][i] for run in runs])
            chunks.append(dataclasses.replace(whole, floor=sum(bounds[stage].values())))
            if stage == "denoise":
                times = parts[chunk].items()
                chunks += [Row(f"denoise: {name}", chunk, None, ms, ms, ms, bounds[stage].get(name)) for name, ms in times]
    first_chunk = dataclasses.replace(first_chunk, floor=sum(sum(bounds.values()) for bounds in least[0].values()))
    video = dataclasses.replace(video, floor=sum(sum(b[stage].values()) for b in least for stage in ("denoise", "decode")))
    compiling = sum(max(0.0, found.first - found.median) for found in chunks if found.first is not None) / 1000
    limited = {f"{name} ceiling": number for name, number in dataclasses.asdict(limits).items()}
    measured = {
        "peak GiB": round(peak / 2**30, 2),
        "compilation": f"{compiling:.1f} s, {sum(hits.values())} programs from the persistent cache",
    }
    return Report(facts(config) | measured | limited, (*encoding, *chunks, first_chunk, video))


def record(pipe: Pipeline, config: Config, folder: str | os.PathLike) -> None:
    """A trace of one warm video as users make it, for XProf: `xprof FOLDER`, or a browser's trace viewer."""
    run = partial(pipe, PROMPT, embeddings=random_embeddings(config))
    run()
    with jax.profiler.trace(folder):
        run()


def _floors(config: Config, limits: Ceilings) -> list[dict[str, dict[str, float]]]:
    """Milliseconds of every chunk, by stage of `STAGES` and part of it."""
    counted = zip(floors.transformer(config), floors.decoder(config), floors.pixel_bytes(config), strict=True)
    return [
        {
            "denoise": {name: limits.floor(work) for name, work in transformer.items()},
            "decode": {"decode": limits.floor(decoder)},
            "copy": {"copy": 1000 * pixels / limits.to_host},
        }
        for transformer, decoder, pixels in counted
    ]


def _chunks(pipe: Pipeline, config: Config, embeddings: Embeddings) -> list[tuple[float, float, float]]:
    """The stages of every chunk of one video, in milliseconds."""
    text, state, frames = _start(pipe, config, embeddings)
    chunks, past, found = stream(pipe.model, text, None, state, config, frames), None, []
    for _ in video_chunks(config):
        marks = [time.perf_counter()]
        latents, _ = jax.block_until_ready(next(chunks))
        marks.append(time.perf_counter())
        pixels, past = jax.block_until_ready(decode(pipe.vae, latents, past))
        marks.append(time.perf_counter())
        np.asarray(pixels)
        marks.append(time.perf_counter())
        found.append(tuple(1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)))
    return found


def _inside(pipe: Pipeline, config: Config, embeddings: Embeddings) -> list[dict[str, float]]:
    """The parts of `denoise` of every chunk, in milliseconds on the device."""
    (text, state, _), lowered = _start(pipe, config, embeddings), programs.of_videos(config)
    steps: dict[int, jax.stages.Compiled] = {}
    cache, found = state.cache, []
    for number, length in enumerate(video_chunks(config)):
        budget = None
        if state.budgets is not None:
            budget = dataclasses.replace(state.budgets, blocks=np.asarray(state.budgets.blocks)[number])

        def run(cache: KVCache, step: jax.stages.Compiled, number=number, budget=budget) -> KVCache:
            return step(pipe.model, text, None, cache, state.keys, np.int32(number), budget, None)[1]

        if length not in steps:
            steps[length] = stages.compiled(lowered[f"chunk of {length}"]())
            jax.block_until_ready(run(fork(cache), steps[length]))
        cache, parts = stages.measure(steps[length], partial(run, cache, steps[length]))
        found.append(parts)
    return found


def _first_chunk(pipe: Pipeline, embeddings: Embeddings) -> np.ndarray:
    """From the embeddings of a prompt to its first pixels on the host."""
    return np.asarray(next(pipe.stream(PROMPT, embeddings=embeddings)).frames)


def _start(pipe: Pipeline, config: Config, embeddings: Embeddings) -> tuple[TextCache, RolloutState, int]:
    """The prompt, the state before the first chunk, and the latent frames of the video."""
    text = jax.block_until_ready(compiled_text_cache(pipe.model, pipe.text([PROMPT], config, embeddings)))
    return text, begin(config, pipe.keys([PROMPT], 0)).rollout, sum(video_chunks(config))


def random_embeddings(config: Config) -> Embeddings:
    """Stand-ins for the encoded prompt and negative prompt: speed does not depend on their values."""
    prompts = tuple(dict.fromkeys(texts([PROMPT], config)))
    shape = (len(prompts), config.text.length, config.text.dim)
    values = np.asarray(jax.random.normal(jax.random.key(0), shape, jnp.dtype(config.text.dtype)))
    return Embeddings(values, np.full(len(prompts), config.text.length, np.int32), prompts, "random")
