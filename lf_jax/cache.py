"""The key-value cache: a ring of frames behind a fixed sink. Read while denoising, written once a chunk by `append`.

Frame `f` of a video lies in slot `f` until the slots run out; then every frame takes the slot of the oldest one that
is not a sink. Nothing is ever moved, and since the slots fill from the front, the filled ones are always a prefix.

A cache may have no slots at all: that of a video of one chunk, which has no past and is nobody's past. Such a cache only
counts frames.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from lf_jax import config, rope
from lf_jax.arrays import Array, Int, Leaf
from lf_jax.tokens import Grid


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pooled"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ChunkKV:
    """What one forward pass adds to the cache: of one layer, or of all with a leading [layer] axis."""

    k: Leaf  # [b, t padded to key blocks frame by frame, head, head_dim], after qk-norm and RoPE
    v: Leaf  # same shape
    pooled: Leaf  # [b, key block, head, head_dim] float32: mean key of every block, over live tokens; None if dense


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "pooled", "sink_k", "sink_pooled", "end"],
    meta_fields=["frames", "sink"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the committed frames, of all layers."""

    k: Leaf  # [layer, b, frames * padded frame, head, head_dim], rotated to absolute positions
    v: Leaf  # same shape
    pooled: Leaf  # [layer, b, frames * key blocks a frame, head, head_dim] float32; None where attention is dense
    sink_k: Leaf  # [layer, b, sink * padded frame, head, head_dim]: the sink where it was made; None if absolute
    sink_pooled: Leaf  # likewise of `pooled`
    end: Leaf  # [] int32: frames committed so far
    frames: int  # frame slots; 0 where nothing is kept
    sink: int  # the first slots, never reused


def empty(model: config.Model, grid: Grid, settings: config.Cache, sparse: bool, batch: int, frames: int) -> KVCache:
    """A cache that holds `settings.window` frames, or `frames` where there is no window.

    Args:
        sparse: keep the means of the key blocks, for block selection.
    """
    frames = settings.window or frames
    lead, head = (model.layers, batch), (model.heads, model.head_dim)
    relative = settings.positions == "relative" and settings.sink > 0

    def zeros(slots: int, dtype) -> Array:
        return jnp.zeros((*lead, slots, *head), dtype)

    return KVCache(
        k=zeros(frames * grid.padded_frame, config.dtype_of(model)),
        v=zeros(frames * grid.padded_frame, config.dtype_of(model)),
        pooled=zeros(frames * grid.frame_blocks, jnp.float32) if sparse else None,
        sink_k=zeros(settings.sink * grid.padded_frame, config.dtype_of(model)) if relative else None,
        sink_pooled=zeros(settings.sink * grid.frame_blocks, jnp.float32) if relative and sparse else None,
        end=jnp.zeros((), jnp.int32),
        frames=frames,
        sink=settings.sink,
    )


def slots(cache: KVCache, frames: int) -> Int[Array, " taken"]:
    """The slots that the next `frames` frames will take: one each, or none where there are no slots."""
    f = cache.end + jnp.arange(min(frames, cache.frames))
    return jnp.where(f < cache.frames, f, cache.sink + (f - cache.sink) % (cache.frames - cache.sink))


def visible(cache: KVCache, frames: int) -> Int[Array, " slots"]:
    """The absolute frame in every slot, or -1: empty, or about to give way to the next `frames` frames."""
    slot, ring = jnp.arange(cache.frames), cache.frames - cache.sink
    newest = cache.end - 1 - (cache.end - 1 - slot) % ring  # the largest committed frame that maps to this slot
    in_ring = jnp.where(newest >= cache.sink, newest, -1)
    frame = jnp.where(slot < cache.sink, jnp.where(slot < cache.end, slot, -1), in_ring)
    return frame.at[slots(cache, frames)].set(-1)


def dense_view(cache: KVCache, layer: Int[Array, ""], new: ChunkKV, frames: int) -> tuple[Array, Array, Int[Array, ""]]:
    """The keys and values [b, s, head, e] that a dense layer attends to, and how many of the slots, from the front.

    The chunk's own keys take the slots that `append` will give them, so what they displace is already out of sight.
    The copy is of one layer only; without slots there is none, and the view is the chunk.
    """
    if cache.frames == 0:
        return new.k, new.v, jnp.int32(new.k.shape[1])
    take = partial(jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False)
    where = slots(cache, frames)
    k, v = (_place(take(old), part, where, axis=1) for old, part in ((cache.k, new.k), (cache.v, new.v)))
    padded_frame = new.k.shape[1] // frames
    return k, v, jnp.minimum(cache.end + frames, cache.frames) * padded_frame


def append(cache: KVCache, new: ChunkKV, frames: int, next_frames: int) -> KVCache:
    """Commits a chunk of `frames` frames: the only writer. In place where the caller donates the cache.

    Args:
        new: of all layers.
        next_frames: frames of the chunk that follows. With relative positions the sink moves up to stand right
            before the window that that chunk will see. Attention depends on differences of positions only, so moving
            the sink alone equals rotating the whole window anew (Light Forcing's long-video mode).
    """
    where = slots(cache, frames)
    k, v = _place(cache.k, new.k, where, axis=2), _place(cache.v, new.v, where, axis=2)
    pooled = None if cache.pooled is None else _place(cache.pooled, new.pooled, where, axis=2)
    end = cache.end + frames
    sink_k, sink_pooled = cache.sink_k, cache.sink_pooled
    if sink_k is not None:
        gone = jnp.maximum(end + next_frames - cache.frames, 0)  # frames out of sight by the next chunk
        k, sink_k = _move_sink(k, sink_k, cache.end < cache.sink, gone)
        if pooled is not None:
            pooled, sink_pooled = _move_sink(pooled, sink_pooled, cache.end < cache.sink, gone)
    return KVCache(k, v, pooled, sink_k, sink_pooled, end, cache.frames, cache.sink)


def _place(slots: Array, new: Array, where: Int[Array, " f"], axis: int) -> Array:
    """Writes `new`, equal parts along `axis`, into the slots `where`, one part a slot."""
    for i in range(where.shape[0]):
        size = new.shape[axis] // where.shape[0]
        part = jax.lax.slice_in_dim(new, i * size, (i + 1) * size, axis=axis)
        slots = jax.lax.dynamic_update_slice_in_dim(slots, part.astype(slots.dtype), where[i] * size, axis)
    return slots


def _move_sink(keys: Array, sink: Array, filling: Array, gone: Int[Array, ""]) -> tuple[Array, Array]:
    """The cache with its sink `gone` frames later than it was made, and the sink as it was made."""
    sink = jnp.where(filling, keys[:, :, : sink.shape[2]], sink)
    return jax.lax.dynamic_update_slice_in_dim(keys, rope.shift_frames(sink, gone), 0, axis=2), sink
