"""Gradients of block-sparse attention, Triton-lowered Pallas, and the differentiable whole. See `triton_forward.py`.

With p = exp(scale * q k^T - lse), dp = dout v^T and ds = p * (dp - delta), delta = rowsum(dout * out) - dlse:

    dq = scale * ds k       a program holds queries and walks their list, as the forward does
    dv = p^T dout           a program holds keys and walks the queries that name them: the map transposed
    dk = scale * ds^T q

Two kernels make seven products where one would need five, but every sum is made in one program in a fixed order: the
gradients are the same in every run, without atomics.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.block_sparse import lists
from pallas_kernels.block_sparse.differentiable import attend
from pallas_kernels.block_sparse.triton_forward import (
    LOG2E,
    Config,
    Shape,
    Source,
    call,
    choose,
    dot,
    forward,
    kept,
    live_tokens,
    load,
    query_specs,
    source_specs,
    sources,
    unsupported,
    visits,
)
from pallas_kernels.block_sparse.types import BlockMap, Past


@dataclasses.dataclass(frozen=True)
class Configs:
    """Of the three kernels."""

    forward: Config
    queries: Config
    keys: Config


def default_configs(q: jax.Array, blocks: BlockMap) -> Configs:
    """Tiles that fit the default device."""
    return Configs(
        forward=choose(q, blocks.block_q, blocks.block_k, most_rows=128, tensors=1),
        queries=choose(q, blocks.block_q, blocks.block_k, most_rows=64, tensors=2),
        keys=choose(q, blocks.block_k, blocks.block_q, most_rows=64, tensors=2),
    )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: BlockMap,
    past: Past | None,
    scale: float,
    frame_tokens: int | None,
    *,
    configs: Configs | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.block_sparse_attention`; returns (out, lse), both differentiable.

    Args:
        configs: None chooses by shape and device.
        interpret: run on any device, slowly, through the Pallas interpreter.

    Raises:
        NotImplementedError: if no such kernel can be built, with the reason.
    """
    cannot = unsupported(q, blocks)
    if cannot is not None:
        raise NotImplementedError(f"block-sparse attention through Triton: {cannot}")
    return attend(Triton(scale, frame_tokens, configs or default_configs(q, blocks), interpret), q, k, v, past, blocks)


@dataclasses.dataclass(frozen=True)
class Triton:
    """See `differentiable.Kernels`."""

    scale: float
    frame_tokens: int | None
    configs: Configs
    interpret: bool

    def _of(self, config: Config) -> dict[str, Any]:
        return dict(scale=self.scale, frame_tokens=self.frame_tokens, config=config, interpret=self.interpret)

    def forward(self, q, k, v, blocks, past):
        return forward(q, k, v, blocks, past, **self._of(self.configs.forward))

    def backward(self, q, k, v, blocks, past, out, lse, dout, dlse, past_gradient):
        delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - dlse
        products = (q, dout, lse, delta, k, v, past, blocks)
        dq = queries(*products, **self._of(self.configs.queries))
        *layer, (dk, dv) = keys(*products, past_gradient=past_gradient, **self._of(self.configs.keys))
        return dq, dk, dv, layer[0] if layer else None


def queries(
    q: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past: Past | None,
    blocks: BlockMap,
    *,
    scale: float,
    frame_tokens: int | None,
    config: Config,
    interpret: bool = False,
) -> jax.Array:
    """The gradient of q, [b, tq, head, e]. lse, delta: [b, head, tq] float32; config: `rows` are queries, `columns` keys."""
    b, tq, heads, e = q.shape
    shape = Shape(blocks, config, past, frame_tokens)

    def kernel(walk, places, q_ref, dout_ref, lse_ref, delta_ref, dq_ref):
        keep = kept(tq, config.rows, pl.program_id(0) * config.rows, config.rows)
        tile, dtile = load(q_ref, keep), load(dout_ref, keep)
        top, delta = load(lse_ref, keep) * LOG2E, load(delta_ref, keep)

        def step(dq, k_tile, v_tile, live):
            weight = jnp.exp2(dot(tile, k_tile, 1, 1) * (scale * LOG2E) - top[:, None])
            dlogits = weight * (dot(dtile, v_tile, 1, 1) - delta[:, None])
            if live is not None:
                dlogits = jnp.where(lax.broadcasted_iota(jnp.int32, dlogits.shape, 1) < live, dlogits, 0.0)
            return dq + dot(dlogits.astype(k_tile.dtype), k_tile, 1, 0)

        dq = shape.steps(step, jnp.zeros((config.rows, e), jnp.float32), walk, places) * scale
        plt.store(dq_ref, dq.astype(dq_ref.dtype), mask=None if keep is None else keep[:, None])

    places = sources(k, v, past)
    tile, row = query_specs(config.rows, e)
    return call(
        kernel,
        grid=(pl.cdiv(tq, config.rows), heads, b),
        in_specs=[shape.walk_specs(), [source_specs(place) for place in places], tile, tile, row, row],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        config=config,
        interpret=interpret,
    )(shape.walk(), places, q, dout, lse, delta)


