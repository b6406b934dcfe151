"""Gradients of the keys and values for Hopper: see `hopper.py`.

The scores are made transposed, keys down and queries across. So p^T and ds^T come out of the tensor cores in the registers
where the next products take their left operand, and never pass through shared memory.

Lists of keys differ in length by far more than lists of queries, so the kernel is persistent: items, the longest of all
heads first, are dealt out to and fro over all consumer warpgroups of the GPU, each of which runs its items on its own, with
its own copies. While one of a multiprocessor's pair stores a result and waits for its next keys, the other computes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse import lists
from pallas_kernels.block_sparse.hopper_common import LOG2E, ROWS, SWIZZLED, live, stacked
from pallas_kernels.mosaic import COLUMN, across, dot, iota, kernel, load, zeros


def keys(q, dout, lse, delta, k, v, past, blocks, *, scale, frame_tokens, past_gradient, config):
    """(dk, dv, (dk, dv of the past's layer) or None). lse, delta: [b, head, tq, aligned]."""
    B, tq, H, D = q.shape
    dtype, S, block_q, block_k = q.dtype, config.key_stages, blocks.block_q, blocks.block_k
    subs = block_q // ROWS  # tiles of queries to a list entry
    group = max(ROWS // block_k, 1)  # key blocks that share a tile of keys: their lists are merged
    sharers = max(block_k // ROWS, 1)  # tiles of keys that share a list
    past_k, past_v, layer, slots = stacked(past, k, v)

    def grouped(first, number):
        """The key blocks that share a tile; none for what the last tile has too many."""
        return np.pad(first + np.arange(number), (0, -number % group), constant_values=-1).reshape(-1, group)

    old, new = slots // block_k if past_gradient else 0, k.shape[1] // block_k
    index, count = lists.transpose(blocks, np.concatenate([grouped(0, old), grouped(slots // block_k, new)]))
    n, entries = index.shape[2:]
    work = lists.longest_first(count, entries)
    old_tiles = -(-slots // ROWS) if past_gradient else 0
    items = B * H * n * sharers
    workers = 2 * config.multiprocessors
    rounds = -(-items // workers)

    def body(q_g, do_g, lse_g, delta_g, k_g, v_g, pk_g, pv_g, layer_g, index_g, work_g, dk_g, dv_g, dpk_g, dpv_g,
             k_s, v_s, q_s, do_s, stats_s, kv_full, kv_free, full, free):  # fmt: skip
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        def item(r, worker):
            """Its batch row, head and tile of keys, its list and the tiles of queries in it; none for no item."""
            turn = lax.select(lax.rem(r, 2) == 0, worker, workers - 1 - worker)
            at = r * workers + turn
            exists = at < items
            at = lax.min(at, items - 1)
            rank = lax.div(at, B * H)
            head = lax.rem(at + rank, B * H)  # turned from rank to rank, or a worker would always meet the same heads
            b, h = lax.div(head, H), lax.rem(head, H)
            code = work_g[b, h, lax.div(rank, sharers)]
            line, length = lax.div(code, entries + 1), lax.rem(code, entries + 1)
            return exists, b, h, line * sharers + lax.rem(rank, sharers), line, lax.select(exists, length * subs, 0)

        def in_source(j):
            """The tile's number within the past or the chunk."""
            return lax.select(j < old_tiles, j, j - old_tiles) if old_tiles else j

        def either(j, old, new):
            """Calls `old` for a tile of the past, `new` for one of the chunk."""
            if old_tiles:
                pl.when(j < old_tiles)(old)
                pl.when(j >= old_tiles)(new)
            else:
                new()

        @pl.when(wg < 2)
        def consumer():
            plgpu.set_max_registers(240, action="increase")
            worker = cta * 2 + wg
            ks, vs = k_s.at[wg], v_s.at[wg]

            def alive(x, j):
                """Zero in the rows of dead keys."""
                if frame_tokens is None or frame_tokens % block_k == 0:
                    return x
                row, tile = iota(x.shape, 0, config), in_source(j)
                if group == 1:
                    keep = row < live(lax.div(tile, sharers), block_k, frame_tokens) - lax.rem(tile, sharers) * ROWS
                else:
                    keep = None
                    for g in range(group):
                        end = g * block_k + live(tile * group + g, block_k, frame_tokens)
                        inside = (row >= g * block_k) & (row < end)
                        keep = inside if keep is None else keep | inside
                return jnp.where(keep, x, 0.0)

            def store(b, h, j, dk, dv):
                ks[...] = alive(dk, j).astype(dtype)
                vs[...] = alive(dv, j).astype(dtype)
                plgpu.commit_smem()
                here = pl.ds(in_source(j) * ROWS, ROWS)

                def put(to_k, to_v):
                    plgpu.copy_smem_to_gmem(ks, to_k.at[b, here, h])
                    plgpu.copy_smem_to_gmem(vs, to_v.at[b, here, h])

                either(j, lambda: put(dpk_g, dpv_g), lambda: put(dk_g, dv_g))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def members(s, entry):
                """-inf for the rows of keys whose own block is not named by this entry."""
                row, keep = iota(s.shape, 0, config), None
                for g in range(group):
                    named = lax.rem(lax.div(entry, 2**g), 2) == 1
                    end = lax.select(named, (g + 1) * block_k, 0)
                    inside = (row >= g * block_k) & (row < end)
                    keep = inside if keep is None else keep | inside
                return jnp.where(keep, s, -jnp.inf)

            def one(r, base):
                exists, b, h, j, line, n = item(r, worker)

                def step(i, carry):
                    dk, dv = carry
                    now = wg * S + lax.rem(base + i, S)
                    plgpu.barrier_wait(full.at[now])

                    def stat(c):
                        return across(load(stats_s.at[now, c], COLUMN), (ROWS, ROWS), 1)

                    def weight(s):
                        s = s * (scale * LOG2E)
                        if group > 1:
                            s = members(s, index_g[b, h, line, lax.div(i, subs)])
                        return jnp.exp2(s - stat(0) * LOG2E)

                    def slope(p, dp):
                        return (p * (dp - stat(1))).astype(dtype)

                    if config.interpreted:
                        p = weight(dot(ks[...], q_s[now], 1))
                        dv = dv + dot(p.astype(dtype), do_s[now], 0)
                        dk = dk + dot(slope(p, dot(vs[...], do_s[now], 1)), q_s[now], 0)
                        plgpu.commit_smem()
                    else:

                        def products(refs):
                            dk_ref, dv_ref = refs

                            def inner(s_ref, dp_ref):
                                plgpu.wgmma(s_ref, ks, q_s.at[now].T)
                                plgpu.wgmma(dp_ref, vs, do_s.at[now].T)
                                p = weight(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
                                plgpu.wgmma(dv_ref, p.astype(dtype), do_s.at[now])
                                ds = slope(p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=1))
                                plgpu.wgmma(dk_ref, ds, q_s.at[now])

                            acc = plgpu.ACC((ROWS, ROWS), jnp.float32)
                            pl.run_scoped(inner, acc, acc)
                            plgpu.wgmma_wait(0)

                        dk, dv = pl.run_state(products)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
                    plgpu.barrier_arrive(free.at[now])
                    return dk, dv

                @pl.when(exists)
                def _():
                    plgpu.barrier_wait(kv_full.at[wg])  # even if nobody names them: their place takes the gradients
                    dk, dv = lax.fori_loop(0, n, step, (zeros((ROWS, D), config), zeros((ROWS, D), config)))
                    store(b, h, j, dk * scale, dv)
                    plgpu.barrier_arrive(kv_free.at[wg])

                return base + n

            lax.fori_loop(0, rounds, one, 0)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def producer():
            plgpu.set_max_registers(24, action="decrease")

            def run(stream):
                def one(r, base):
                    exists, b, h, j, line, n = item(r, cta * 2 + stream)

                    @pl.when(exists & (r > 0))  # the first finds their place free
                    def _():
                        plgpu.barrier_wait(kv_free.at[stream])

                    @pl.when(exists)
                    def _():
                        here = pl.ds(in_source(j) * ROWS, ROWS)

                        def get(from_k, from_v, row):
                            plgpu.copy_gmem_to_smem(from_k.at[row, here, h], k_s.at[stream], kv_full.at[stream])
                            plgpu.copy_gmem_to_smem(from_v.at[row, here, h], v_s.at[stream], kv_full.at[stream])

                        either(j, lambda: get(pk_g, pv_g, layer_g[0] * B + b), lambda: get(k_g, v_g, b))

                    @pl.loop(0, n)
                    def _(i):
                        s = stream * S + lax.rem(base + i, S)
                        entry = index_g[b, h, line, lax.div(i, subs)]
                        entry = entry if group == 1 else lax.div(entry, 2**group)
                        these = pl.ds(entry * block_q + lax.rem(i, subs) * ROWS, ROWS)

                        @pl.when(base + i >= S)
                        def _():
                            plgpu.barrier_wait(free.at[s])

                        plgpu.copy_gmem_to_smem(q_g.at[b, these, h], q_s.at[s], full.at[s])
                        plgpu.copy_gmem_to_smem(do_g.at[b, these, h], do_s.at[s], full.at[s])
                        for c, array in enumerate((lse_g, delta_g)):
                            plgpu.copy_gmem_to_smem(array.at[b, h, these], stats_s.at[s, c], full.at[s])

                    return base + n

                total = lax.fori_loop(0, rounds, one, 0)

                @pl.loop(lax.max(total - S, 0), total)  # no barrier may be left with an arrival that nobody saw
                def _(i):
                    plgpu.barrier_wait(free.at[stream * S + lax.rem(i, S)])

                @pl.when(cta * 2 + stream < items)
                def _():
                    plgpu.barrier_wait(kv_free.at[stream])

            @plgpu.warp_map
            def per_warp(warp):
                for stream in (0, 1):
                    pl.when(warp == stream)(lambda stream=stream: run(stream))

    held = plgpu.SMEM((2, ROWS, D), dtype, transforms=SWIZZLED)
    moving = plgpu.SMEM((2 * S, ROWS, D), dtype, transforms=SWIZZLED)
    old_type = jax.ShapeDtypeStruct((B, slots, H, D) if past_gradient else (1, ROWS, H, D), dtype)
    dk, dv, dpk, dpv = kernel(
        body,
        config,
        grid={"cta": config.multiprocessors},
        out_type=(jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(k.shape, dtype), old_type, old_type),
        scratch_types=[
            *(held, held, moving, moving, plgpu.SMEM((2 * S, 2, ROWS), jnp.float32)),
            *(plgpu.Barrier(num_barriers=2, num_arrivals=2), plgpu.Barrier(num_barriers=2)),
            *(plgpu.Barrier(num_barriers=2 * S, num_arrivals=4), plgpu.Barrier(num_barriers=2 * S)),
        ],
    )(q, dout, lse, delta, k, v, past_k, past_v, layer, index, work)
    return dk, dv, (dpk, dpv) if past_gradient else None
