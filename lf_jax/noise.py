"""The seed contract: noise depends on seed, prompt, chunk and step, and on nothing else.

    normal(fold_in(fold_in(key(seed), prompt hash), chunk))              a chunk's starting noise
    normal(fold_in(fold_in(fold_in(key(seed), prompt hash), chunk), step))    the noise put back after a step

So a video is the same alone, in any batch, in any order, on any number of devices, and a longer video starts with the
noise of a shorter one. Everything is drawn in float32; users of it round.
"""

import hashlib

import jax
import jax.numpy as jnp

from lf_jax.arrays import Array, Float, Int, Key


def prompt_hash(prompt: str) -> int:
    """A number that is the same in every process: the first 4 bytes, big-endian, of the SHA-256 of the UTF-8 text."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:4], "big")


def sample_key(seed: int, prompt: str) -> Key[Array, ""]:
    """The key of one video. `prompt` should be as the tokenizer cleans it, so that stray spaces do not count.

    Two videos of one prompt need two seeds.
    """
    return jax.random.fold_in(jax.random.key(seed), jnp.uint32(prompt_hash(prompt)))


def chunk_noise(keys: Key[Array, " b"], chunk: Int[Array, ""] | int, shape: tuple[int, ...]) -> Float[Array, "b f h w c"]:
    """The noise that a chunk starts from.

    Args:
        keys: of `sample_key`, one a video.
        chunk: position of the chunk in the video, counted from 0.
        shape: (frames, height, width, channels) of the chunk's latents.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, chunk), shape, jnp.float32))(keys)


def step_noise(
    keys: Key[Array, " b"], chunk: Int[Array, ""] | int, step: Int[Array, ""] | int, shape: tuple[int, ...]
) -> Float[Array, "b f h w c"]:
    """The noise put on the x0 predicted at `step` of `chunk`. The noise of the cached context counts as one step more."""
    return chunk_noise(jax.vmap(lambda key: jax.random.fold_in(key, chunk))(keys), step, shape)


def video_noise(
    keys: Key[Array, " b"], first: int, lengths: tuple[int, ...], shape: tuple[int, ...]
) -> Float[Array, "b f h w c"]:
    """The starting noise of several chunks, one after the other.

    Args:
        first: position of the first chunk in the video.
        lengths: latent frames of every chunk.
        shape: (height, width, channels) of a latent frame.
    """
    return jnp.concatenate([chunk_noise(keys, first + i, (n, *shape)) for i, n in enumerate(lengths)], axis=1)
