"""Selectors to compare with: one-stage top-k, sink and window, everything, chance, and the true attention mass."""

import dataclasses

import jax
import jax.numpy as jnp

from lf_jax.arrays import Array, Float
from lf_jax.sparsity.select import Inputs, best_blocks, block_scores, live_tokens
from pallas_kernels import BlockMap


def topk(inputs: Inputs) -> BlockMap:
    """A selector: the best blocks by pooled score among all that are visible (one stage)."""
    return best_blocks(inputs, block_scores(inputs))


def window(inputs: Inputs) -> BlockMap:
    """A selector: the chunk, the sink frames and the near frames, in this order as far as the budget goes."""
    settings, time, slots = inputs.settings, inputs.time, inputs.cache.frames
    frame = jnp.arange(slots)
    rank = jnp.where(frame < settings.sink_frames, float(slots), frame.astype(jnp.float32))  # newest first after the sink
    rank = jnp.concatenate([jnp.repeat(rank, time.frame_blocks), jnp.full(time.current, slots + 1.0)])
    most = jnp.minimum(time.past, settings.sink_frames + settings.near_frames) * time.frame_blocks + time.current
    budget = dataclasses.replace(inputs.budget, blocks=jnp.minimum(inputs.budget.blocks, most))
    return best_blocks(dataclasses.replace(inputs, budget=budget), jnp.broadcast_to(rank, (*_rows(inputs), *rank.shape)))


def full(inputs: Inputs) -> BlockMap:
    """A selector: every visible block, in the order of time, as far as the budget goes: dense attention as lists."""
    return best_blocks(inputs, jnp.zeros((*_rows(inputs), *inputs.time.blocks.shape)))


def random(inputs: Inputs) -> BlockMap:
    """A selector: any visible blocks. Drawn anew for every layer, head, query block and chunk; the same in every step of a
    chunk and for every video of a batch, so that a video does not depend on what is beside it.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), inputs.layer), inputs.cache.end)
    b, *rows = _rows(inputs)
    scores = jax.random.uniform(key, (*rows, *inputs.time.blocks.shape))
    return best_blocks(inputs, jnp.broadcast_to(scores, (b, *scores.shape)))


def oracle(inputs: Inputs) -> BlockMap:
    """A selector: the blocks that hold the most attention, computed densely. Shows how much a better choice could gain.

    Costs dense attention and a copy of one layer's keys.
    """
    return best_blocks(inputs, attention_mass(inputs))


def attention_mass(inputs: Inputs) -> Float[Array, "b head query_block key_block"]:
    """Softmax probability that the tokens of a query block give to each key block, mean over tokens; float32.

    Key blocks in the order of `inputs.time`; the rows add up to 1.
    """
    q, grid, visible = inputs.q, inputs.grid, inputs.time.visible
    b, t, head, e = q.shape
    keys = inputs.of_layer("k").reshape(b, -1, grid.block_k, head, e)[:, inputs.time.blocks]
    token_lives = jnp.arange(grid.block_k) < jnp.asarray(live_tokens(grid))[:, None]  # [block of a frame, token]
    attended = visible[:, None] & jnp.tile(token_lives, (visible.shape[0] // grid.frame_blocks, 1))
    pad = -t % grid.block_q
    queries = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, -1, grid.block_q, head, e)
    query_lives = (jnp.arange(t + pad) < t).reshape(-1, grid.block_q)

    def mass(block: tuple[Array, Array]) -> Array:
        rows, lives = block
        logits = jnp.einsum("bthe,bkjhe->bhtkj", rows, keys, preferred_element_type=jnp.float32) * e**-0.5
        logits = jnp.where(attended, logits, -jnp.inf)
        share = jax.nn.softmax(logits, axis=(-2, -1)).sum(-1)
        return jnp.einsum("bhtk,t->bhk", share, lives / lives.sum())

    return jnp.moveaxis(jax.lax.map(mass, (jnp.moveaxis(queries, 1, 0), query_lives)), 0, 2)


def _rows(inputs: Inputs) -> tuple[int, int, int]:
    """Batch, heads and query blocks."""
    b, t, head, _ = inputs.q.shape
    return b, head, -(-t // inputs.grid.block_q)