def keys(
    q: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past: Past | None,
    blocks: BlockMap,
    *,
    past_gradient: bool,
    scale: float,
    frame_tokens: int | None,
    config: Config,
    interpret: bool = False,
) -> list[tuple[jax.Array, jax.Array]]:
    """The gradients of k and v: of the past's layer [b, s, head, e] where asked for, then of the chunk [b, tk, head, e].

    Zero for keys that no list names and for dead ones. config: `rows` are keys, `columns` queries.
    """
    b, tq, heads, e = q.shape
    size_q, size_k, rows, columns = blocks.block_q, blocks.block_k, config.rows, config.columns
    tiles = size_k // rows  # of a key block

    def kernel(first, place, index_ref, count_ref, q_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref):
        number = pl.program_id(0)
        at = (place.layer[0], pl.ds(pl.multiple_of(number * rows, rows), rows), slice(None))
        k_tile, v_tile = place.k[at], place.v[at]

        def visit(carry, block, part):
            dk, dv = carry
            start = pl.multiple_of(block * size_q + part * columns, columns)
            keep, at = kept(tq, size_q, start, columns), pl.ds(start, columns)
            tile, dtile = load(q_ref.at[at, :], keep), load(dout_ref.at[at, :], keep)
            top, delta = load(lse_ref.at[at], keep) * LOG2E, load(delta_ref.at[at], keep)
            weight = jnp.exp2(dot(k_tile, tile, 1, 1) * (scale * LOG2E) - top[None, :])  # transposed: keys down
            dlogits = weight * (dot(v_tile, dtile, 1, 1) - delta[None, :])
            dv = dv + dot(weight.astype(dtile.dtype), dtile, 1, 0)
            return dk + dot(dlogits.astype(tile.dtype), tile, 1, 0), dv

        start = jnp.zeros((rows, e), jnp.float32), jnp.zeros((rows, e), jnp.float32)
        dk, dv = visits(visit, start, index_ref, 0, count_ref[...], size_q // columns)
        live = live_tokens(first + lax.div(number, tiles), lax.rem(number, tiles) * rows, size_k, frame_tokens)
        for ref, gradient in ((dk_ref, dk * scale), (dv_ref, dv)):
            if live is not None:
                gradient = jnp.where(lax.broadcasted_iota(jnp.int32, gradient.shape, 0) < live, gradient, 0.0)
            ref[...] = gradient.astype(ref.dtype)

    def gradients(place: Source, first: int) -> tuple[jax.Array, jax.Array]:
        tokens = place.k.shape[2]
        index, count = lists.transpose(blocks, first + np.arange(tokens // size_k)[:, None])
        entries = pl.BlockSpec((None, None, None, index.shape[-1]), lambda i, h, b: (b, h, lax.div(i, tiles), 0))
        number = pl.BlockSpec((None, None, None), lambda i, h, b: (b, h, lax.div(i, tiles)))
        tokens_q = pl.BlockSpec((None, tq, None, e), lambda i, h, b: (b, 0, h, 0))
        numbers_q = pl.BlockSpec((None, None, tq), lambda i, h, b: (b, h, 0))
        tile, _ = query_specs(rows, e)
        return call(
            functools.partial(kernel, first),
            grid=(tokens // rows, heads, b),
            in_specs=[source_specs(place), entries, number, tokens_q, tokens_q, numbers_q, numbers_q],
            out_specs=[tile, tile],
            out_shape=[jax.ShapeDtypeStruct((b, tokens, heads, e), q.dtype)] * 2,
            config=config,
            interpret=interpret,
        )(place, index, count, q, dout, lse, delta)

    cached = 0 if past is None else past.k.shape[2]
    *olds, chunk = sources(k, v, past)
    return [gradients(old, 0) for old in olds if past_gradient] + [gradients(chunk, cached // size_k)]
