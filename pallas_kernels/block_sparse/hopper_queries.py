"""Gradient of the queries for Hopper: see `hopper.py`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse import lists
from pallas_kernels.block_sparse.hopper_common import (
    LOG2E,
    ROW,
    ROWS,
    SWIZZLED,
    across,
    copy_entry,
    cut_heads,
    dot,
    iota,
    kernel,
    live,
    stacked,
    vector,
    zeros,
)


def queries(q, dout, stats, k, v, past, blocks, *, scale, frame_tokens, config):
    """dq [b, tq, head, e]. stats [b, head, 2, tq padded to 128]: lse in base 2, delta."""
    B, tq, H, D = q.shape
    dtype, S, block_k = q.dtype, config.stages, blocks.block_k
    interp = config.interpret is not None
    index, whole = lists.live_first(blocks, frame_tokens)
    count = blocks.count
    nq, width = index.shape[2:]
    # Query blocks of 128 share their keys between both warpgroups; those of 64 have a stream of smaller tiles each.
    streams = 2 * ROWS // blocks.block_q
    tile = 2 * ROWS // streams
    piece = min(block_k, tile)  # keys of one copy
    pieces, subs = tile // piece, block_k // piece  # copies to a tile, copies to a block
    past_k, past_v, rows, slots = stacked(past, k, v)
    cached = slots // block_k

    tiles = -(-tq // (2 * ROWS))
    split = cut_heads(B, H, tiles, config)
    parts = config.parts if split else 1
    uncut = (B * H - split) * tiles
    grid = uncut + split * tiles * parts

    def body(q_g, do_g, stats_g, k_g, v_g, pk_g, pv_g, rows_g, index_g, count_g, whole_g, dq_g, part_g,
             q_s, do_s, stats_s, k_s, v_s, q_full, k_full, v_full, k_free, v_free):  # fmt: skip
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        cut, rest = item >= uncut, item - uncut
        block = lax.select(cut, uncut + lax.div(rest, parts), item)
        part = lax.select(cut, lax.rem(rest, parts), 0)
        head, at = lax.div(block, tiles), lax.rem(block, tiles)
        b, h = lax.div(head, H), lax.rem(head, H)

        def walk(stream):
            """The list of a stream: query block, entries, first tile, tiles."""
            qt = at * streams + stream
            entries = lax.select(qt < nq, count_g[b, h, lax.min(qt, nq - 1)], 0)
            qt = lax.min(qt, nq - 1)
            total = lax.div(entries * block_k + tile - 1, tile)
            first = lax.select(cut, lax.div(part * total, parts), 0)
            last = lax.select(cut, lax.div((part + 1) * total, parts), total)
            return qt, entries, first, last - first

        def entry(i, p):
            """Position in the list and first key within the block of piece p of tile i."""
            number = i * pieces + p
            return (lax.div(number, subs), lax.rem(number, subs) * piece) if subs > 1 else (number, 0)

        @pl.when(wg < 2)
        def consumer():
            plgpu.set_max_registers(240, action="increase")
            stream = wg if streams == 2 else 0
            qt, entries, first, n = walk(stream)
            start = at * 2 * ROWS + wg * ROWS
            mine = pl.ds(start, ROWS)
            qs, dos = q_s.at[wg], do_s.at[wg]

            def store(dq):
                @pl.when(cut)
                def _():
                    part_g[rest, pl.ds(wg * ROWS, ROWS)] = dq

                @pl.when(jnp.logical_not(cut))
                def _():
                    qs[...] = dq.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(qs, dq_g.at[b, mine, h])
                    plgpu.wait_smem_to_gmem(0)

            @pl.when(n == 0)
            def _():
                store(zeros((ROWS, D), config))

            @pl.when(n > 0)
            def differentiate():
                plgpu.copy_gmem_to_smem(q_g.at[b, mine, h], qs, q_full.at[wg])
                plgpu.copy_gmem_to_smem(do_g.at[b, mine, h], dos, q_full.at[wg])
                plgpu.copy_gmem_to_smem(stats_g.at[b, h, :, mine], stats_s.at[wg], q_full.at[wg])
                plgpu.barrier_wait(q_full.at[wg])
                lse, delta = (vector(stats_s.at[wg, i], ROW) for i in (0, 1))

                def masked(s, i):
                    column, keep = iota(s.shape, 1, config), None
                    for p in range(pieces):
                        place, begin = entry(first + i, p)
                        alive = live(index_g[b, h, qt, lax.min(place, width - 1)], block_k, frame_tokens) - begin
                        alive = lax.select(place < entries, lax.min(alive, piece), 0)
                        inside = (column >= p * piece) & (column < p * piece + alive)
                        keep = inside if keep is None else keep | inside
                    return jnp.where(keep, s, -jnp.inf)

                def step(i, dq, mask):
                    now = stream * S + lax.rem(i, S)
                    plgpu.barrier_wait(k_full.at[now])

                    def weight(s):
                        return jnp.exp2(mask(s * (scale * LOG2E), i) - across(lse, s.shape, 0))

                    def slope(p, dp):
                        return (p * (dp - across(delta, p.shape, 0))).astype(dtype)

                    if interp:
                        plgpu.barrier_wait(v_full.at[now])
                        p = weight(dot(qs[...], k_s[now], 1))
                        dq = dq + dot(slope(p, dot(dos[...], v_s[now], 1)), k_s[now], 0)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(v_free.at[now])
                    else:

                        def products(dq_ref):
                            def inner(s_ref, dp_ref):
                                plgpu.wgmma(s_ref, qs, k_s.at[now].T)
                                plgpu.barrier_wait(v_full.at[now])
                                plgpu.wgmma(dp_ref, dos, v_s.at[now].T)
                                p = weight(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
                                dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                                plgpu.barrier_arrive(v_free.at[now])
                                return slope(p, dp)

                            acc = plgpu.ACC((ROWS, tile), jnp.float32)
                            ds = pl.run_scoped(inner, acc, acc)
                            plgpu.wgmma(dq_ref, ds, k_s.at[now])
                            plgpu.wgmma_wait(0)

                        dq = pl.run_state(products)(plgpu.ACC.init(dq))
                    plgpu.barrier_arrive(k_free.at[now])
                    return dq

                clean = lax.max(lax.min(lax.div(whole_g[b, h, qt] * block_k, tile) - first, n), 0)
                dq = lax.fori_loop(0, clean, lambda i, c: step(i, c, lambda s, _: s), zeros((ROWS, D), config))
                dq = lax.fori_loop(clean, n, lambda i, c: step(i, c, masked), dq)
                store(dq * scale)

        @pl.when(wg == 2)
        def producer():
            plgpu.set_max_registers(24, action="decrease")

            def run(stream):
                qt, entries, first, n = walk(stream)
                source = functools.partial(copy_entry, batch=b, head=h, row=rows_g[b], cached=cached, block_k=block_k)

                @pl.loop(0, n)
                def _(i):
                    s = stream * S + lax.rem(i, S)
                    places = [entry(first + i, p) for p in range(pieces)]
                    places = [(index_g[b, h, qt, lax.min(place, entries - 1)], begin) for place, begin in places]
                    for old, new, to, full, free in ((pk_g, k_g, k_s, k_full, k_free), (pv_g, v_g, v_s, v_full, v_free)):
                        pl.when(i >= S)(lambda free=free: plgpu.barrier_wait(free.at[s]))
                        for p, (j, begin) in enumerate(places):
                            source(old, new, to.at[s, pl.ds(p * piece, piece)], full.at[s], j, begin, piece)

                @pl.loop(lax.max(n - S, 0), n)  # no barrier may be left with an arrival that nobody saw
                def _(i):
                    plgpu.barrier_wait(k_free.at[stream * S + lax.rem(i, S)])
                    plgpu.barrier_wait(v_free.at[stream * S + lax.rem(i, S)])

            @plgpu.warp_map
            def per_warp(warp):
                for stream in range(streams):
                    pl.when(warp == stream)(lambda stream=stream: run(stream))

    def barrier(arrivals):
        return plgpu.Barrier(num_barriers=streams * S, num_arrivals=arrivals)

    held = plgpu.SMEM((2, ROWS, D), dtype, transforms=SWIZZLED)
    moving = plgpu.SMEM((streams * S, tile, D), dtype, transforms=SWIZZLED)
    sharers = 2 // streams
    pieces_out = max(split * tiles * parts, 1)
    dq, partial = kernel(
        body,
        config,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((pieces_out, 2 * ROWS, D), jnp.float32),
        ),
        grid=(grid,),
        grid_names=("item",),
        scratch_types=[
            *(held, held, plgpu.SMEM((2, 2, ROWS), jnp.float32), moving, moving),
            plgpu.Barrier(num_barriers=2, num_arrivals=3),
            *(barrier(pieces), barrier(pieces), barrier(sharers), barrier(sharers)),
        ],
    )(q, dout, stats, k, v, past_k, past_v, rows, index, count, whole)
    if split:
        joined = partial.reshape(split, tiles, parts, 2 * ROWS, D).sum(axis=2).reshape(split, tiles * 2 * ROWS, D)
        dq = lax.optimization_barrier(dq).at[B - 1, :, H - split :].set(joined[:, :tq].swapaxes(0, 1).astype(dtype))
    return dq
