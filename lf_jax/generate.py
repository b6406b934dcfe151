"""From encoded prompts to pixels: the whole story, top to bottom.

    embeddings -> text keys and values -> noise -> rollout, chunk by chunk -> decoder, chunk by chunk

`lf_jax.pipeline` puts prompts and files before it, `lf_jax.rollout` is what happens inside a chunk.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import cache as kv
from lf_jax import vae
from lf_jax.arrays import Array, Float, Key, Leaf, UInt8
from lf_jax.chunk import branches
from lf_jax.config import Config, check
from lf_jax.dit import WanDiT, text_cache
from lf_jax.inputs import video_chunks
from lf_jax.rollout import RolloutState, initial_state, prefill
from lf_jax.rollout import stream as rollout_chunks
from lf_jax.tokens import Grid
from lf_jax.video import to_uint8

DECODED_FRAMES = 3  # latent frames that are decoded at a time, so that memory does not grow with a chunk


@partial(jax.tree_util.register_dataclass, data_fields=["rollout", "vae"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class StreamState:
    """Everything that the rest of a video depends on: save it, fork it, resume it."""

    rollout: RolloutState
    vae: vae.VaeState | None  # of the decoder; None before the first frame


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Frames that were made together. The arrays may still be computing: reading them waits."""

    frames: Leaf  # uint8 [b, f, h, w, 3]
    latents: Leaf  # float32 [b, latent f, h, w, c], normalised
    state: StreamState  # after this chunk; consumed when the next one is asked for, so `fork` or save it before


def begin(config: Config, keys: Key[Array, " b"]) -> StreamState:
    """The state before the first frame of a video of `config.video.num_frames` pixel frames.

    Args:
        keys: of `lf_jax.noise.sample_key`, one a video.

    Raises:
        ValueError: if the frames do not fit.
    """
    return StreamState(initial_state(config, keys.shape[0], sum(video_chunks(config)), keys), vae=None)


def generate(
    model: WanDiT,
    autoencoder: vae.Vae,
    embeddings: Float[Array, "rows n text_dim"],
    state: StreamState,
    config: Config,
    given: Float[Array, "b f h w c"] | None = None,
) -> Iterator[Chunk]:
    """Makes the rest of a video; each chunk is yielded as soon as it is dispatched to the device.

    Args:
        embeddings: of the prompts, and under guidance of as many negative prompts after them.
        state: of `begin`, or of an earlier chunk; consumed.
        given: latents that the video goes on with before anything is generated: whole chunks.

    Raises:
        ValueError: if `state` does not belong to `config`, or is complete already.
    """
    check_state(state, config)
    text = compiled_text_cache(model, embeddings)
    left = sum(video_chunks(config)) - int(state.rollout.cache.end) - (0 if given is None else given.shape[1])
    check(left > 0, f"num_frames={config.video.num_frames} are complete in this state: expected more")

    def chunks() -> Iterator[Chunk]:
        start, past = state.rollout, state.vae
        if given is not None:
            start = _prefill(model, text, given, start, config)
            pixels, past = decode(autoencoder, given, past)
            yield Chunk(pixels, given, StreamState(start, past))
        for latents, done in rollout_chunks(model, text, None, start, config, left):
            # Dispatched before the next chunk is. A device runs its programs one after the other, so what the next chunk
            # hides is the work of the host: the copy to it, and the file.
            pixels, past = decode(autoencoder, latents, past)
            yield Chunk(pixels, latents, StreamState(done, past))

    return chunks()


def fetch(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same chunks with their frames in host memory, each once the next one is under way: the device goes on meanwhile.

    However long the video, the device holds the frames of two chunks. All states but the last are consumed when they come.
    """
    held = None
    for chunk in chunks:
        chunk.frames.copy_to_host_async()
        if held is not None:
            yield dataclasses.replace(held, frames=np.asarray(held.frames))
        held = chunk
    if held is not None:
        yield dataclasses.replace(held, frames=np.asarray(held.frames))


def decode(
    autoencoder: vae.Vae, latents: Float[Array, "b f h w c"], past: vae.VaeState | None
) -> tuple[UInt8[Array, "b g p q 3"], vae.VaeState]:
    """The pixels of a chunk, a few latent frames at a time, and what the decoder keeps of them; `past` is consumed."""
    pixels, start = [], 0
    for length in decode_lengths(latents.shape[1]):
        frames, past = decode_pixels(autoencoder, latents[:, start : start + length], past)
        pixels.append(frames)
        start += length
    return (pixels[0] if len(pixels) == 1 else jnp.concatenate(pixels, axis=1)), past


def decode_lengths(frames: int) -> tuple[int, ...]:
    """The parts in which a chunk of `frames` latent frames is decoded."""
    short = frames % DECODED_FRAMES
    return (short,) * (short > 0) + (DECODED_FRAMES,) * (frames // DECODED_FRAMES)


@partial(jax.jit, donate_argnames="past")
def decode_pixels(autoencoder: vae.Vae, latents: Array, past: vae.VaeState | None) -> tuple[Array, vae.VaeState]:
    """The next latent frames of a video as uint8 pixels, and what the decoder keeps; `past` is consumed."""
    video, past = vae.decode_chunk(autoencoder, latents, past)
    return to_uint8(video), past


def check_state(state: StreamState, config: Config) -> None:
    """Raises ValueError if `state` cannot go on under `config`, with what it holds and what was expected."""
    cache, rows = state.rollout.cache, state.rollout.keys.shape[0] * branches(config)
    settings = (config.model, Grid.of(config), config.cache, not config.sparsity.dense, rows, cache.frames)
    expected = jax.eval_shape(lambda: kv.empty(*settings))
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (cache, expected)]
    check(
        shapes[0] == shapes[1],
        f"state was made with other settings: its keys are {cache.k.dtype} {cache.k.shape} with sink {cache.sink}, "
        f"expected {expected.k.dtype} {expected.k.shape} with sink {expected.sink}",
    )
    planned, stride = planned_frames(state, config), config.vae.temporal_stride
    check(
        planned is None or sum(video_chunks(config)) <= planned,
        f"num_frames={config.video.num_frames} but state was planned for {1 + ((planned or 1) - 1) * stride} frames: "
        "expected at most as many",
    )


def planned_frames(state: StreamState, config: Config) -> int | None:
    """Latent frames that the whole video of a state can have: with a window and dense attention any number, None."""
    first, budgets, cache = video_chunks(config)[0], state.rollout.budgets, state.rollout.cache
    if budgets is not None:
        return first + (budgets.blocks.shape[0] - 1) * config.rollout.chunk_frames
    return None if config.cache.window is not None else cache.frames or first


compiled_text_cache = jax.jit(text_cache)
_prefill = jax.jit(prefill, static_argnames="config", donate_argnames="state")
