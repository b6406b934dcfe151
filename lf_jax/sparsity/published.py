"""Choices of blocks that others have published, brought to what all selectors here share: lists of blocks, equal budgets.

The papers attend within a whole video, at a sparsity that follows from window sizes, decay factors or thresholds. Here a
chunk attends to the cache and itself, and a query block gets as many blocks as the budget says. So each paper's rule is
turned into an order of the key blocks: whatever its own knob would admit first comes first. Time is counted in visible
frames; frames that a window has dropped leave no gap, and the choice is the same for all tokens of a query block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Float
from lf_jax.sparsity.baselines import topk
from lf_jax.sparsity.select import Inputs, best_blocks, block_scores, visible_tokens
from lf_jax.tokens import Grid
from pallas_kernels import BlockMap

TIE = 1e-3  # how much nearness in time and space counts among blocks that windows of almost one size reach


def sta(inputs: Inputs) -> BlockMap:
    """Sliding Tile Attention: a box of frames, rows and columns around the query block.

    arXiv 2502.04507: the box is moved, not cut, where it would stick out of the video. The paper searches for the size of every
    head's box. Here the box has the proportions of what is visible and grows with the budget, to which its last shell is cut,
    the nearest blocks first. The tiles are our blocks, runs of tokens row by row within a frame instead of cuboids: the box of
    a query block unites those of its tokens, and a key block counts as soon as one of its tokens is in.
    """
    grid = inputs.grid
    row, column = np.divmod(np.arange(grid.frame_tokens), grid.columns)
    rows = half_window(row[:, None], row, grid.rows) / grid.rows
    columns = half_window(column[:, None], column, grid.columns) / grid.columns
    apart = np.maximum(rows, columns)

    def along(query: np.ndarray, key: np.ndarray, frames: int) -> np.ndarray:
        return half_window(query, key, frames) / frames

    return _static(inputs, along, apart, lambda time, space: jnp.maximum(time, space) + TIE * (time + space))


def half_window(query: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """How far the smallest window that holds `key` reaches to either side of its centre.

    The window is on `query` where that leaves it within 0 .. size - 1, and else moved inwards as little as possible.
    """
    return np.minimum(abs(key - query), np.where(key >= query, key, size - 1 - key) / 2)


def radial(inputs: Inputs) -> BlockMap:
    """Radial Attention: a band around the token's own place that halves whenever the distance in time doubles.

    arXiv 2506.19852: a token at place k of a frame of s tokens sees place l of a frame d frames away where
    |k - l| + 1 <= c s / 2**floor(log2(max(d, 1))), and the first frames (`sink_frames`) as if they were near. In the paper c is
    1; here it grows with the budget, and of equals the nearer frame comes first. A block sees what one of its tokens sees. The
    paper's thinned diagonals, for bands below one token, do not occur: they take more frames than a frame has tokens.
    """
    place, sink = np.arange(inputs.grid.frame_tokens), inputs.settings.sink_frames

    def halvings(query: np.ndarray, key: np.ndarray, frames: int) -> np.ndarray:
        distance = abs(query - key)
        times = np.floor(np.log2(np.maximum(distance, 1)))
        return np.where(key < sink, 0, times) + distance / frames  # a fraction, for the order of equals

    width = abs(place[:, None] - place) + 1.0
    return _static(inputs, halvings, width, lambda times, width: width * 2.0 ** jnp.floor(times) + times % 1)


def vmoba(inputs: Inputs) -> BlockMap:
    """VMoBA: the best groups of blocks by mean key; layers group by frame, by place, and by both in turn.

    arXiv 2506.23858: partitions along time, space and both alternate from layer to layer (1-D, 2-D, 3-D). Here a 1-D group is a
    frame, a 2-D group one place in all frames, a 3-D group one place in as many frames as the chunk has; a place is a key
    block, a run of tokens instead of a rectangle. In the paper all queries of a head compete for as many pairs as a threshold
    on their similarity admits; here every query block gets the budget, to which the last group is cut, the earliest blocks
    first. Queries are means over query blocks, not single tokens.
    """
    time, blocks = inputs.time, inputs.time.blocks.size
    frame, place = jnp.divmod(jnp.arange(blocks), time.frame_blocks)
    frame = _rank(frame, time.past, time.cached // time.frame_blocks)
    span = time.current // time.frame_blocks
    group = jnp.stack([frame, place, frame // span * time.frame_blocks + place])[inputs.layer % 3]
    member = jax.nn.one_hot(group, blocks) * visible_tokens(inputs)[:, None]
    sums = jnp.einsum("bhqk,kg->bhqg", block_scores(inputs), member, precision=jax.lax.Precision.HIGHEST)
    return best_blocks(inputs, (sums / jnp.maximum(member.sum(0), 1))[..., group])


def sla(inputs: Inputs) -> BlockMap:
    """SLA: the best blocks by pooled score, after the mean key has been taken off every key. The same as "topk".

    arXiv 2509.24006, and the authors' code: taking one vector off all keys takes one number off all scores of a query, which
    changes no order; it only saves bits in 16-bit arithmetic, and these scores are in float32. What sets SLA apart is the
    linear branch over what is left out: `lf_jax.sparsity.marginal`, in models with `linear_branch`.
    """
    return topk(inputs)


def _static(
    inputs: Inputs,
    along: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    apart: Float[np.ndarray, "token token"],
    combine: Callable[[Array, Array], Array],
) -> BlockMap:
    """The blocks that a mask which depends on positions alone admits first.

    Args:
        along: (frame of the query, frame of the key, visible frames) -> what the mask makes of their distance.
        apart: of two tokens of a frame, query first, likewise.
        combine: (`along`, `apart`) -> how large the mask must be, increasing in `apart`.
    """
    time, (b, _, head, _) = inputs.time, inputs.q.shape
    frames, slots = time.current // time.frame_blocks, time.cached // time.frame_blocks
    query, key = np.arange(frames)[:, None], np.arange(slots + frames)
    table = [along(past + query, _rank(key, past, slots), past + frames) for past in range(slots + 1)]
    between = jnp.asarray(np.stack(table), jnp.float32)[time.past]  # [frame of the chunk, frame]
    within = jnp.asarray(nearest(apart, inputs.grid, frames), jnp.float32)
    needed = combine(between[:, None, :, None], within[:, :, None]).min(0)
    scores = -needed.reshape(needed.shape[0], -1)
    return best_blocks(inputs, jnp.broadcast_to(scores, (b, head, *scores.shape)))


def nearest(
    apart: Float[np.ndarray, "token token"], grid: Grid, frames: int
) -> Float[np.ndarray, "frame query_block key_block"]:
    """The least of `apart` between the tokens of a query block that lie in a frame of the chunk and those of a key block of a
    frame; infinite where the query block has none in that frame."""
    by_key = np.minimum.reduceat(apart, np.arange(grid.frame_blocks) * grid.block_k, axis=1)
    frame, token = np.divmod(np.arange(frames * grid.frame_tokens), grid.frame_tokens)
    found = np.full((frames, grid.query_blocks(frames), grid.frame_blocks), np.inf)
    np.minimum.at(found, (frame, np.arange(frame.size) // grid.block_q), by_key[token])
    return found


def _rank(frame, past, slots: int):
    """The place among the visible frames of frame `frame` of a timeline; of what is out of sight, any."""
    return frame - (frame >= slots) * (slots - past)
