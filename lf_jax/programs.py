"""The programs that make a video, compiled from shapes alone: before weights are in memory, or while they load.

A program compiled here is the very one that the call finds later: in this process in memory, in another one in the
persistent cache (`lf_jax.compilation`). That holds for weights on the default device, as `lf_jax.load` places them.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp

from lf_jax import config, loading, text
from lf_jax.checkpoint import abstract
from lf_jax.chunk import branches, compiled_chunk, frame_shape, step_config
from lf_jax.compilation import counted_hits
from lf_jax.config import Config
from lf_jax.dit import WanDiT, text_cache
from lf_jax.generate import compiled_text_cache, decode_lengths, decode_pixels
from lf_jax.inputs import video_chunks
from lf_jax.rollout import initial_state

Programs = Mapping[str, Callable[[], jax.stages.Lowered]]  # by name, and lowered when called

encode_text = jax.jit(text.encode)


@dataclasses.dataclass(frozen=True)
class Built:
    """How a program was come by."""

    seconds: float  # tracing included
    cached: bool  # found in the persistent cache


def of_text(part: config.Text) -> Programs:
    """The program that encodes one prompt."""
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, part.length), (1,)))
    return {"text encoder": lambda: encode_text.lower(abstract(part), ids, lengths)}


def of_videos(settings: Config, batch: int = 1) -> Programs:
    """The programs that make `batch` videos together from embeddings: all that is heavy after the text encoder.

    Raises:
        ValueError: if `settings.video.num_frames` does not fit the chunks.
    """
    model, embeddings = _given(settings, batch)
    prompt = {"text keys and values": lambda: compiled_text_cache.lower(model, embeddings)}
    return {**prompt, **of_chunks(settings, batch), **_decoders(settings, batch)}


def of_chunks(settings: Config, batch: int = 1) -> Programs:
    """Those of them that depend on `settings.sparsity`. Raises ValueError as `of_videos`."""
    (model, embeddings), lengths = _given(settings, batch), video_chunks(settings)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(lambda keys: initial_state(settings, batch, sum(lengths), keys), keys)
    context = jax.eval_shape(text_cache, model, embeddings)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    budget = None if state.budgets is None else dataclasses.replace(state.budgets, blocks=number)

    def chunk(length: int) -> jax.stages.Lowered:
        step = step_config(settings)
        return compiled_chunk.lower(model, context, None, state.cache, keys, number, budget, step, length, None)

    return {f"chunk of {n}": lambda n=n: chunk(n) for n in dict.fromkeys(lengths)}


def _given(settings: Config, batch: int) -> tuple[WanDiT, jax.ShapeDtypeStruct]:
    """The shapes of the transformer and of the embeddings of a batch."""
    shape = (batch * branches(settings), settings.text.length, settings.text.dim)
    return abstract(settings.model), jax.ShapeDtypeStruct(shape, config.dtype_of(settings.text))


def of_weights(source: loading.Source, *components: str) -> Programs:
    """The programs that draw random weights; none for a converted folder, whose weights are read."""
    parts = {name: getattr(source.config, loading.COMPONENT_PARTS[name]) for name in components if source.place(name) is None}
    return {f"random {name}": lambda part=part: loading.drawing(part).lower(jax.random.key(0)) for name, part in parts.items()}


def _decoders(settings: Config, batch: int) -> Programs:
    """The decoder's programs: its first frames, which have no past, and every other number of frames that follows."""
    autoencoder, programs, past = abstract(settings.vae), {}, None
    for length in (part for chunk in video_chunks(settings) for part in decode_lengths(chunk)):
        latents = jax.ShapeDtypeStruct((batch, length, *frame_shape(settings)), jnp.float32)
        name = f"decoder of {length}" if past is not None else f"decoder of the first {length}"
        if name not in programs:
            programs[name] = lambda given=(autoencoder, latents, past): decode_pixels.lower(*given)
            _, past = jax.eval_shape(decode_pixels, autoencoder, latents, past)
    return programs


@contextlib.contextmanager
def ahead(programs: Programs) -> Iterator[dict[str, Future[Built]]]:
    """Compiles `programs` while the block runs, and has them done when it ends: one is lowered at a time, which is Python's
    work and no faster in threads, and all that are lowered are compiled at a time.

    Raises:
        whatever compiling one of them raises, at the end of the block.
    """

    def build(lower: Callable[[], jax.stages.Lowered]) -> Built:
        with lowering:
            before, start = hits[threading.get_ident()], time.perf_counter()
            lowered = lower()
        lowered.compile()
        return Built(time.perf_counter() - start, hits[threading.get_ident()] > before)

    lowering = threading.Lock()
    with counted_hits() as hits, ThreadPoolExecutor(max(1, len(programs))) as pool:
        built = {name: pool.submit(build, lower) for name, lower in programs.items()}
        yield built
        for future in built.values():
            future.result()
