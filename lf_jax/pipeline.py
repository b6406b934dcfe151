"""Prompts and models to videos: the class that `lf_jax.load` returns. What it runs is in `lf_jax.generate`."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from lf_jax import loading, presets, programs
from lf_jax.arrays import Array, Float, Key, UInt8
from lf_jax.chunk import branches
from lf_jax.config import Config, check
from lf_jax.generate import Chunk, StreamState, begin, fetch, generate
from lf_jax.inputs import Pixels, check_runs, first_frames
from lf_jax.noise import sample_key
from lf_jax.text import Embeddings, clean

Seeds = int | np.integer | Sequence[int] | np.ndarray


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
        return np.concatenate([chunk.frames for chunk in fetch(self.stream(prompt, **options))], axis=1)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        seed: Seeds | None = None,
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
            seed: one for all (default 0), or one a video. A video depends on its own prompt and seed, not on what is beside it.
            num_frames: pixel frames of the whole video, given and resumed ones included; default `config.video`'s.
            negative_prompt: of models with guidance; default `config.video`'s.
            embeddings: of the prompts (and of the negative prompt under guidance), in place of the text encoder.
            initial_image: the first frame: uint8 [*b, h, w, 3] or a file. Needs `rollout.independent_first_frame`.
            initial_video: the first frames, to be continued: uint8 [*b, f, h, w, 3] or a file. They come out again.
            initial_latents: the same as normalised latents.
            state: of an earlier chunk, to go on from; consumed. The prompt may be another one; the seed is its own, so none
                is given.
            parts: of the config, in place of its own, e.g. `cache=Cache(window=12, sink=3)`.

        Raises:
            ValueError: naming what does not fit, with expected and received, before anything is computed.
        """
        config = self.configure(num_frames, negative_prompt, parts)
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        words = bool(prompts) and all(isinstance(one, str) for one in prompts)
        check(words, f"{prompt=} must be a string, or one or more of them")
        check_runs(config)
        check(state is None or seed is None, f"{seed=} has no use with a state, which goes on with its own")
        given = first_frames(self.vae, config, len(prompts), initial_image, initial_video, initial_latents)
        text = self.text(prompts, config, embeddings)  # the encoder is gone before the cache is allocated
        if state is None:
            state = begin(config, self.keys(prompts, 0 if seed is None else seed))
        else:
            check(given is None, "state holds the beginning of its video: expected no initial image, video or latents")
            videos = state.rollout.keys.shape[0]
            check(videos == len(prompts), f"state holds {videos} videos, expected {len(prompts)}: one a prompt")
        return generate(self.model, self.vae, text, state, config, given)

    def encode(self, prompts: str | Sequence[str]) -> Embeddings:
        """Loads the text encoder, encodes every prompt, and lets go of the encoder."""
        return encode_prompts(self.source, [prompts] if isinstance(prompts, str) else prompts)

    def text(
        self, prompts: Sequence[str], config: Config, embeddings: Embeddings | None = None
    ) -> Float[Array, "rows n text_dim"]:
        """The embeddings of prompts, and under guidance of as many negative prompts after them."""
        wanted = texts(prompts, config)
        if embeddings is None:
            if self._latest is None or not set(wanted) <= set(self._latest.prompts):
                self._latest = self.encode(wanted)
            embeddings = self._latest
        return jnp.asarray(embeddings.select(wanted))

    def keys(self, prompts: Sequence[str], seed: Seeds) -> Key[Array, " b"]:
        """The random keys of videos: of their own prompt and seed."""
        seeds = [int(n) for n in ([seed] * len(prompts) if np.ndim(seed) == 0 else seed)]
        check(len(seeds) == len(prompts), f"seed holds {len(seeds)} numbers, expected one, or {len(prompts)}")
        return jnp.stack([sample_key(n, clean(prompt)) for n, prompt in zip(seeds, prompts, strict=True)])

    def configure(self, num_frames: int | None = None, negative_prompt: str | None = None, parts: dict | None = None) -> Config:
        """The pipeline's config with a call's changes."""
        known = {field.name: type(getattr(self.config, field.name)) for field in dataclasses.fields(self.config)}
        for name, part in (parts or {}).items():
            check(
                name in known,
                f"unknown argument {name!r}: expected one of stream's, or a part of the config: {', '.join(known)}",
            )
            check(isinstance(part, known[name]), f"{name}={part!r} must be an lf_jax.config.{known[name].__name__}")
        fixed = {"model", "vae", "text"} & set(parts or {})
        check(not fixed, f"{', '.join(sorted(fixed))} cannot change after loading; `lf_jax.load(..., config=...)` takes them")
        config = with_frames(dataclasses.replace(self.config, **(parts or {})), num_frames)
        if negative_prompt is None:
            return config
        check(
            branches(config) == 2, f"{negative_prompt=} has no use at {config.rollout.guidance_scale=}: expected another scale"
        )
        return dataclasses.replace(config, video=dataclasses.replace(config.video, negative_prompt=negative_prompt))


def load(
    source: str | os.PathLike,
    config: Config | str | os.PathLike | None = None,
    *,
    seed: int | None = None,
    vae: str | os.PathLike | None = None,
) -> Pipeline:
    """Loads a converted folder, or random weights of a preset, which it says.

    Args:
        source: a folder written by `lf-jax convert`, or a preset's name.
        config: in place of the source's own settings: a config, a preset's name, or the path of a Python file. Taken
            by name or path, its `model`, `vae` and `text` give way to those of the source.
        seed: of random weights; None means 0. A folder takes none.
        vae: another autoencoder than the source's own: a converted folder that holds one, or of a preset with random
            weights "wan", "light" or "tiny".

    Raises:
        ValueError: no such folder, preset or file; files that are damaged or do not fit.
    """
    if isinstance(config, str | os.PathLike):
        config = loading.config_of(source, presets.load(config), vae)
    found = loading.find(source, config, seed, vae)
    if found.folder is None:
        print(f"lf_jax: {source} has random weights, seed {found.seed}: its videos are noise", file=sys.stderr)
    return Pipeline(found)


def encode_prompts(source: loading.Source, prompts: Sequence[str], advance: Callable[[], None] = lambda: None) -> Embeddings:
    """Encodes different prompts one at a time; `advance` is called after each. The encoder is in memory only meanwhile."""
    prompts = tuple(dict.fromkeys(prompts))
    with programs.ahead(programs.of_text(source.config.text)):
        encoder, tokenizer = source.text()
    ids, lengths = tokenizer(prompts)
    rows = []
    for i in range(len(prompts)):
        rows.append(np.asarray(programs.encode_text(encoder, ids[i : i + 1], lengths[i : i + 1])))
        advance()
    return Embeddings(np.concatenate(rows), lengths, prompts, source.fingerprint(encoder, tokenizer))


def texts(prompts: Sequence[str], config: Config) -> list[str]:
    """What is encoded for a batch: the prompts, and under guidance the negative prompt once for each of them."""
    return [*prompts] + [config.video.negative_prompt] * len(prompts) * (branches(config) - 1)


def with_frames(config: Config, num_frames: int | None) -> Config:
    """`config` with another number of pixel frames; None keeps its own."""
    video = config.video if num_frames is None else dataclasses.replace(config.video, num_frames=num_frames)
    return dataclasses.replace(config, video=video)
