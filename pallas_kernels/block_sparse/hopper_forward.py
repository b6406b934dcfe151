"""Block-sparse attention for Hopper (compute capability 9.0), forward, in Mosaic GPU.

A thread block serves 128 queries of one head at a time with three warpgroups: warps of the third walk the block lists and
start the copies, the other two each hold 64 queries and multiply. What makes it fast:

* Key blocks of 64 or 32 are gathered: two or four list entries fill one tile of 128 keys, so the tensor cores always see the
  shape that suits them, and fine selection costs nothing.
* Within a consumer the scores of a tile are in flight together with the values of the tile before; between the consumers,
  a pair of barriers keeps the softmax of one beside the products of the other.
* Thread blocks stay and take item after item, so that the queries, keys and values of the next are on their way while one
  ends.
* The tensor cores take half of each query of 128 columns from registers, which leaves the shared memory time for what is copied
  into it.
* The last wave of items rarely fills the GPU. It is cut along its lists into parts that do, and the parts are joined by their
  log-sum-exps.
* Keys come from two places, the stacked cache and the chunk, told apart entry by entry: nothing is copied together.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.block_sparse.hopper_common import LOG2E, QUERIES, ROWS, SWIZZLED, Config, aligned
from pallas_kernels.block_sparse.hopper_join import join
from pallas_kernels.block_sparse.hopper_walk import Walk
from pallas_kernels.block_sparse.types import BlockMap, Past
from pallas_kernels.mosaic import MATRIX, ROW, across, dot, kernel, load, zeros

NEAR = pl.ds(0, 64)  # columns of the queries that stay in registers: shared memory has enough to do
LOWEST = -1e30  # below every logit, but a number: of a tile of dead keys, -inf would make the weights NaN


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: BlockMap,
    past: Past | None,
    *,
    scale: float,
    frame_tokens: int | None,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """out [b, tq, head, e] and the log-sum-exp [b, head, tq] float32, natural logarithm. Arguments as in the public call;
    `hopper.reason` says what they may be."""
    walk = Walk(q, k, v, blocks, past, frame_tokens, config)
    D, dtype, tile, interpreted = walk.e, q.dtype, walk.tile, config.interpreted
    ahead = int(config.stages * D <= 256)  # items whose queries are there before their turn: 1, where there is room for it

    def body(q_g, *refs):
        arrays, (o_g, lse_g, part_g, part_lse_g, q_s, lse_s, q_full, turn, *moving) = refs[:8], refs[8:]
        *_, count_g, whole_g = arrays
        k_s, v_s, k_full, v_full, k_free, v_free = moving
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        stream = wg if walk.streams == 2 else 0

        def take(number):
            return walk.item(block + number * walk.blocks)

        def rows(item):
            return pl.ds(item.at * QUERIES + wg * ROWS, ROWS)

        def held(number):
            """Where the queries of an item are, and the barrier that says so."""
            at = lax.rem(number, ahead + 1)
            return q_s.at[at, wg], q_full.at[2 * at + wg]

        def fetch(number):
            item = take(number)
            plgpu.copy_gmem_to_smem(q_g.at[item.b, rows(item), item.h], *held(number))

        def consumer(number, carry, turns):
            """The item after `number` others, of so many turns. Tiles are counted through: its first is `begin`."""
            (begin, entries), item, (qs, arrived) = carry, take(number), held(number)
            mine, my_part = rows(item), pl.ds(wg * ROWS, ROWS)
            stretch = walk.stretch(item, stream, entries)
            whole = walk.whole(item, stretch, whole_g)
            end, clean = begin + stretch.n, begin + walk.clean(stretch, whole, least=1)
            following = walk.entries(take(lax.min(number + 1, turns - 1)), stream, count_g)  # early, as it takes a while
            slot = functools.partial(walk.slot, stream)

            def make_room():
                """For what is stored, and for the queries that take its place."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
                pl.when(number + ahead < turns)(lambda: fetch(number + ahead))

            def my_turn():
                if walk.streams == 1:  # streams differ in length, so their consumers cannot take turns
                    plgpu.barrier_wait(turn.at[wg])

            def your_turn():
                if walk.streams == 1:
                    plgpu.barrier_arrive(turn.at[1 - wg])

            def store(o, lse):
                qs[...] = o.astype(dtype)
                lse_s[wg] = lse
                plgpu.commit_smem()

                @pl.when(jnp.logical_not(item.cut))
                def _():
                    plgpu.copy_smem_to_gmem(qs, o_g.at[item.b, mine, item.h])
                    plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_g.at[item.b, item.h, mine])

                @pl.when(item.cut)
                def _():
                    plgpu.copy_smem_to_gmem(qs, part_g.at[item.number, my_part])
                    plgpu.copy_smem_to_gmem(lse_s.at[wg], part_lse_g.at[item.number, my_part])

            def row(value):
                filled = jnp.full((ROWS,), value, jnp.float32)
                return filled if interpreted else plgpu.layout_cast(filled, ROW)

            def masked(s, i):
                return walk.masked(s, i - begin, stretch, whole)

            def softmax(s, m, z):
                """New row maximum (base 2), row sum, factor of what is summed already, and weights."""
                peak = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
                alpha = jnp.exp2(m - peak)
                p = jnp.exp2(s * (scale * LOG2E) - across(peak, s.shape, 0))
                return peak, z * alpha + p.sum(axis=1), alpha, p

            def scores(s_ref, left, at, width=tile):
                plgpu.wgmma(s_ref, left, k_s.at[at, pl.ds(0, width), NEAR].T)
                if D > NEAR.size:
                    far = pl.ds(NEAR.size, D - NEAR.size)
                    plgpu.wgmma(s_ref, qs.at[:, far], k_s.at[at, pl.ds(0, width), far].T)

            def first_scores(left):
                if interpreted:
                    s = dot(qs[...], k_s[slot(begin)], 1)
                    plgpu.commit_smem()  # reads that a later copy overwrites: the tensor cores need no such fence
                    return s

                def product(s_ref):
                    scores(s_ref, left, slot(begin))
                    return s_ref[...]

                return pl.run_scoped(product, plgpu.ACC((ROWS, tile), jnp.float32))

            def last_values(acc, p):
                before, (_, width) = slot(end - 1), p.shape
                values = v_s.at[before, pl.ds(0, width)]
                plgpu.barrier_wait(v_full.at[before])
                if interpreted:
                    acc = acc + dot(p, values[...], 0)
                    plgpu.commit_smem()
                else:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, values))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[before])
                return acc

            def step(i, carry, left, last, width=tile):
                """Scores of tile i, its first `width` keys, beside the values of tile i - 1."""
                acc, m, z, p16 = carry
                now, before = slot(i), slot(i - 1)
                keys = k_s.at[now, pl.ds(0, width)]
                mask = functools.partial(masked, i=i) if last else lambda s: s
                plgpu.barrier_wait(k_full.at[now])
                my_turn()
                if interpreted:
                    s = dot(qs[...], keys[...], 1)
                    plgpu.barrier_wait(v_full.at[before])
                    acc = acc + dot(p16, v_s[before], 0)
                    plgpu.commit_smem()
                    your_turn()
                    plgpu.barrier_arrive(k_free.at[now])
                    m, z, alpha, p = softmax(mask(s), m, z)
                else:

                    def products(refs):
                        acc_ref, *new_refs = refs

                        def inner(s_ref):
                            scores(s_ref, left, now, width)
                            plgpu.barrier_wait(v_full.at[before])
                            plgpu.wgmma(acc_ref, p16, v_s.at[before])
                            your_turn()
                            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                            plgpu.barrier_arrive(k_free.at[now])
                            # Pinned here, or the compiler sinks the exponentials below the wait for the values.
                            new = lax.optimization_barrier(softmax(mask(s), m, z))
                            for ref, value in zip(new_refs, new, strict=True):
                                ref[...] = value

                        pl.run_scoped(inner, plgpu.ACC((ROWS, width), jnp.float32))
                        plgpu.wgmma_wait(0)

                    state = (plgpu.ACC.init(acc), m, z, z, zeros((ROWS, width), config))
                    acc, m, z, alpha, p = pl.run_state(products)(state)
                plgpu.barrier_arrive(v_free.at[before])
                # Rounded after the wait: rounded earlier, every product would be serialised.
                return acc * across(alpha, acc.shape, 0), m, z, p.astype(dtype)

            if not ahead:
                make_room()
            plgpu.barrier_wait(arrived)

            @pl.when(end == begin)
            def _():
                if ahead:
                    make_room()
                store(zeros((ROWS, D), config), row(-jnp.inf))

            @pl.when(end > begin)
            def attend():
                left = None if interpreted else load(qs.at[:, NEAR], MATRIX)
                pl.when(wg == 1)(my_turn)  # the first warpgroup goes first
                plgpu.barrier_wait(k_full.at[slot(begin)])
                s = first_scores(left)
                plgpu.barrier_arrive(k_free.at[slot(begin)])
                your_turn()
                m, z, _, p = softmax(masked(s, begin), row(LOWEST), row(0))
                if ahead:
                    make_room()  # so late, what the item before stored has been read
                carry = (zeros((ROWS, D), config), m, z, p.astype(dtype))
                half = walk.half(stretch) if walk.halves else 0
                carry = lax.fori_loop(begin + 1, clean, functools.partial(step, left=left, last=False), carry)
                acc, m, z, p16 = lax.fori_loop(clean, end - half, functools.partial(step, left=left, last=True), carry)

                def half_tile(_, sums):
                    acc, m, z, p16_half = step(end - 1, (*sums, p16), left, last=True, width=tile // 2)
                    return last_values(acc, p16_half), m, z

                if walk.halves:
                    acc, m, z = lax.fori_loop(0, half, half_tile, (acc, m, z))
                    acc = lax.fori_loop(half, 1, lambda _, acc: last_values(acc, p16), acc)
                else:
                    acc = last_values(acc, p16)
                pl.when(wg == 0)(my_turn)  # nobody may arrive unseen
                inverse = 1 / jnp.maximum(z, 1 / -LOWEST)  # a part may have dead keys only: z is 0, and what it sums
                store(acc * across(inverse, acc.shape, 0), m * (1 / LOG2E) + jnp.log(z))

            return end, following

        @pl.when(wg < 2)
        def consumers():
            plgpu.set_max_registers(240, action="increase")
            if ahead:
                fetch(0)
            turns, start = mosaic.turns(walk.items, block, walk.blocks), (jnp.int32(0), walk.entries(take(0), stream, count_g))
            lax.fori_loop(0, turns, functools.partial(consumer, turns=turns), start)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == 2)
        def producer():
            plgpu.set_max_registers(24, action="decrease")
            walk.produce(block, walk.blocks, arrays, *moving)

    cut_items, turns = max(walk.cut_items, 1), plgpu.Barrier(num_barriers=2)
    queries = plgpu.SMEM((ahead + 1, 2, ROWS, D), dtype, transforms=SWIZZLED)
    arrived = plgpu.Barrier(num_barriers=2 * (ahead + 1))
    out, lse, part, part_lse = kernel(
        body,
        config,
        grid={"block": walk.blocks},
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((walk.batch, walk.heads, aligned(walk.tq)), jnp.float32),
            jax.ShapeDtypeStruct((cut_items, QUERIES, D), dtype),
            jax.ShapeDtypeStruct((cut_items, QUERIES), jnp.float32),
        ),
        scratch_types=[queries, plgpu.SMEM((2, ROWS), jnp.float32), arrived, turns, *walk.scratch()],
    )(q, *walk.arrays)
    out, lse = join(walk, (out, lse), (part, part_lse))
    return out, lse[:, :, : walk.tq]
