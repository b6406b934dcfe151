"""From a prompt to a video: the whole story, top to bottom.

text -> its keys and values -> noise -> rollout, chunk by chunk -> pixels, chunk by chunk
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax import cache as kv
from lf_jax import loading, presets, vae
from lf_jax.arrays import Array, Float, Leaf, UInt8
from lf_jax.config import Config, check
from lf_jax.dit import TextCache, text_cache
from lf_jax.inputs import Pixels, first_frames, video_chunks
from lf_jax.noise import sample_key
from lf_jax.rollout import RolloutState, branches, initial_state, prefill
from lf_jax.rollout import stream as generated
from lf_jax.text import Embeddings, clean, encode
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


class Pipeline:
    """A transformer and an autoencoder in memory, and a text encoder that is loaded only while prompts are encoded.

    Attributes:
        config: every setting. Calls may replace its parts `cache`, `sparsity`, `rollout` and `video`.
    """

    def __init__(self, source: loading.Source):
        self.source, self.config = source, source.config
        self.model, self.vae = source.dit(), source.vae()
        self._latest: Embeddings | None = None  # to sample the same prompts again costs no encoding

    def __call__(self, prompt: str | Sequence[str], **options) -> UInt8[np.ndarray, "b f h w 3"]:
        """One video a prompt, in host memory. Options as in `stream`."""
        videos = []
        for chunk in self.stream(prompt, **options):  # asks for the next chunk while this one is still computing
            chunk.frames.copy_to_host_async()
            videos.append(chunk.frames)
        return np.concatenate(videos, axis=1)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_frames: int | None = None,
        negative_prompt: str | None = None,
        embeddings: Embeddings | None = None,
        initial_image: Pixels | None = None,
        initial_video: Pixels | None = None,
        initial_latents: Float[Array, "b f h w c"] | None = None,
        state: StreamState | None = None,
        **parts,
    ) -> Iterator[Chunk]:
        """Generates chunk by chunk; each chunk is yielded as soon as it is dispatched to the device.

        Args:
            prompt: one, or one a video.
            seed: one for all, or one a video. A video depends on its own prompt and seed, not on what is beside it.
            num_frames: pixel frames of the whole video, given and resumed ones included; default `config.video`'s.
            negative_prompt: of models with guidance; default `config.video`'s.
            embeddings: of the prompts (and of the negative prompt under guidance), in place of the text encoder.
            initial_image: the first frame: uint8 [*b, h, w, 3] or a file. Needs `rollout.independent_first_frame`.
            initial_video: the first frames, to be continued: uint8 [*b, f, h, w, 3] or a file. They come out again.
            initial_latents: the same as normalised latents.
            state: of an earlier chunk, to go on from; consumed. The prompt may be another one, the seed is the state's.
            parts: of the config, in place of its own, e.g. `cache=Cache(window=12, sink=3)`.

        Raises:
            ValueError: naming what does not fit, with expected and received, before anything is computed.
        """
        config = self.configure(num_frames, negative_prompt, parts)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        frames = sum(video_chunks(config))
        given = first_frames(self.vae, config, len(prompts), initial_image, initial_video, initial_latents)
        text = self.text(prompts, config, embeddings)
        if state is None:
            seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
            check(len(seeds) == len(prompts), f"seed holds {len(seeds)} numbers, expected one, or {len(prompts)}")
            keys = jnp.stack([sample_key(n, clean(one)) for n, one in zip(seeds, prompts, strict=True)])
            state = StreamState(initial_state(config, len(prompts), frames, keys), vae=None)
            left = frames - (0 if given is None else given.shape[1])
        else:
            check(given is None, "state holds the beginning of its video: expected no initial image, video or latents")
            check_state(state, config, len(prompts))
            left = frames - int(state.rollout.cache.end)
            check(left > 0, f"num_frames={config.video.num_frames} are complete in this state: expected more")
        return self._stream(text, config, given, state, left)

    def _stream(self, text: TextCache, config: Config, given: Array | None, state: StreamState, left: int) -> Iterator[Chunk]:
        past = state.vae
        if given is not None:
            done = _prefill(self.model, text, given, state.rollout, config)
            pixels, past = self._decode(given, past)
            state = StreamState(done, past)
            yield Chunk(pixels, given, state)
        for latents, done in generated(self.model, text, None, state.rollout, config, left):
            pixels, past = self._decode(latents, past)  # dispatched before the next chunk is
            yield Chunk(pixels, latents, StreamState(done, past))

    def encode(self, prompts: str | Sequence[str]) -> Embeddings:
        """Loads the text encoder, encodes every prompt, and lets go of the encoder."""
        return encode_prompts(self.source, [prompts] if isinstance(prompts, str) else prompts)

    def text(self, prompts: Sequence[str], config: Config, embeddings: Embeddings | None = None) -> TextCache:
        """Keys and values of the prompts, and under guidance of as many negative prompts after them."""
        if embeddings is None:
            if self._latest is None or not set(texts(prompts, config)) <= set(self._latest.prompts):
                self._latest = self.encode(texts(prompts, config))
            embeddings = self._latest
        return _text_cache(self.model, embeddings.select(texts(prompts, config)))

    def configure(self, num_frames: int | None = None, negative_prompt: str | None = None, parts: dict | None = None) -> Config:
        """The pipeline's config with a call's changes."""
        fixed = {"model", "vae", "text"} & set(parts or {})
        check(not fixed, f"{', '.join(sorted(fixed))} cannot change after loading; `lf_jax.load(..., config=...)` takes them")
        config = with_frames(dataclasses.replace(self.config, **(parts or {})), num_frames)
        if negative_prompt is None:
            return config
        return dataclasses.replace(config, video=dataclasses.replace(config.video, negative_prompt=negative_prompt))

    def _decode(self, latents: Array, past: vae.VaeState | None) -> tuple[Array, vae.VaeState]:
        pixels, start = [], 0
        for end in range(latents.shape[1] % DECODED_FRAMES or DECODED_FRAMES, latents.shape[1] + 1, DECODED_FRAMES):
            frames, past = decode_pixels(self.vae, latents[:, start:end], past)
            pixels.append(frames)
            start = end
        return (pixels[0] if len(pixels) == 1 else jnp.concatenate(pixels, axis=1)), past


def load(source: str | os.PathLike, config: Config | str | os.PathLike | None = None, *, seed: int = 0) -> Pipeline:
    """Loads a converted folder, or random weights of a preset, which it says.

    Args:
        source: a folder written by `lf-jax convert`, or a preset's name.
        config: in place of the source's own settings: a config, a preset's name, or the path of a Python file. Taken
            by name or path, its `model`, `vae` and `text` give way to those of the source.
        seed: of random weights.

    Raises:
        ValueError: no such folder, preset or file; files that are damaged or do not fit.
    """
    if isinstance(config, str | os.PathLike):
        config = loading.config_of(source, presets.load(config))
    found = loading.find(source, config, seed)
    if found.folder is None:
        print(f"lf_jax: {source} has random weights, seed {seed}: its videos are noise", file=sys.stderr)
    return Pipeline(found)


def encode_prompts(source: loading.Source, prompts: Sequence[str], advance: Callable[[], None] = lambda: None) -> Embeddings:
    """Encodes different prompts one at a time; `advance` is called after each. The encoder is in memory only meanwhile."""
    prompts = tuple(dict.fromkeys(prompts))
    encoder, tokenizer = source.text()
    ids, lengths = tokenizer(prompts)
    rows = []
    for i in range(len(prompts)):
        rows.append(np.asarray(_encode(encoder, ids[i : i + 1], lengths[i : i + 1])))
        advance()
    return Embeddings(np.concatenate(rows), lengths, prompts, source.fingerprint(encoder, tokenizer))


def check_state(state: StreamState, config: Config, batch: int) -> None:
    """Raises ValueError if `state` cannot go on under `config`, with what it holds and what was expected."""
    check(isinstance(state, StreamState), f"state is a {type(state).__name__}, expected an lf_jax.StreamState")
    videos, cache = state.rollout.keys.shape[0], state.rollout.cache
    check(videos == batch, f"state holds {videos} videos, expected {batch}: one a prompt")
    expected = jax.eval_shape(
        lambda: kv.empty(
            config.model, Grid.of(config), config.cache, not config.sparsity.dense, batch * branches(config), cache.frames
        )
    )
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (cache, expected)]
    check(
        shapes[0] == shapes[1],
        f"state was made with other settings: its keys are {cache.k.dtype} {cache.k.shape} with sink {cache.sink}, "
        f"expected {expected.k.dtype} {expected.k.shape} with sink {expected.sink}",
    )


def texts(prompts: Sequence[str], config: Config) -> list[str]:
    """What is encoded for a batch: the prompts, and under guidance the negative prompt once for each of them."""
    return [*prompts] + [config.video.negative_prompt] * len(prompts) * (branches(config) - 1)


def with_frames(config: Config, num_frames: int | None) -> Config:
    """`config` with another number of pixel frames; None keeps its own."""
    return (
        config
        if num_frames is None
        else dataclasses.replace(config, video=dataclasses.replace(config.video, num_frames=num_frames))
    )


@partial(jax.jit, donate_argnames="past")
def decode_pixels(autoencoder: vae.Vae, latents: Array, past: vae.VaeState | None) -> tuple[Array, vae.VaeState]:
    """The next latent frames of a video as uint8 pixels, and what the decoder keeps; `past` is consumed."""
    video, past = vae.decode_chunk(autoencoder, latents, past)
    return to_uint8(video), past


_encode = jax.jit(encode)
_text_cache = jax.jit(text_cache)
_prefill = jax.jit(prefill, static_argnames="config", donate_argnames="state")
