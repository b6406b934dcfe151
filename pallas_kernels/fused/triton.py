"""The passes over activations as Triton-lowered Pallas kernels: each reads its input once and writes its output once.

A row of Triton's tensors is a power of two wide, and a token (1536) is not, so kernels work on pieces of a row. With pieces of
128, and as many warps as rows, a lane holds four neighbouring numbers of whatever is read or written, in 32 bits or fewer: no
numbers move between lanes but for the sums along a row, and no warp waits for another.

jax 0.11 deprecates this lowering. Nothing but the table in `api.py` depends on this file.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import platform, triton
from pallas_kernels.fused.types import Layout
from pallas_kernels.linear.types import FLOAT8, Quantised, row_scale

PIECE = 128
MOST_PIECES = 16  # of a row: more do not fit the registers


def reason(d: int, head_dim: int | None, quantise: bool) -> str | None:
    """Why these kernels cannot run such a call on the default device; None if they can. Arguments as in `api.explain`."""
    return triton.reason() or unsupported(d, head_dim, quantise, platform.device().compute_capability)


def unsupported(d: int, head_dim: int | None, quantise: bool, capability: tuple[int, int]) -> str | None:
    """What of a call these kernels cannot do on a device of that compute capability; None if nothing."""
    if d % 16 or d > MOST_PIECES * _piece(d):
        return f"the width must be at most {MOST_PIECES} times a power of two from 16 to {PIECE}, received {d}"
    if head_dim is not None and (head_dim < 2 or head_dim > PIECE or head_dim & (head_dim - 1)):
        return f"head_dim must be a power of two of at most {PIECE}, received {head_dim}"
    if quantise and capability < (8, 9):
        return "float8 needs compute capability 8.9 or later, this is {}.{}".format(*capability)
    return None


def norm(x, shift, scale, unit, eps, quantised, *, rows=4, warps=4, interpret=False):
    """See `xla.norm`.

    Args:
        rows: tokens of a program; a power of two.
        warps: of a program.
        interpret: run on any device, slowly, through the Pallas interpreter.
    """
    b, _, d = x.shape
    frames = shift.shape[1]

    def norm_kernel(x_ref, shift_ref, scale_ref, *out_refs):
        live = _live(x.shape[1] // frames, rows)
        y = [part.astype(jnp.float32) for part in _load(x_ref, 0, rows, live)]
        mean = (sum(y).sum(1) / d)[:, None]
        y = [part - mean for part in y]
        inverse = lax.rsqrt(_squares(y) / d + eps)[:, None]
        factor, term = _vector(scale_ref, rows), _vector(shift_ref, rows)
        y = [part * inverse * (unit + f) + s for part, f, s in zip(y, factor, term, strict=True)]
        _finish(out_refs, y, live)

    of_frame = pl.BlockSpec((None, None, d), lambda i, f, b: (b if shift.shape[0] > 1 else 0, f, 0))
    tile = (x.reshape(b, frames, -1, d), rows, warps, interpret)
    return _by_rows(norm_kernel, *tile, quantised, [shift, scale], [of_frame] * 2, x.shape)


def quantise(x, *, rows=4, warps=4, interpret=False):
    """See `api.quantise`; the other arguments as in `norm`."""

    def quantise_kernel(x_ref, *out_refs):
        live = _live(x.shape[0] * x.shape[1], rows)
        _finish(out_refs, [part.astype(jnp.float32) for part in _load(x_ref, 0, rows, live)], live)

    return _by_rows(quantise_kernel, x.reshape(1, 1, -1, x.shape[2]), rows, warps, interpret, True, [], [], x.shape)


def norm_rope(x, weight, cos, sin, heads, eps, part, layout: Layout, *, step=16, rows=4, warps=4, interpret=False):
    """See `api.norm_rope`.

    Args:
        step: tokens of a program, at most; a power of two. It goes through them `rows` at a time, and sums up for the means
            what comes by in a row: `rows` sums a program, which are added up afterwards.
        rows, warps, interpret: as in `norm`.
    """
    b, d, tokens = x.shape[0], weight.shape[0], layout.frame_tokens
    e, block = d // heads, layout.block or step
    step = min(step, block & -block)
    rows = min(rows, step)
    blocks, steps = pl.cdiv(tokens, block), block // step  # blocks of a frame, steps of a block
    pieces = range(d // _piece(d))

    def turned(y, cos, sin):
        even, odd = jnp.unstack(y.reshape(rows, -1, e // 2, 2), axis=-1)
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(y.shape)

    def norm_rope_kernel(x_ref, weight_ref, *refs):
        tables, (out_ref, *sums_ref) = refs[: len(refs) - len(outs)], refs[len(refs) - len(outs) :]
        first = pl.program_id(0) * step
        size = jnp.minimum(tokens - lax.div(first, block) * block, block)

        def load(row):
            """A step early: what lies behind the program's own tokens is not touched."""
            return _load(x_ref, row, rows, first + row + jnp.arange(rows) < jnp.minimum(first + step, tokens))

        def visit(i, carry):
            sums, y = carry
            row, following = i * rows, load((i + 1) * rows)
            live = None if tokens % block == 0 else first + row + jnp.arange(rows) < tokens
            y = [part.astype(jnp.float32) for part in y]
            inverse = lax.rsqrt(_squares(y) / d + eps)[:, None]
            y = [part * inverse * w for part, w in zip(y, _vector(weight_ref, rows), strict=True)]
            if tables:
                angle = [_table(ref, row, (rows, _piece(d) // e, e // 2), live) for ref in tables]
                y = [turned(part, *angle) for part in y]
            _store(out_ref, row, rows, y, None if layout.padded else live)
            return [total + part for total, part in zip(sums, y, strict=True)], following

        start = [jnp.zeros((rows, _piece(d)), jnp.float32) for _ in pieces]
        sums, _ = lax.fori_loop(0, step // rows, visit, (start, load(0)))
        for ref in sums_ref:
            _store(ref, 0, rows, [total / size.astype(jnp.float32) for total in sums], None)

    def some(count: int, column: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, count, d), lambda i, f, b: (b, f, i, column))

    arrays, specs = [x.reshape(b, layout.frames, tokens, -1), weight], [some(step, part), pl.BlockSpec((d,), lambda *i: (0,))]
    if cos is not None:
        arrays += [table.reshape(layout.frames, tokens, -1) for table in (cos, sin)]
        specs += [pl.BlockSpec((None, step, e // 2), lambda i, f, b: (f, i, 0))] * 2
    length = blocks * block if layout.padded else tokens
    shapes, outs = [jax.ShapeDtypeStruct((b, layout.frames, length, d), x.dtype)], [some(step, 0)]
    if layout.block is not None:
        shapes.append(jax.ShapeDtypeStruct((b, layout.frames, blocks * steps * rows, d), jnp.float32))
        outs.append(some(rows, 0))
    out, *sums = _call(norm_rope_kernel, (blocks * steps, layout.frames, b), specs, outs, shapes, warps, interpret)(*arrays)
    means = sums[0].reshape(b, -1, steps * rows, heads, e).sum(2) if sums else None
    return out.reshape(b, -1, heads, e), means


def _by_rows(kernel, x, rows, warps, interpret, quantised, arrays, specs, shape):
    """Runs a kernel on x [b, f, token, d], `rows` tokens a program; the result, of a given shape, may be quantised."""
    b, frames, tokens, d = x.shape
    tile = pl.BlockSpec((None, None, rows, d), lambda i, f, b: (b, f, i, 0))
    shapes, outs = [jax.ShapeDtypeStruct(x.shape, FLOAT8 if quantised else x.dtype)], [tile]
    if quantised:
        shapes.append(jax.ShapeDtypeStruct(x.shape[:3], jnp.float32))
        outs.append(pl.BlockSpec((None, None, rows), lambda i, f, b: (b, f, i)))
    grid = (pl.cdiv(tokens, rows), frames, b)
    values, *scale = _call(kernel, grid, [tile, *specs], outs, shapes, warps, interpret)(x, *arrays)
    return Quantised(values.reshape(shape), scale[0].reshape(shape[:2])) if quantised else values.reshape(shape)


def _call(kernel, grid, in_specs, out_specs, out_shape, warps, interpret):
    params = plt.CompilerParams(num_warps=warps, num_stages=1)
    specs = dict(grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape)
    return pl.pallas_call(kernel, **specs, compiler_params=params, interpret=interpret)


def _finish(refs, y, live):
    """Writes a tile to one reference, or quantised to two."""
    if len(refs) == 2:
        largest = jnp.abs(y[0])
        for part in y[1:]:
            largest = jnp.maximum(largest, jnp.abs(part))
        scale = row_scale(largest.max(1))
        plt.store(refs[1], scale, mask=live)
        y = [part * (1 / scale)[:, None] for part in y]
    _store(refs[0], 0, y[0].shape[0], y, live)


def _load(ref, row, rows, live) -> list[jax.Array]:
    """Rows from `row` on, in pieces; zero where they are not live (None: all are)."""
    mask, other = (None, None) if live is None else (live[:, None], 0)
    return [plt.load(ref.at[pl.ds(row, rows), at], mask=mask, other=other) for at in _columns(ref)]


def _store(ref, row, rows, parts, live):
    mask = None if live is None else live[:, None]
    for at, part in zip(_columns(ref), parts, strict=True):
        plt.store(ref.at[pl.ds(row, rows), at], part.astype(ref.dtype), mask=mask)


def _vector(ref, rows) -> list[jax.Array]:
    """A vector in pieces, read by each row for itself, so that it lies in the lanes where it is used."""
    at = [jnp.broadcast_to(at.start + jnp.arange(at.size), (rows, at.size)) for at in _columns(ref)]
    return [plt.load(ref.at[column]).astype(jnp.float32) for column in at]


def _table(ref, row, shape, live) -> jax.Array:
    """Rows of a table [row, pair] in the shape (row, head, pair) of a piece, for the same reason."""
    at = (row + lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 2))
    mask, other = (None, None) if live is None else (live[:, None, None], 0)
    return plt.load(ref.at[at], mask=mask, other=other)


def _squares(parts) -> jax.Array:
    return sum(part * part for part in parts).sum(1)


def _live(tokens: int, rows: int) -> jax.Array | None:
    """Which rows of a program exist; None if all do in all programs."""
    return None if tokens % rows == 0 else pl.program_id(0) * rows + jnp.arange(rows) < tokens


def _piece(d: int) -> int:
    return min(d & -d, PIECE)


def _columns(ref) -> list:
    d = ref.shape[-1]
    return [pl.ds(at, _piece(d)) for at in range(0, d, _piece(d))]
