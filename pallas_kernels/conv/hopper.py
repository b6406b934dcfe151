"""The convolution for Hopper (compute capability 9.0), an implicit matrix product in Mosaic GPU.

A tile is some rows of 64 neighbouring pixels of one frame, and all output channels or a share of them. Thread blocks stay and
take tile after tile, those of following frames at the same place first, so that what they share is still in the L2 cache. Two
warpgroups multiply, half of the rows each; a warp of the third starts the copies, also those of the next tile while this one
is stored. A step of the products takes 32 channels of the rows of one frame, moved by the column of the kernel, and serves
all rows of the kernel, whose weights follow one by one. What the image lacks at its borders, and channels beyond the last, the
copies fill with zeros; the two frames before the first are read where they lie.

After an upsampling, pixel (2 i + a, 2 j + b) sees two rows and two columns of the input, i + a - 1, i + a and j + b - 1,
j + b, with sums of the kernel's rows and columns for weights: four kernels of 2 x 2, one for each (a, b), so that four
products do what took nine, and the upsampled input never exists.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.choice import unmet
from pallas_kernels.conv.hopper_plan import AHEAD, COLUMNS, STEP, WIDEST, Config, Plan, plan
from pallas_kernels.conv.types import SIDE, Form
from pallas_kernels.conv.xla import normed
from pallas_kernels.mosaic import COLUMN, MATRIX, across, load

FILLED = 0.6  # of the tiles' pixels, where the kernel is worth it
ROUND = mosaic.swizzled(STEP, jnp.bfloat16)


def reason(x: Any, kernel: Any, form: Form) -> str | None:
    """Why the kernel cannot run such a call here; None if it can."""
    return mosaic.reason() or unfit(x, kernel, form)


def unfit(x: Any, kernel: Any, form: Form) -> str | None:
    """Why the kernel is not made for such a call on any device; None if it is."""
    *_, width, inputs = x.shape
    outputs = kernel.shape[-1]
    rules = {
        f"needs pixels, received {x.shape}": x.size > 0,
        f"needs bfloat16, received {x.dtype}": x.dtype == jnp.bfloat16,
        f"needs a kernel of {SIDE} rows and columns, received {kernel.shape[1]}": kernel.shape[1] == SIDE,
        f"needs a multiple of 8 input channels, received {inputs}": inputs % 8 == 0,
        f"needs rows of a multiple of 8 pixels, received {width}": width % 8 == 0,
        f"needs at most {WIDEST} output channels or a multiple of them, received {outputs}": outputs <= WIDEST
        or outputs % WIDEST == 0,
    }
    return unmet(rules)


def slow(x: Any, kernel: Any, form: Form) -> str | None:
    """Why another should be taken: small images leave too much of the kernel's tiles, or of the GPU, without work."""
    config = Config()
    size = plan(x, kernel, form, False, config)
    work = math.prod(x.shape[:4]) * size.phases * size.shares
    filled = work / (size.waves(config) * config.multiprocessors * size.rows * COLUMNS)
    return unmet({f"{filled:.0%} of its tiles would be at work, less than {FILLED:.0%}": filled >= FILLED})


class Tile(NamedTuple):
    """Where a tile lies. All are numbers of the kernel's registers."""

    batch: Any
    frame: Any
    row: Any  # the first
    column: Any  # the first
    phase: Any
    share: Any


def conv(x, kernel, bias, past, residual, scale, form: Form, eps: float, *, config: Config | None = None):
    """See `api.convolve`; every argument but `config` is required.

    Raises:
        NotImplementedError: if the kernel is not made for such a call, with the reason.
    """
    cannot = unfit(x, kernel, form)
    if cannot is not None:
        raise NotImplementedError(f"convolution for Hopper: {cannot}")
    config, outputs = config or Config(), kernel.shape[-1]
    fused = form._replace(norm=form.norm and outputs <= WIDEST)  # a tile has to have all channels of its pixels
    size = plan(x, kernel, fused, residual is not None, config)
    more, times = [(0, size.outputs - outputs)], 2 if form.upsample else 1
    shape = (size.batch * size.frames, size.height, size.width)
    grown = (shape[0], shape[1], 2, shape[2], 2 * size.outputs) if form.upsample else (*shape, size.outputs)
    flat = x.reshape(*shape, size.inputs)
    past = flat if past is None else past.astype(x.dtype).reshape(-1, *flat.shape[1:])
    bias = jnp.pad(bias.astype(jnp.float32), more)
    gain = jnp.pad(scale.astype(jnp.float32), more) if fused.norm else bias
    added = bias if residual is None else jnp.pad(residual.astype(x.dtype), [(0, 0)] * 4 + more).reshape(grown)
    if config.interpreted:  # it fills with zeros what lies behind an array, and not what lies before it
        flat, past = (jnp.pad(frames, ((0, 0), (1, 0), (1, 0), (0, 0))) for frames in (flat, past))
    settings = {"size": size, "config": config, "divisor": outputs, "eps": eps, "out_shape": grown}
    y = _run(flat, past, weights(kernel, size, x.dtype), bias, gain, added, **settings)
    y = y.reshape(size.batch, size.frames, times * size.height, times * size.width, size.outputs)[..., :outputs]
    if form.upsample:  # or XLA writes all of it again as float32, for a norm that comes next
        y = lax.optimization_barrier(y)
    return normed(y, scale, eps) if form.norm and not fused.norm else y


