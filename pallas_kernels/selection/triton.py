"""Selection as three Triton-lowered Pallas kernels: the means of blocks, the scores, and the choice of the best.

Nothing is sorted. The choice takes one program for each list, which holds its whole row of scores, one frame a row:

1. The middle frames are ranked by counting for each the frames ahead of it.
2. The score of the last block that the budget reaches is found bit by bit from the highest, one count a bit, until a count
   meets the budget. Floats compare as integers once the low bits of the negative ones are turned over.
3. Running sums give every block its place in the list. The row is in the order of time, so among equal scores a block's
   turn is the number of those before it.

jax 0.11 deprecates this lowering. Nothing but the table in `api.py` depends on this file.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import triton
from pallas_kernels.selection.types import Rule

LOWEST = np.iinfo(np.int32).min
HALF = 16  # bits of a count: two travel in one integer
MOST_FRAMES, MOST_BLOCKS = 128, 8192  # of a row with its padding: more do not fit the registers


def reason(head_dim: int | None, frames: int, frame_blocks: int) -> str | None:
    """Why these kernels cannot run such a call on the default device; None if they can. Arguments as in `api.explain`."""
    return triton.reason() or unsupported(head_dim, frames, frame_blocks)


def unsupported(head_dim: int | None, frames: int, frame_blocks: int) -> str | None:
    """What of a call these kernels cannot do on any device; None if nothing."""
    if head_dim is not None and (head_dim < 16 or head_dim & (head_dim - 1)):
        return f"head_dim must be a power of two of at least 16, received {head_dim}"
    rows, columns = pl.next_power_of_2(frames), pl.next_power_of_2(frame_blocks)
    if rows > MOST_FRAMES or rows * columns > MOST_BLOCKS:
        return f"holds {MOST_FRAMES} frames and {MOST_BLOCKS} blocks in powers of two, received {frames} of {frame_blocks}"
    return None


def means(x, sizes, block, *, warps=4, interpret=False):
    """See `api.block_means`. `warps`, `interpret`: as in `scores`."""
    b, _, heads, e = x.shape

    def kernel(sizes_ref, x_ref, out_ref):
        row, size = jnp.arange(pl.next_power_of_2(block))[:, None], sizes_ref[pl.program_id(0)]
        tokens = plt.load(x_ref.at[pl.program_id(0) * block + row, jnp.arange(e)[None, :]], mask=row < size, other=0)
        out_ref[...] = tokens.astype(jnp.float32).sum(0) / size.astype(jnp.float32)

    return pl.pallas_call(
        kernel,
        grid=(len(sizes), heads, b),
        in_specs=[_whole(len(sizes)), pl.BlockSpec((None, x.shape[1], None, e), lambda i, h, b: (b, 0, h, 0))],
        out_specs=pl.BlockSpec((None, None, None, e), lambda i, h, b: (b, i, h, 0)),
        out_shape=jax.ShapeDtypeStruct((b, len(sizes), heads, e), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(jnp.asarray(sizes, jnp.int32), x)


def scores(queries, keys, order, past, layer, *, tile=(64, 64), warps=4, interpret=False):
    """See `api.block_scores`.

    Args:
        tile: query blocks and key blocks of a program; powers of two.
        warps: of a program.
        interpret: run on any device, slowly, through the Pallas interpreter.
    """
    b, rows, heads, e = queries.shape
    columns, cached = order.shape[0], 0 if past is None else past.shape[2]
    across = pl.cdiv(columns, tile[1])
    # Three products of the tensor cores' short floats make one as exact as a float32 sum: on an H200 both were off by 3e-5
    # at most from float64, and the plain float32 product took three times as long.
    precision = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def kernel(order_ref, queries_ref, chunk_ref, *others):
        *cache, out_ref = others
        row = (lax.div(pl.program_id(0), across) * tile[0] + jnp.arange(tile[0]))[:, None]
        column = lax.rem(pl.program_id(0), across) * tile[1] + jnp.arange(tile[1])
        number, feature = plt.load(order_ref.at[column], mask=column < columns, other=0)[:, None], jnp.arange(e)[None, :]
        query = plt.load(queries_ref.at[row, feature], mask=row < rows, other=0)
        # Each key lies in one of two places; the masked half of these loads touches no memory.
        key = plt.load(chunk_ref.at[jnp.maximum(number - cached, 0), feature], mask=number >= cached, other=0)
        if cached:
            past_ref, layer_ref = cache
            key += plt.load(past_ref.at[layer_ref[0], number, feature], mask=number < cached, other=0)
        out = lax.dot_general(query, key, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
        plt.store(out_ref.at[row, column[None, :]], out, mask=(row < rows) & (column < columns)[None, :])

    def of_head(blocks: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, blocks, None, e), lambda i, h, b: (b, 0, h, 0))

    arrays, specs = [order, queries, keys], [_whole(columns), of_head(rows), of_head(keys.shape[1])]
    if cached:
        stack = pl.BlockSpec((past.shape[0], None, cached, None, e), lambda i, h, b: (0, b, 0, h, 0))
        arrays, specs = [*arrays, past, layer.astype(jnp.int32).reshape(1)], [*specs, stack, _whole(1)]
    return pl.pallas_call(
        kernel,
        grid=(across * pl.cdiv(rows, tile[0]), heads, b),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, None, rows, columns), lambda i, h, b: (b, h, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((b, heads, rows, columns), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(*arrays)


def choose(scores, order, past_frames, budget, rule: Rule, *, warps=None, interpret=False):
    """See `api.choose_blocks`. Returns index, count and, where frames end in dead tokens, whole; lists ascend in time.

    Args:
        warps: of a program; None: two for 1024 blocks, the fastest of 1 to 8 on an H200.
        interpret: as in `scores`.
    """
    b, heads, rows, blocks = scores.shape
    frames, slots, current = blocks // rule.frame_blocks, rule.cached // rule.frame_blocks, blocks - rule.cached
    height, breadth = pl.next_power_of_2(frames), pl.next_power_of_2(rule.frame_blocks)

    def kernel(past_ref, budget_ref, order_ref, scores_ref, index_ref, count_ref, *whole_ref):
        past, frame, block = past_ref[0], jnp.arange(height), jnp.arange(breadth)
        last = (block == rule.frame_blocks - 1)[None, :]
        place = frame[:, None] * rule.frame_blocks + block[None, :]
        real = (frame < frames)[:, None] & (block < rule.frame_blocks)[None, :]
        row = plt.load(scores_ref.at[place], mask=real, other=0)

        kept, most = frame < past, past
        if rule.keep_frames is not None:
            sums = (row * jnp.where(last, rule.block_k - rule.dead, rule.block_k).astype(jnp.float32)).sum(1)
            kept, most = kept & _kept(sums, frame, past, rule), jnp.minimum(past, rule.keep_frames)
        candidate = (kept | (frame >= slots))[:, None] & real
        available = most * rule.frame_blocks + current
        count = jnp.where(past == 0, available, jnp.clip(budget_ref[0], 1, jnp.minimum(available, rule.width)))

        key = jnp.where(candidate, _ordered(row), LOWEST)
        least = _least(key.reshape(-1), count)
        above, equal = key > least, candidate & (key == least)
        left = count - _number(above)  # for those that equal the least
        before = _before(above.astype(jnp.int32) + lax.shift_left(equal.astype(jnp.int32), HALF))
        turn = lax.shift_right_logical(before, HALF)
        taken = above | (equal & (turn < left))
        at = (before & (1 << HALF) - 1) + jnp.minimum(turn, left)
        if rule.dead:
            ends = (taken & last).astype(jnp.int32).sum(1)
            whole, earlier = count - ends.sum(), (lax.cumsum(ends) - ends)[:, None]
            at = jnp.where(last, whole + earlier, at - earlier)
            whole_ref[0][...] = whole
        number = plt.load(order_ref.at[place], mask=real, other=0)
        # The interpreter writes back what a mask hides: those have to aim elsewhere than the others.
        plt.store(index_ref.at[jnp.where(taken, at, rule.width)], number, mask=taken)
        tail = jnp.arange(pl.next_power_of_2(rule.width))
        plt.store(index_ref.at[tail], jnp.zeros_like(tail), mask=(tail >= count) & (tail < rule.width))
        count_ref[...] = count

    def of_row(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, width), lambda i, h, b: (b, h, i, 0))

    numbers = 2 if rule.dead else 1
    index, count, *whole = pl.pallas_call(
        kernel,
        grid=(rows, heads, b),
        in_specs=[_whole(1), _whole(1), _whole(blocks), of_row(blocks)],
        out_specs=[of_row(rule.width), *[pl.BlockSpec((None, None, None), lambda i, h, b: (b, h, i))] * numbers],
        out_shape=[jax.ShapeDtypeStruct((b, heads, rows, *more), jnp.int32) for more in ((rule.width,), *[()] * numbers)],
        compiler_params=plt.CompilerParams(num_warps=warps or max(1, height * breadth // 512), num_stages=1),
        interpret=interpret,
    )(*(x.astype(jnp.int32).reshape(-1) for x in (past_frames, budget, order)), scores)
    return index, count, whole[0] if rule.dead else None


def _whole(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((size,), lambda i, h, b: (0,))


def _kept(sums: jax.Array, frame: jax.Array, past: jax.Array, rule: Rule) -> jax.Array:
    """Whether a query block may visit each past frame. `sums`: of the scores of all its live tokens."""
    always = (frame < rule.sink_frames) | (frame >= past - rule.near_frames)
    middle = jnp.where(always, LOWEST, _ordered(sums))
    one, other = middle[:, None], middle[None, :]
    ahead = (other > one) | ((other == one) & (frame[None, :] < frame[:, None]))
    chosen = ahead.astype(jnp.int32).sum(1) < rule.keep_frames - rule.sink_frames - rule.near_frames
    return always | chosen


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats; -0 is 0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ (lax.shift_right_arithmetic(bits, 31) & np.iinfo(np.int32).max)


def _least(key: jax.Array, count: jax.Array) -> jax.Array:
    """A number that at least `count` keys reach, and exceed only if they are among the `count` greatest."""

    def unsettled(state):
        bit, _, reached = state
        return (bit >= 0) & (reached != count)

    def settle(state):
        bit, least, reached = state
        more = least ^ lax.shift_left(jnp.int32(1), bit)  # the highest bit is the sign: cleared, it makes more of a number
        number = _number(key >= more)
        enough = number >= count
        return bit - 1, jnp.where(enough, more, least), jnp.where(enough, number, reached)

    return lax.while_loop(unsettled, settle, (jnp.int32(31), jnp.int32(LOWEST), jnp.int32(key.size)))[1]


def _number(flags: jax.Array) -> jax.Array:
    return flags.reshape(-1).astype(jnp.int32).sum()


def _before(x: jax.Array) -> jax.Array:
    """The sum of what comes before each entry, row by row."""
    rows = x.sum(1)
    return lax.cumsum(x, axis=1) - x + (lax.cumsum(rows) - rows)[:, None]
