"""The attention of a layer: self-attention over the cache and the chunk, dense or block-sparse, and cross-attention."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lf_jax import cache as kv
from lf_jax import config, sparsity
from lf_jax.arrays import Array, Float, Int, Leaf
from lf_jax.cache import ChunkKV, KVCache
from lf_jax.tokens import Grid
from pallas_kernels import BlockMap, Past, block_sparse_attention, platform
from pallas_kernels.block_sparse.api import IMPLEMENTATIONS, explain

ROWS = 512  # query tokens whose logits XLA holds at a time: 0.8 GB at 12 heads and 32k keys, where all of 4608 take 7 GB


def self_attention(
    q: Float[Array, "b t head e"],
    new: ChunkKV,
    cache: KVCache,
    layer: Int[Array, ""],
    time: sparsity.Timeline | None,
    budget: sparsity.Budget | None,
    grid: Grid,
    settings: config.Sparsity,
    means: Float[Array, "b query_block head e"] | None = None,
    marginal: Callable[[Array], Array] | None = None,
) -> Float[Array, "b t head e"]:
    """Attends from a chunk to the visible frames of the cache and to the whole chunk; the cache is only read.

    Args:
        q: whole frames of `grid.frame_tokens` tokens, after qk-norm and RoPE.
        new: keys and values of the same frames, as the cache will hold them.
        layer: which layer of the cache.
        time: the order of the key blocks, `sparsity.timeline` of the chunk; None where `settings` is dense.
        budget: key blocks a query block may visit in this chunk; likewise.
        means: float32, the mean query of every query block, where it is known already.
        marginal: projects what linear attention reads of the blocks that are left out, which is then added (SLA).

    Raises:
        ValueError: if `q` is not made of whole frames, or a sparse policy comes without a timeline or a budget.
    """
    frames, over = divmod(q.shape[1], grid.frame_tokens)
    config.check(over == 0, f"q has {q.shape[1]} tokens, expected a multiple of {grid.frame_tokens=}")
    for name, value in (("timeline", time), ("budget", budget)):
        config.check(settings.dense or value is not None, f"policy {settings.policy!r} needs a {name}, received None")
    if settings.dense:
        with jax.named_scope("attend"):
            keys, values, length = kv.dense_view(cache, layer, new, frames)
            keys, values = (without_padding(x, grid) for x in (keys, values))
            length = length // grid.padded_frame * grid.frame_tokens
            return dense_attention(q, keys, values, length, settings.implementation)
    with jax.named_scope("select"):
        inputs = sparsity.Inputs(q, new, cache, layer, time, budget, grid, settings, means)
        blocks = sparsity.select(inputs)
    with jax.named_scope("attend"):
        out = block_sparse_attention(
            q,
            new.k,
            new.v,
            blocks,
            scale=q.shape[-1] ** -0.5,
            past=Past(cache.k, cache.v, layer) if cache.frames else None,
            frame_tokens=grid.frame_tokens,
            implementation=settings.implementation,
        )
    if marginal is not None:
        with jax.named_scope("marginal"):
            out += marginal(sparsity.linear_attention(inputs, blocks))
    return out


def implementations(settings: config.Config) -> dict[str, str | None]:
    """The implementations that self-attention may use, the first choice first: why one cannot run here, or None if it can.

    Raises:
        ValueError: if the selector or the implementation that `settings` name is unknown.
        NotImplementedError: if the named implementation cannot run here.
    """
    q, named = queries(settings), settings.sparsity.implementation
    if settings.sparsity.dense:
        can = automatic = dense_implementations(q)
    else:
        sparsity.selector(settings.sparsity.policy)
        grid = Grid.of(settings)
        rows = (1, settings.model.heads, grid.query_blocks(settings.rollout.chunk_frames))
        index, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((*rows, grid.frame_blocks), rows))
        can = explain(q, BlockMap(index, count, grid.block_q, grid.block_k))
        automatic = {name: reason for name, reason in can.items() if IMPLEMENTATIONS[name].automatic}
    if named is None:
        return automatic
    config.check(named in can, f"sparsity.implementation={named!r} must be one of {', '.join(can)}, or None")
    if can[named] is not None:
        raise NotImplementedError(f"sparsity.implementation={named!r}: {can[named]}")
    return {named: None}


def dense_implementations(q: Leaf) -> dict[str, str | None]:
    """The same for dense attention of such queries."""
    return {name: choice.reason(q) for name, choice in DENSE.items()}


def queries(settings: config.Config) -> jax.ShapeDtypeStruct:
    """The queries of one chunk of one video."""
    model, tokens = settings.model, settings.rollout.chunk_frames * Grid.of(settings).frame_tokens
    return jax.ShapeDtypeStruct((1, tokens, model.heads, model.head_dim), config.dtype_of(model))


def cross_attention(
    q: Float[Array, "b t head e"], k: Float[Array, "b n head e"], v: Float[Array, "b n head e"]
) -> Float[Array, "b t head e"]:
    """Attends from every token to every text row, the rows after the prompt included."""
    return dense_attention(q, k, v)


def dense_attention(
    q: Float[Array, "b t head e"],
    k: Float[Array, "b s head e"],
    v: Float[Array, "b s head e"],
    length: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t head e"]:
    """Softmax attention at scale 1/sqrt(e) over the first `length` keys, or all of them.

    Args:
        implementation: a name of `DENSE` runs or raises; None takes the first of them that can run the call: "cudnn"
            on NVIDIA GPUs in 16 bits, else "xla".

    Raises:
        ValueError: for a name that is not in `DENSE`.
        NotImplementedError: if the named implementation cannot run this call.
    """
    if implementation is None:
        implementation = next(name for name, choice in DENSE.items() if choice.reason(q) is None)
    config.check(implementation in DENSE, f"{implementation=} must be one of {', '.join(DENSE)}, or None")
    reason = DENSE[implementation].reason(q)
    if reason is not None:
        raise NotImplementedError(f"dense attention with {implementation=}: {reason}")
    return DENSE[implementation].run(q, k, v, length)


def chunk_kv(
    k: Float[Array, "b t head e"], v: Float[Array, "b t head e"], grid: Grid, pool: bool, implementation: str | None = None
) -> ChunkKV:
    """The keys and values of a chunk as the cache holds them: every frame padded with zeros to whole key blocks.

    Args:
        pool: whether selection will need the mean keys.
        implementation: of these means; one of `pallas_kernels.selection`.
    """
    k, v = (with_padding(x, grid) for x in (k, v))
    return ChunkKV(k, v, sparsity.pool_keys(k, grid, implementation) if pool else None)


def with_padding(x: Float[Array, "b t head e"], grid: Grid) -> Float[Array, "b padded head e"]:
    """Live tokens of whole frames -> the same frames with the token slots that fill their last key block."""
    frames = x.reshape(x.shape[0], -1, grid.frame_tokens, *x.shape[2:])
    frames = jnp.pad(frames, ((0, 0), (0, 0), (0, grid.padded_frame - grid.frame_tokens), (0, 0), (0, 0)))
    return frames.reshape(x.shape[0], -1, *x.shape[2:])


def without_padding(x: Float[Array, "b padded head e"], grid: Grid) -> Float[Array, "b t head e"]:
    """The inverse of `with_padding`."""
    frames = x.reshape(x.shape[0], -1, grid.padded_frame, *x.shape[2:])
    return frames[:, :, : grid.frame_tokens].reshape(x.shape[0], -1, *x.shape[2:])


def _cudnn_reason(q: Leaf) -> str | None:
    device = platform.device()
    if device.compute_capability is None or device.compute_capability < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, this is {device.kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, received {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"needs a head_dim that is a multiple of 8 up to 128, received {q.shape[-1]}"
    return None


def _cudnn(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    lengths = None if length is None else jnp.broadcast_to(length, q.shape[:1]).astype(jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def _xla(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    mask = None if length is None else (jnp.arange(k.shape[1]) < length)[None, None, None]
    attend = partial(jax.nn.dot_product_attention, key=k, value=v, mask=mask, implementation="xla")
    b, t, *head = q.shape
    if t <= ROWS:
        return attend(q)
    parts = jnp.pad(q, ((0, 0), (0, -t % ROWS), (0, 0), (0, 0))).reshape(b, -1, ROWS, *head)
    out = jax.lax.map(jax.checkpoint(attend), jnp.moveaxis(parts, 1, 0))
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, *head)[:, :t]


class Dense(NamedTuple):
    reason: Callable[[Leaf], str | None]  # why it cannot run for such queries here; None if it can
    run: Callable[[Array, Array, Array, Array | None], Array]


DENSE: dict[str, Dense] = {  # in order of preference
    "cudnn": Dense(_cudnn_reason, _cudnn),
    "xla": Dense(lambda q: None, _xla),
}
