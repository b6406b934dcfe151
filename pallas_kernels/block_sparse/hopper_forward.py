"""Block-sparse attention for Hopper (compute capability 9.0), forward, in Mosaic GPU.

A thread block serves 128 queries of one head with three warpgroups: warps of the third walk the block lists and start the
copies, the other two each hold 64 queries and multiply. What makes it fast:

* Key blocks of 64 or 32 are gathered: two or four list entries fill one tile of 128 keys, so the tensor cores always see the
  shape that suits them, and fine selection costs nothing.
* Within a consumer the scores of a tile are in flight together with the values of the tile before; between the consumers,
  a pair of barriers keeps the softmax of one beside the products of the other.
* The last wave of thread blocks rarely fills the GPU. Its heads are cut along their lists into parts that do, and the parts
  are joined by their log-sum-exps.
* Keys come from two places, the stacked cache and the chunk, told apart entry by entry: nothing is copied together.
"""

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
    Config,
    across,
    copy_entry,
    cut_heads,
    dot,
    iota,
    kernel,
    live,
    stacked,
    zeros,
)
from pallas_kernels.block_sparse.types import BlockMap, Past


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
    B, tq, H, D = q.shape
    dtype, S, block_k = q.dtype, config.stages, blocks.block_k
    interpreted = config.interpret is not None
    index, whole = lists.live_first(blocks, frame_tokens)
    nq, width = index.shape[2:]
    # Query blocks of 128 share their tiles between both warpgroups; those of 64 have a stream of smaller ones each.
    streams = 2 * ROWS // blocks.block_q
    tile = 2 * ROWS // streams
    piece = min(block_k, tile)  # keys of one copy
    pieces, subs = tile // piece, block_k // piece  # copies to a tile, copies to a block
    past_k, past_v, rows, slots = stacked(past, k, v)
    cached = slots // block_k

    tiles = -(-tq // (2 * ROWS))
    cut_rows = cut_heads(B, H, tiles, config)
    parts = config.parts if cut_rows else 1
    uncut = (B * H - cut_rows) * tiles

    def body(q_g, k_g, v_g, pk_g, pv_g, rows_g, index_g, count_g, whole_g, o_g, lse_g, part_g, part_lse_g,
             q_s, k_s, v_s, lse_s, q_full, k_full, v_full, k_free, v_free, turn):  # fmt: skip
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        cut, rest = item >= uncut, item - uncut
        block = lax.select(cut, uncut + lax.div(rest, parts), item)
        part = lax.select(cut, lax.rem(rest, parts), 0)
        b, h, at = lax.div(block, tiles * H), lax.rem(lax.div(block, tiles), H), lax.rem(block, tiles)

        def walk(stream):
            """The list of a stream: query block, entries, first tile, tiles."""
            qt = at * streams + stream
            entries = lax.select(qt < nq, count_g[b, h, lax.min(qt, nq - 1)], 0)
            total = lax.div(entries * block_k + tile - 1, tile)
            first = lax.select(cut, lax.div(part * total, parts), 0)
            last = lax.select(cut, lax.div((part + 1) * total, parts), total)
            return lax.min(qt, nq - 1), entries, first, last - first

        def entry(i, p):
            """Position in the list, and first key within the block, of piece p of tile i."""
            number = i * pieces + p
            return (lax.div(number, subs), lax.rem(number, subs) * piece) if subs > 1 else (number, 0)

        @pl.when(wg < 2)
        def consumer():
            plgpu.set_max_registers(232, action="increase")
            stream = wg if streams == 2 else 0
            qt, entries, first, n = walk(stream)
            mine = pl.ds(at * 2 * ROWS + wg * ROWS, ROWS)
            qs = q_s.at[wg]

            def slot(i):
                return stream * S + lax.rem(i, S)

            def my_turn():
                if streams == 1:  # streams differ in length, so their consumers cannot take turns
                    plgpu.barrier_wait(turn.at[wg])

            def your_turn():
                if streams == 1:
                    plgpu.barrier_arrive(turn.at[1 - wg])

            def store(o, lse):
                qs[...] = o.astype(dtype)
                lse_s[wg] = lse
                plgpu.commit_smem()

                @pl.when(jnp.logical_not(cut))
                def _():
                    plgpu.copy_smem_to_gmem(qs, o_g.at[b, mine, h])
                    plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_g.at[b, h, mine])

                @pl.when(cut)
                def _():
                    plgpu.copy_smem_to_gmem(qs, part_g.at[rest, pl.ds(wg * ROWS, ROWS)])
                    plgpu.copy_smem_to_gmem(lse_s.at[wg], part_lse_g.at[rest, pl.ds(wg * ROWS, ROWS)])

                plgpu.wait_smem_to_gmem(0)

            def row(value):
                filled = jnp.full((ROWS,), value, jnp.float32)
                return filled if interpreted else plgpu.layout_cast(filled, ROW)

            def masked(s, i):
                """Scores of tile i, -inf where the list is over and on dead tokens."""
                column, keep = iota(s.shape, 1, config), None
                for p in range(pieces):
                    place, begin = entry(first + i, p)
                    alive = live(index_g[b, h, qt, lax.min(place, width - 1)], block_k, frame_tokens) - begin
                    alive = lax.select(place < entries, lax.min(alive, piece), 0)
                    inside = (column >= p * piece) & (column < p * piece + alive)
                    keep = inside if keep is None else keep | inside
                return jnp.where(keep, s, -jnp.inf)

            def softmax(s, m, z):
                """New row maximum (base 2), row sum, factor of what is summed already, and weights."""
                peak = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
                alpha = jnp.exp2(m - peak)
                p = jnp.exp2(s * (scale * LOG2E) - across(peak, s.shape, 0))
                return peak, z * alpha + p.sum(axis=1), alpha, p

            def first_scores():
                if interpreted:
                    s = dot(qs[...], k_s[slot(0)], 1)
                    plgpu.commit_smem()  # reads that a later copy overwrites: the tensor cores need no such fence
                    return s

                def product(s_ref):
                    plgpu.wgmma(s_ref, qs, k_s.at[slot(0)].T)
                    return s_ref[...]

                return pl.run_scoped(product, plgpu.ACC((ROWS, tile), jnp.float32))

            def last_values(acc, p, before):
                plgpu.barrier_wait(v_full.at[before])
                if interpreted:
                    acc = acc + dot(p, v_s[before], 0)
                    plgpu.commit_smem()
                else:
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_s.at[before]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[before])
                return acc

            def step(i, carry, mask):
                """Scores of tile i beside the values of tile i - 1."""
                acc, m, z, p16 = carry
                now, before = slot(i), slot(i - 1)
                plgpu.barrier_wait(k_full.at[now])
                my_turn()
                if interpreted:
                    s = dot(qs[...], k_s[now], 1)
                    plgpu.barrier_wait(v_full.at[before])
                    acc = acc + dot(p16, v_s[before], 0)
                    plgpu.commit_smem()
                    your_turn()
                    plgpu.barrier_arrive(k_free.at[now])
                    m, z, alpha, p = softmax(mask(s, i), m, z)
                else:

                    def products(refs):
                        acc_ref, *new_refs = refs

                        def inner(s_ref):
                            plgpu.wgmma(s_ref, qs, k_s.at[now].T)
                            plgpu.barrier_wait(v_full.at[before])
                            plgpu.wgmma(acc_ref, p16, v_s.at[before])
                            your_turn()
                            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                            plgpu.barrier_arrive(k_free.at[now])
                            # Pinned here, or the compiler sinks the exponentials below the wait for the values.
                            new = lax.optimization_barrier(softmax(mask(s, i), m, z))
                            for ref, value in zip(new_refs, new, strict=True):
                                ref[...] = value

                        pl.run_scoped(inner, plgpu.ACC((ROWS, tile), jnp.float32))
                        plgpu.wgmma_wait(0)

                    state = (plgpu.ACC.init(acc), m, z, z, zeros((ROWS, tile), config))
                    acc, m, z, alpha, p = pl.run_state(products)(state)
                plgpu.barrier_arrive(v_free.at[before])
                # Rounded after the wait: rounded earlier, every product would be serialised.
                return acc * across(alpha, acc.shape, 0), m, z, p.astype(dtype)

            @pl.when(n == 0)
            def _():
                store(zeros((ROWS, D), config), row(-jnp.inf))

            @pl.when(n > 0)
            def attend():
                plgpu.copy_gmem_to_smem(q_g.at[b, mine, h], qs, q_full.at[wg])
                plgpu.barrier_wait(q_full.at[wg])
                if streams == 1:
                    pl.when(wg == 1)(lambda: plgpu.barrier_wait(turn.at[1]))  # the first warpgroup goes first
                plgpu.barrier_wait(k_full.at[slot(0)])
                s = first_scores()
                plgpu.barrier_arrive(k_free.at[slot(0)])
                your_turn()
                m, z, _, p = softmax(masked(s, 0), row(-jnp.inf), row(0))
                carry = (zeros((ROWS, D), config), m, z, p.astype(dtype))
                clean = lax.max(lax.min(lax.div(whole_g[b, h, qt] * block_k, tile) - first, n), 1)
                carry = lax.fori_loop(1, clean, lambda i, c: step(i, c, lambda s, _: s), carry)
                acc, m, z, p16 = lax.fori_loop(clean, n, lambda i, c: step(i, c, masked), carry)
                acc = last_values(acc, p16, slot(n - 1))
                if streams == 1:
                    pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))  # nobody may arrive unseen
                store(acc * across(1 / z, acc.shape, 0), m * (1 / LOG2E) + jnp.log(z))

        @pl.when(wg == 2)
        def producer():
            plgpu.set_max_registers(40, action="decrease")

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

    moving = plgpu.SMEM((streams * S, tile, D), dtype, transforms=SWIZZLED)
    pairs = plgpu.Barrier(num_barriers=2)
    cut_items = max(cut_rows * tiles * parts, 1)
    out, lse, part, part_lse = kernel(
        body,
        config,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((B, H, tiles * 2 * ROWS), jnp.float32),
            jax.ShapeDtypeStruct((cut_items, 2 * ROWS, D), dtype),
            jax.ShapeDtypeStruct((cut_items, 2 * ROWS), jnp.float32),
        ),
        grid=(uncut + cut_rows * tiles * parts,),
        grid_names=("item",),
        scratch_types=[
            *(plgpu.SMEM((2, ROWS, D), dtype, transforms=SWIZZLED), moving, moving, plgpu.SMEM((2, ROWS), jnp.float32)),
            *(pairs, barrier(pieces), barrier(pieces), barrier(2 // streams), barrier(2 // streams), pairs),
        ],
    )(q, k, v, past_k, past_v, rows, index, blocks.count, whole)
    if cut_rows:
        shape = (cut_rows, tiles, parts, 2 * ROWS)
        joined, total = join(part.reshape(*shape, D), part_lse.reshape(shape))
        joined = joined.reshape(cut_rows, -1, D)[:, :tq].swapaxes(0, 1).astype(dtype)
        out = lax.optimization_barrier(out).at[B - 1, :, H - cut_rows :].set(joined)
        lse = lax.optimization_barrier(lse).at[B - 1, H - cut_rows :].set(total.reshape(cut_rows, -1))
    return out, lse[:, :, :tq]


def join(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Parts of one softmax, [n, tile, part, row(, e)], as one. Written part by part so that XLA makes it one kernel."""
    lses = [lse[:, :, i] for i in range(lse.shape[2])]
    peak = functools.reduce(jnp.maximum, lses)
    weights = [jnp.where(peak == -jnp.inf, 0, jnp.exp(part - peak)) for part in lses]
    total = sum(weights)
    mean = sum(w[..., None] * out[:, :, i].astype(jnp.float32) for i, w in enumerate(weights))
    return mean / jnp.where(total == 0, 1, total)[..., None], peak + jnp.log(total)