def weights(kernel: jax.Array, size: Plan, dtype: jnp.dtype) -> jax.Array:
    """[phase x share x step x row of the kernel, output, channel of the step]: in the order in which they are needed."""
    kernel = kernel.astype(jnp.float32)
    if size.form.upsample:
        # which rows (or columns) of the kernel fall on the same one of the input, for even and for odd outputs
        sums = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
        kernel = jnp.einsum("aih,bjw,thwcn->abtijcn", sums, sums, kernel, precision=lax.Precision.HIGHEST)
    kernel = kernel.reshape(size.phases, size.taps, size.side, size.side, *kernel.shape[-2:])
    missing = size.chunks * STEP - size.inputs, size.outputs - kernel.shape[-1]
    kernel = jnp.pad(kernel, [(0, 0)] * 4 + [(0, more) for more in missing]).astype(dtype)
    kernel = kernel.reshape(*kernel.shape[:4], size.chunks, STEP, size.shares, size.channels)
    kernel = kernel.transpose(0, 6, 1, 3, 4, 2, 7, 5)  # phase share tap column chunk | row output channel
    return kernel.reshape(-1, size.channels, STEP)


@functools.partial(jax.jit, static_argnames=("size", "config", "divisor", "eps", "out_shape"))
def _run(*arrays: jax.Array, size: Plan, config: Config, divisor: int, eps: float, out_shape: tuple[int, ...]) -> jax.Array:
    """A function of its own for XLA: a decoder has many layers of the same shapes, and compiles their kernel once."""
    half, side, steps, stages = size.rows // 2, size.side, size.steps, size.stages
    blocks, ahead = min(config.multiprocessors, size.tiles), AHEAD * size.side
    border = 0 if config.interpreted else -1  # where the image begins; in the interpreter there are zeros before it
    ragged = size.height % size.rows > 0  # then some rows are not stored, and counting the stores does not tell which are done
    rest = size.width % COLUMNS  # pixels of the last tile of a row, where it is not full

    def body(x_g, past_g, w_g, bias_g, scale_g, added_g, out_g, x_s, w_s, out_s, x_full, x_free, w_full, w_free, added):
        written, read = (x_s, x_s) if config.interpreted else x_s
        wg, first = lax.axis_index("wg"), lax.axis_index("block")
        mine = mosaic.turns(size.tiles, first, blocks)

        def tile(i) -> Tile:
            n = first + i * blocks
            numbers = []
            for count in (size.shares, size.phases, size.frames, size.places[1], size.places[0]):
                numbers.append(lax.rem(n, count))
                n = lax.div(n, count)
            share, phase, frame, column, row = numbers
            return Tile(n, frame, row * size.rows, column * COLUMNS, phase, share)

        def here(at: Tile, row, pixels: int = COLUMNS):
            """Of the outputs, or of what is added to them: a row of a tile."""
            channels = pl.ds(at.share * size.channels, size.channels)
            place = (at.batch * size.frames + at.frame, row)
            if size.form.upsample:
                channels = pl.ds(lax.rem(at.phase, 2) * size.outputs + at.share * size.channels, size.channels)
                place = (*place, lax.div(at.phase, 2))
            return (*place, pl.ds(at.column, pixels), channels)

        @pl.when(wg < 2)
        def consumer():
            plgpu.set_max_registers(232, action="increase")

            def rows(at: Tile, r):
                return at.row + wg * half + r

            def fetch_added(at: Tile, r):
                """What is added to row r, to where it waits to be stored."""
                slot = wg * size.staged + r % size.staged
                source = added_g.at[here(at, rows(at, r))]
                pl.when(rows(at, r) < size.height)(lambda: plgpu.copy_gmem_to_smem(source, out_s.at[slot], added.at[slot]))

            def store(at: Tile, r: int, y):
                slot = wg * size.staged + r % size.staged
                staged = out_s.at[slot]
                y = y + channels(bias_g, at, y.shape)
                if size.residual:

                    @pl.when(rows(at, r) < size.height)
                    def _():
                        plgpu.barrier_wait(added.at[slot])

                    y = y + load(staged, MATRIX)
                else:
                    plgpu.wait_smem_to_gmem(0 if ragged else size.staged - 1, wait_read_only=True)
                if size.form.norm:
                    square = (y * y).sum(axis=1) * (1 / divisor) + eps
                    y = y * across(lax.rsqrt(square), y.shape, 0) * channels(scale_g, at, y.shape)
                    y = y / (1 + jnp.exp(-y))
                staged[...] = y.astype(jnp.bfloat16)
                plgpu.commit_smem()

                def copy(pixels: int):
                    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, pixels)], out_g.at[here(at, rows(at, r), pixels)])

                # Rows without a transform go out as so many bytes, and those beyond the end of a row would be the next one's.
                @pl.when(rows(at, r) < size.height)
                def _():
                    if rest == 0:
                        copy(COLUMNS)
                    else:
                        lax.cond(at.column + COLUMNS > size.width, lambda: copy(rest), lambda: copy(COLUMNS))

                if size.residual and r + size.staged < half:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    fetch_added(at, r + size.staged)

            def channels(vector, at: Tile, shape):
                part = vector.at[pl.ds(at.share * size.channels, size.channels)]
                return across(load(part, COLUMN), shape, 1)

            def release(m, last: bool):
                """The weights of row m, counted through all steps, and after the last row of a step its pixels."""
                plgpu.barrier_arrive(w_free.at[lax.rem(m, ahead)])
                if last:
                    plgpu.barrier_arrive(x_free.at[lax.rem(lax.div(m, side), stages)])

            @pl.loop(0, mine)
            def _(i):
                at = tile(i)
                if size.residual:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for r in range(size.staged):
                        fetch_added(at, r)

                def products(*sums):
                    def step(k, _):
                        n = i * steps + k
                        slot = lax.rem(n, stages)
                        plgpu.barrier_wait(x_full.at[slot])
                        for row in range(side):
                            m = n * side + row
                            plgpu.barrier_wait(w_full.at[lax.rem(m, ahead)])
                            for r, total in enumerate(sums):
                                plgpu.wgmma(total, read.at[slot, wg * half + r + row], w_s.at[lax.rem(m, ahead)].T)
                            plgpu.wgmma_wait(half)  # these are under way, those before are done
                            pl.when((k > 0) | (row > 0))(functools.partial(release, m - 1, row == 0))

                    lax.fori_loop(0, steps, step, None)
                    return tuple(total[...] for total in sums)

                totals = pl.run_scoped(products, *[plgpu.ACC((COLUMNS, size.channels), jnp.float32)] * half)
                release((i + 1) * steps * side - 1, True)
                for r, y in enumerate(totals):
                    store(at, r, y)

            plgpu.wait_smem_to_gmem(0)

        def fetch(n):
            slot, k, at = lax.rem(n, stages), lax.rem(n, steps), tile(lax.div(n, steps))
            chunk, column = lax.rem(k, size.chunks), lax.rem(lax.div(k, size.chunks), side)
            frame = at.frame + lax.div(k, size.chunks * side) - (size.taps - 1)
            row, begin = at.row + border, at.column + column + border
            if size.form.upsample:
                row, begin = row + lax.div(at.phase, 2), begin + lax.rem(at.phase, 2)
            patch = pl.ds(row, size.rows + side - 1), pl.ds(begin, COLUMNS), pl.ds(chunk * STEP, STEP)
            pl.when(n >= stages)(lambda: plgpu.barrier_wait(x_free.at[slot]))

            @pl.when(frame >= 0)
            def _():
                plgpu.copy_gmem_to_smem(x_g.at[at.batch * size.frames + frame, *patch], written.at[slot], x_full.at[slot])

            if size.taps > 1:

                @pl.when(frame < 0)
                def _():
                    before = at.batch * (size.taps - 1) + frame + size.taps - 1
                    plgpu.copy_gmem_to_smem(past_g.at[before, *patch], written.at[slot], x_full.at[slot])

            for row in range(side):
                m = n * side + row
                place = lax.rem(m, ahead)
                pl.when(m >= ahead)(functools.partial(plgpu.barrier_wait, w_free.at[place]))
                here = ((at.phase * size.shares + at.share) * steps + k) * side + row
                plgpu.copy_gmem_to_smem(w_g.at[here], w_s.at[place], w_full.at[place])

        @pl.when(wg == 2)
        def producer():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def per_warp(warp):
                @pl.when(warp == 0)
                def _():
                    pl.loop(0, mine * steps)(fetch)

                    for free, number, slots in ((x_free, mine * steps, stages), (w_free, mine * steps * side, ahead)):

                        @pl.loop(lax.max(number - slots, 0), number)  # no arrival may be left that nobody saw
                        def _(n, free=free, slots=slots):
                            plgpu.barrier_wait(free.at[lax.rem(n, slots)])

    patch = functools.partial(plgpu.SMEM, (stages, size.rows + side - 1, COLUMNS, STEP), jnp.bfloat16)
    # A copy into tiles would have to begin at a multiple of 8 pixels. 64 pixels of 32 channels lie the same way in tiles and
    # in rows, so the copies write them as rows, and the products read them as tiles.
    image = patch(transforms=ROUND)
    if not config.interpreted:
        image = plgpu.RefUnion(patch(transforms=ROUND[1:]), image)
    smooth = ROUND if size.channels % STEP == 0 else ()
    return mosaic.kernel(
        body,
        config,
        grid={"block": blocks},
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.bfloat16),
        scratch_types=[
            image,
            plgpu.SMEM((ahead, size.channels, STEP), jnp.bfloat16, transforms=ROUND),
            plgpu.SMEM((2 * size.staged, COLUMNS, size.channels), jnp.bfloat16, transforms=smooth),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=ahead),
            plgpu.Barrier(num_barriers=ahead, num_arrivals=2),
            plgpu.Barrier(num_barriers=2 * size.staged),
        ],
    )(*arrays)
