"""Videos of 15 s and of 60 s through a window: neither memory nor the work of a chunk grows with the video."""

import dataclasses
import gc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from lf_jax import plan, presets
from lf_jax.checkpoint import component
from lf_jax.chunk import compiled_chunk, next_chunk
from lf_jax.config import Cache, Config
from lf_jax.dit import text_cache
from lf_jax.generate import decode_pixels
from lf_jax.inputs import video_chunks
from lf_jax.pipeline import with_frames
from lf_jax.rollout import RolloutState, initial_state
from lf_jax.sparsity import chunk_budgets
from lf_jax.tokens import Grid

FRAMES = (249, 969)  # of 15 s and 60 s, at 16 a second
LONG = presets.load("light_forcing_long_1_3b")


def state_of(config: Config) -> RolloutState:
    """The state before the first chunk: its budgets are numbers, all else is shapes."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return jax.eval_shape(partial(initial_state, config, 1, sum(video_chunks(config))), keys)


@pytest.mark.parametrize("name", ["light_forcing_long_1_3b", "longlive_1_3b"])
def test_a_minute_takes_the_memory_of_a_quarter_minute(name):
    quarter, minute = (plan.memory(with_frames(presets.load(name), frames)) for frames in FRAMES)
    assert quarter == minute


def test_one_step_at_full_size_serves_every_chunk():
    """A chunk's number and budget are no shapes, and what comes out of the step has the shapes that went in."""
    model, state = component.abstract(LONG.model), state_of(with_frames(LONG, FRAMES[1]))
    text = jax.eval_shape(text_cache, model, jnp.zeros((1, LONG.text.length, LONG.text.dim), jnp.bfloat16))
    budget = dataclasses.replace(state.budgets, blocks=plan.SCALAR)
    step = partial(next_chunk, config=LONG, frames=3)
    latents, cache = jax.eval_shape(step, model, text, None, state.cache, state.keys, plan.SCALAR, budget)
    assert latents.shape == (1, 3, 64, 96, 16)
    assert cache == state.cache


@pytest.mark.parametrize("frames", FRAMES)
def test_the_work_of_a_chunk_falls_once_the_window_is_full(frames):
    lengths = video_chunks(with_frames(LONG, frames))
    blocks = chunk_budgets(lengths, 0, Grid.of(LONG), LONG.sparsity, LONG.cache).blocks
    full = LONG.cache.window // LONG.rollout.chunk_frames - 1
    assert blocks[full] == max(blocks[1:]) and (np.diff(blocks[full:]) <= 0).all()


def test_fifteen_seconds_in_constant_memory():
    """Pixels included: one program for all chunks and one for all pixels after the first."""
    pipe = small.pipe()
    settings = {"cache": Cache(window=12, sink=1, positions="relative"), "num_frames": FRAMES[0]}
    compiled_chunk.clear_cache()
    decode_pixels.clear_cache()
    gc.collect()
    seen, live = [], []
    for chunk in pipe.stream("a red ball", **settings):
        seen.append(np.array(chunk.frames))
        live.append(sum(array.nbytes for array in jax.live_arrays()))
    assert sum(frames.shape[1] for frames in seen) == FRAMES[0] and len(live) == 21
    assert len(set(live[2:])) == 1
    assert (compiled_chunk._cache_size(), decode_pixels._cache_size()) == (1, 2)
    assert all(frames.std() > 1 for frames in seen)
