"""What a policy's lists hold of the attention that they leave out: the layers of the network, run with their eyes open.

`lf_jax.dit.forward` returns what its chunk adds to the cache, not what its attention did. This pass goes through the same
blocks with attention over everything visible, and lets every policy choose from the queries and keys that it meets.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from lf_jax import attention, config, sparsity
from lf_jax.arrays import Array, Float
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.dit import TextCache, WanDiT
from lf_jax.dit.block import Block, SelfAttention
from lf_jax.dit.model import embed_time, over_layers, patchify, turns
from lf_jax.sparsity.baselines import attention_mass
from lf_jax.tokens import Grid
from pallas_kernels import BlockMap


class Reading(NamedTuple):
    """What one policy chose in one layer; all layers have a leading [layer] axis."""

    recall: Array  # [head, query block]: share of the true attention mass that the chosen key blocks hold
    density: Array  # []: chosen over visible key blocks, mean over heads and query blocks
    reads: Array  # [key block], in the order of time: share of the heads whose middle query block reads it


def read(
    model: WanDiT,
    x: Float[Array, "b f h w c"],
    timestep: Float[Array, "b f"],
    text: TextCache,
    cache: KVCache,
    budget: sparsity.Budget,
    budgets: tuple[sparsity.Budget, ...],
    grid: Grid,
    full: config.Sparsity,
    policies: tuple[config.Sparsity, ...],
) -> tuple[Reading, ...]:
    """The choice of every policy in every layer, where the layers before attend to everything; of the first of the batch.

    Args:
        budget: of every visible block, for `full`.
        budgets: one a policy.
        full: the policy "full": it goes through the cache of the sparse ones.
    """
    _, modulation = embed_time(model, timestep)
    turn, time = turns(model, cache, x.shape[1], grid), sparsity.timeline(cache, x.shape[1], grid)

    def layer(tokens: Array, index: Array, block: Block, text: TextCache) -> tuple[Array, list[Reading]]:
        readings = []

        def attend(own: SelfAttention, qkv: Array) -> tuple[Array, ChunkKV]:
            q, means, new = own.queries_keys(qkv, turn, grid, pool=True)
            out = attention.self_attention(q, new, cache, index, time, budget, grid, full, means)
            given = sparsity.Inputs(q, new, cache, index, time, budget, grid, full, means)
            mass = attention_mass(given)
            for settings, allowed in zip(policies, budgets, strict=True):
                chosen = sparsity.select(dataclasses.replace(given, budget=allowed, settings=settings))
                readings.append(_reading(chosen, mass, time))
            return out, new

        tokens, _ = block(tokens, modulation, text.k, text.v, attend)
        return tokens, readings

    _, readings = over_layers(model, layer, patchify(model, x), text)
    return tuple(readings)


def _reading(chosen: BlockMap, mass: Float[Array, "b head q k"], time: sparsity.Timeline) -> Reading:
    order = jnp.argsort(time.blocks)  # of a block of the map, its place in time
    index, count = order[chosen.index[0]], chosen.count[0]
    kept = jnp.arange(index.shape[-1]) < count[..., None]
    recall = jnp.where(kept, jnp.take_along_axis(mass[0], index, axis=-1), 0).sum(-1)
    middle = index.shape[1] // 2
    reads = jnp.zeros(order.shape[0]).at[index[:, middle]].add(kept[:, middle]) / index.shape[0]
    visible = time.past * time.frame_blocks + time.current
    return Reading(recall, jnp.mean(count / visible), reads)
