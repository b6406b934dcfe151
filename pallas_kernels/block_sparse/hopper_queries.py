"""Gradient of the queries for Hopper: see `hopper.py`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse.hopper_common import LOG2E, QUERIES, ROWS, SWIZZLED
from pallas_kernels.block_sparse.hopper_join import join
from pallas_kernels.block_sparse.hopper_walk import Walk
from pallas_kernels.mosaic import ROW, across, dot, kernel, load, zeros


def queries(q, dout, lse, delta, k, v, past, blocks, *, scale, frame_tokens, config):
    """dq [b, tq, head, e]. lse, delta: [b, head, tq, aligned]."""
    walk = Walk(q, k, v, blocks, past, frame_tokens, config)
    D, dtype, tile = walk.e, q.dtype, walk.tile

    def body(q_g, do_g, lse_g, delta_g, *refs):
        arrays, (dq_g, part_g, q_s, do_s, stats_s, q_full, *moving) = refs[:8], refs[8:]
        *_, count_g, whole_g = arrays
        k_s, v_s, k_full, v_full, k_free, v_free = moving
        index, wg = lax.axis_index("item"), lax.axis_index("wg")
        item = walk.item(index)

        @pl.when(wg < 2)
        def consumer():
            plgpu.set_max_registers(240, action="increase")
            stream = wg if walk.streams == 2 else 0
            mine = pl.ds(item.at * QUERIES + wg * ROWS, ROWS)
            qs, dos = q_s.at[wg], do_s.at[wg]
            for array, held in ((q_g, qs), (do_g, dos)):
                plgpu.copy_gmem_to_smem(array.at[item.b, mine, item.h], held, q_full.at[wg])
            for i, array in enumerate((lse_g, delta_g)):
                plgpu.copy_gmem_to_smem(array.at[item.b, item.h, mine], stats_s.at[wg, i], q_full.at[wg])
            stretch = walk.stretch(item, stream, walk.entries(item, stream, count_g))
            whole = walk.whole(item, stretch, whole_g)
            clean = walk.clean(stretch, whole, least=0)

            def store(dq):
                @pl.when(item.cut)
                def _():
                    part_g[item.number, pl.ds(wg * ROWS, ROWS)] = dq

                @pl.when(jnp.logical_not(item.cut))
                def _():
                    qs[...] = dq.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(qs, dq_g.at[item.b, mine, item.h])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            plgpu.barrier_wait(q_full.at[wg])

            @pl.when(stretch.n == 0)
            def _():
                store(zeros((ROWS, D), config))

            @pl.when(stretch.n > 0)
            def differentiate():
                lse, delta = (load(stats_s.at[wg, i], ROW) for i in (0, 1))
                lse = lse * LOG2E

                def step(i, dq, masked):
                    now = walk.slot(stream, i)
                    plgpu.barrier_wait(k_full.at[now])

                    def weight(s):
                        s = s * (scale * LOG2E)
                        return jnp.exp2((walk.masked(s, i, stretch, whole) if masked else s) - across(lse, s.shape, 0))

                    def slope(p, dp):
                        return (p * (dp - across(delta, p.shape, 0))).astype(dtype)

                    if config.interpreted:
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

                dq = lax.fori_loop(0, clean, functools.partial(step, masked=False), zeros((ROWS, D), config))
                dq = lax.fori_loop(clean, stretch.n, functools.partial(step, masked=True), dq)
                store(dq * scale)

        @pl.when(wg == 2)
        def producer():
            plgpu.set_max_registers(24, action="decrease")
            walk.produce(index, walk.items, arrays, *moving)

    held = plgpu.SMEM((2, ROWS, D), dtype, transforms=SWIZZLED)
    dq, part = kernel(
        body,
        config,
        grid={"item": walk.items},
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((max(walk.cut_items, 1), QUERIES, D), jnp.float32),
        ),
        scratch_types=[
            *(held, held, plgpu.SMEM((2, 2, ROWS), jnp.float32), plgpu.Barrier(num_barriers=2, num_arrivals=4)),
            *walk.scratch(),
        ],
    )(q, dout, lse, delta, *walk.arrays)
    return join(walk, (dq,), (part,))[0]
