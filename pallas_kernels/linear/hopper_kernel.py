"""The kernel of `hopper`: y = epilogue(x w) on the tensor cores, in e4m3 or bfloat16, started once for each multiprocessor.

A thread block serves 128 tokens and `Config.tile` output channels at a time with three warpgroups: the third starts the copies,
the other two each hold 64 tokens and multiply. What makes it fast:

* Blocks stay and take tile after tile, so that the copies of the next tile are under way while the last one is finished.
* One consumer runs `Config.lead` steps ahead of the other: while it finishes its tile (scales, bias, GELU, rounding), the
  tensor cores have the other's products to do.
* Two thread blocks of a cluster hold neighbouring tokens: each loads half of the weights' tile and sends it to both.
* Weights are read where they lie in the stack of the layers.

A step of the products takes 128 bytes of every row of x: 128 inputs in float8, 64 in bfloat16, in the same time. Weights in
float8 lie as [out, in], the only order in which the tensor cores take them; those in bfloat16 as [in, out] or as [out, in].

The tensor cores sum e4m3 products with about 14 bits. That is left as it is: the operands, rounded to float8, have four.
Products of bfloat16 numbers are summed in float32, and rounded once, after everything that follows.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.linear.types import FLOAT8, LARGEST, SMALLEST_ROW, Quantised
from pallas_kernels.mosaic import COLUMN, MATRIX, ROW, across, iota, kernel, load, swizzled

ROWS, HALF = 128, 64  # tokens of a thread block, of a consumer
DEPTH = 128  # bytes of a row of x in a step of the products
SHARED, SPARE = 227 * 1024, 2048  # bytes of shared memory that a thread block may have, of it for barriers and alignment
SNAKE = 8  # tiles of output channels that are walked together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mosaic.Config):
    """How the kernel is laid out. The defaults are for an H100 or H200."""

    tile: int = 256  # output channels of a thread block
    cluster: int = 2  # thread blocks that share the weights they load
    stages: int = 4  # steps of the products whose operands are in flight
    buffers: int | None = None  # pieces of the output that each consumer has under way; None: 2, with a residual what fits
    lead: int = 2  # steps by which the first consumer runs ahead of the second

    def __post_init__(self):
        super().__post_init__()
        self.at_least(tile=32, cluster=1, stages=1, buffers=1, lead=0)
        if self.tile % 32 or self.tile > 256:
            raise ValueError(f"tile={self.tile} must be a multiple of 32 and at most 256")
        if self.cluster > self.multiprocessors:
            raise ValueError(f"cluster={self.cluster} must be at most multiprocessors={self.multiprocessors}")


class Epilogue(NamedTuple):
    """What becomes of the products: see `api.linear`."""

    activation: str | None
    gate: jax.Array | None  # [frame, out] float32
    frame_tokens: int | None
    residual: jax.Array | None  # [rows, out] bfloat16
    reach: jax.Array | None  # [layer, 2] float32


def run(
    x: Quantised | jax.Array,
    w: Quantised | jax.Array,
    bias: jax.Array,
    layer: jax.Array | None,
    turned: bool,
    epilogue: Epilogue,
    config: Config,
) -> Any:
    """[rows, out] bfloat16, or Quantised where there is a reach.

    Args:
        x: [rows, in], float8 or bfloat16.
        w: [layer, out, in] where `turned`, otherwise [layer, in, out], which float8 cannot be.
        bias: [layer, out], float32 or bfloat16.
    """
    scales = {"x_scale": x.scale, "w_scale": w.scale} if isinstance(x, Quantised) else {}
    x, w = (x.values, w.values) if scales else (x, w)
    (rows, inputs), outputs, tile, cluster = x.shape, w.shape[1 if turned else 2], config.tile, config.cluster
    quantised, gated = epilogue.reach is not None, epilogue.gate is not None
    tiles = (-(-rows // (ROWS * cluster)), -(-outputs // tile))
    blocks = min(config.multiprocessors // cluster, math.prod(tiles))
    deep = DEPTH // x.dtype.itemsize  # inputs of a step
    piled = swizzled(deep if turned or tile % deep == 0 else deep // 2, x.dtype)  # x and w alike: the tensor cores' rule
    steps = -(-inputs // deep)
    stages, lead = min(config.stages, steps), min(config.lead, config.stages, steps)
    dtype = FLOAT8 if quantised else jnp.bfloat16
    piece = 64 if quantised and tile % 64 == 0 else 32  # output channels that are finished at a time
    biases = -(-tile // 64) * 64  # that are copied: a multiple of 128 bytes, whatever their dtype
    frames = 1 if not gated or epilogue.frame_tokens % ROWS == 0 else 2  # that a tile may lie in
    buffers = config.buffers or 2
    if config.buffers is None and epilogue.residual is not None:
        taken = stages * (ROWS + tile) * DEPTH + 4 * 2 * (ROWS + (2 + frames) * tile) + SPARE
        buffers = max((SHARED - taken) // (ROWS * piece * jnp.dtype(dtype).itemsize), 1)
    buffers = min(buffers, tile // piece)

    arrays = {"x": x, "w": w, "bias": bias} | scales
    arrays |= {"layer": layer.astype(jnp.int32).reshape(1)} if layer is not None else {}
    arrays |= {name: getattr(epilogue, name) for name in ("gate", "residual", "reach") if getattr(epilogue, name) is not None}
    out_type = [jax.ShapeDtypeStruct((rows, outputs), dtype)]
    out_type += [jax.ShapeDtypeStruct((rows,), jnp.float32)] * quantised

    def body(*refs):
        g, refs = dict(zip(arrays, refs, strict=False)), refs[len(arrays) :]
        out_g, *out_scale_g = refs[: len(out_type)]
        x_s, w_s, rows_s, columns_s, bias_s, gate_s, out_s, out_scale_s, *barriers = refs[len(out_type) :]
        full, free, known, fetched, ahead = barriers
        block, wg = lax.axis_index("block"), lax.axis_index("wg")
        own = mosaic.turns(math.prod(tiles), block, blocks)  # tiles that this thread block takes
        at_layer = g["layer"][0] if layer is not None else 0

        def place(i):
            """First token and first output channel of the i-th tile."""
            m, n = plgpu.planar_snake(block + i * blocks, tiles, 1, SNAKE)
            return (m * cluster + lax.axis_index("cluster")) * ROWS, n * tile

        def vectors(i):
            """Starts the copies of what a tile needs beside its products. Two tiles' are in flight: where the copies of one
            begin, both consumers multiply the one before, so they have finished that before it."""
            (row, column), side = place(i), lax.rem(i, 2)
            channels = pl.ds(column, tile)
            pairs = [(g["bias"].at[at_layer, pl.ds(column, biases)], bias_s.at[side])]
            if scales:
                pairs.append((g["x_scale"].at[pl.ds(row, ROWS)], rows_s.at[side]))
                pairs.append((g["w_scale"].at[at_layer, channels], columns_s.at[side]))
            for f in range(frames * gated):
                pairs.append((g["gate"].at[lax.div(row, epilogue.frame_tokens) + f, channels], gate_s.at[side, f]))
            for source, target in pairs:
                plgpu.copy_gmem_to_smem(source, target, known.at[side])

        @pl.when(wg == 2)
        def producer():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, own)
            def _(i):
                row, column = place(i)

                @pl.loop(0, steps)
                def _(k):
                    number = i * steps + k
                    slot, depth, channels = lax.rem(number, stages), pl.ds(k * deep, deep), pl.ds(column, tile)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    shared = {"collective_axes": "cluster"} if cluster > 1 else {}
                    plgpu.copy_gmem_to_smem(g["x"].at[pl.ds(row, ROWS), depth], x_s.at[slot], full.at[slot])
                    place_of_w = (channels, depth) if turned else (depth, channels)
                    plgpu.copy_gmem_to_smem(g["w"].at[at_layer, *place_of_w], w_s.at[slot], full.at[slot], **shared)
                    pl.when(k == 0)(lambda: vectors(i))

            @pl.loop(lax.max(own * steps - stages, 0), own * steps)  # no arrival may be left that nobody saw
            def _(number):
                plgpu.barrier_wait(free.at[lax.rem(number, stages)])

        @pl.when(wg < 2)
        def consumer():
            plgpu.set_max_registers(232, action="increase")
            half = pl.ds(wg * HALF, HALF)
            slope, least = (g["reach"][at_layer, j] for j in range(2)) if quantised else (None, None)  # once, not every tile
            if lead:
                pl.when(wg == 1)(lambda: plgpu.barrier_wait(ahead))

            def spot(i, c):
                row, column = place(i)
                return pl.ds(row + wg * HALF, HALF), pl.ds(column + c * piece, piece)

            def fetch(i, c):
                """Starts the copy of a piece of the residual to where the output will be."""
                to = c % buffers
                plgpu.copy_gmem_to_smem(g["residual"].at[spot(i, c)], out_s.at[wg, to], fetched.at[wg, to])

            def products(i):
                def scope(sums):
                    @pl.loop(0, steps)
                    def _(k):
                        number = i * steps + k
                        slot = lax.rem(number, stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(sums, x_s.at[slot, half], w_s.at[slot].T if turned else w_s.at[slot])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])
                        if lead:
                            pl.when((wg == 0) & (number == lead - 1))(lambda: plgpu.barrier_arrive(ahead))

                    return sums[...]

                return pl.run_scoped(scope, plgpu.ACC((HALF, tile), jnp.float32))

            def gates(i, c, shape):
                """What the outputs of each token are multiplied with."""
                side = lax.rem(i, 2)
                first, *second = (across(column(gate_s.at[side, f], c), shape, 1) for f in range(frames))
                if not second:
                    return first
                row, _ = place(i)
                left = epilogue.frame_tokens - lax.rem(row, epilogue.frame_tokens) - wg * HALF  # tokens of the first frame
                return jnp.where(iota(shape, 0, config) < left, first, second[0])

            def column(ref, c):
                return load(ref.at[pl.ds(c * piece, piece)], COLUMN)

            def finish(i, sums):
                side = lax.rem(i, 2)
                plgpu.barrier_wait(known.at[side])
                if epilogue.residual is None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was written of the tile before
                x_scale, inverse = load(rows_s.at[side, half], ROW) if scales else None, None
                if quantised:
                    scale = jnp.maximum(x_scale * slope + least, SMALLEST_ROW) * (1 / LARGEST)
                    inverse = 1 / scale
                    row, first = place(i)

                    @pl.when(first == 0)
                    def _():
                        out_scale_s[wg] = scale
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(out_scale_s.at[wg], out_scale_g[0].at[pl.ds(row + wg * HALF, HALF)])

                for c in range(tile // piece):
                    y, to = sums[:, c * piece : (c + 1) * piece], c % buffers
                    if scales:
                        y = y * across(x_scale, y.shape, 0) * across(column(columns_s.at[side], c), y.shape, 1)
                    y = y + across(column(bias_s.at[side], c).astype(jnp.float32), y.shape, 1)
                    times = across(inverse, y.shape, 0) if quantised else 1
                    y = gelu(y, times) if epilogue.activation == "gelu" else y * times
                    if gated:
                        y = y * gates(i, c, y.shape)
                    if epilogue.residual is None:
                        if c >= buffers:
                            plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                    else:
                        plgpu.barrier_wait(fetched.at[wg, to])
                        y = load(out_s.at[wg, to], MATRIX).astype(jnp.float32) + y
                    out_s[wg, to] = y.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s.at[wg, to], out_g.at[spot(i, c)])
                    if epilogue.residual is not None and c + buffers < tile // piece:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        fetch(i, c + buffers)

            @pl.loop(0, own)
            def _(i):
                if epilogue.residual is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for c in range(buffers):
                        fetch(i, c)
                finish(i, products(i))

            plgpu.wait_smem_to_gmem(0)

    both = {"num_arrivals": 2, "num_barriers": stages}  # copies of a step; consumers
    release = plgpu.ClusterBarrier(collective_axes=("cluster",), **both) if cluster > 1 else plgpu.Barrier(**both)
    out = kernel(
        body,
        config,
        grid={"block": blocks},
        cluster={"cluster": cluster},
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((stages, ROWS, deep), x.dtype, transforms=piled),
            plgpu.SMEM((stages, *((tile, deep) if turned else (deep, tile))), w.dtype, transforms=piled),
            plgpu.SMEM((2, ROWS if scales else 4), jnp.float32),
            plgpu.SMEM((2, tile if scales else 4), jnp.float32),
            plgpu.SMEM((2, biases), bias.dtype),
            plgpu.SMEM((2, frames, tile if gated else 4), jnp.float32),
            plgpu.SMEM((2, buffers, HALF, piece), dtype, transforms=swizzled(piece, dtype)),
            plgpu.SMEM((2, HALF), jnp.float32),
            plgpu.Barrier(**both),
            release,
            plgpu.Barrier(num_arrivals=1 + len(scales) + frames * gated, num_barriers=2),
            plgpu.Barrier(num_barriers=(2, buffers)),
            plgpu.Barrier(),
        ],
    )(*arrays.values())
    return Quantised(*out) if quantised else out[0]


def gelu(x: jax.Array, times: Any) -> jax.Array:
    """gelu(x) * times, the tanh form; the tensor cores wait for this, so every operation counts."""
    inner = x * (math.sqrt(2 / math.pi) + math.sqrt(2 / math.pi) * 0.044715 * x * x)
    half = x * (0.5 * times)
    return half * jnp.tanh(inner) + half
