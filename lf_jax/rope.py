"""Rotary position embedding over three axes: frame, row, column (Wan2.1; Self-Forcing's causal variant).

A head of dimension e is e/2 interleaved pairs, split over the axes as [e/2 - 2 (e/2 // 3), e/2 // 3, e/2 // 3]. Pair i
of an axis with p pairs turns by `position * theta ** (-i / p)`: the exponents are per axis, not per head.
"""

import jax.numpy as jnp

from lf_jax.arrays import Array, Float, Int

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs that encode the frame, the row and the column."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def frequencies(pairs: int) -> Float[Array, " {pairs}"]:
    return THETA ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)


def angles(start: Int[Array, ""], frames: int, rows: int, columns: int, head_dim: int) -> Float[Array, "t half"]:
    """Angles, in radians, of the tokens of `frames` frames that begin at absolute frame `start`."""
    along = (start + jnp.arange(frames), jnp.arange(rows), jnp.arange(columns))
    per_axis = [n.astype(jnp.float32)[:, None] * frequencies(p) for n, p in zip(along, axis_pairs(head_dim), strict=True)]
    grid = [
        jnp.broadcast_to(
            a.reshape([-1 if i == axis else 1 for i in range(3)] + [a.shape[1]]), (frames, rows, columns, a.shape[1])
        )
        for axis, a in enumerate(per_axis)
    ]
    return jnp.concatenate(grid, axis=-1).reshape(frames * rows * columns, head_dim // 2)


def rotate(x: Float[Array, "*b t head e"], angle: Float[Array, "#t half"]) -> Float[Array, "*b t head e"]:
    """Turns every pair of `x` by its angle, in float32; the result has the dtype of `x`."""
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def shift_frames(x: Float[Array, "*b t head e"], frames: Int[Array, ""]) -> Float[Array, "*b t head e"]:
    """Moves rotated keys, or means of keys of one frame, by `frames` frames; rows and columns stay."""
    time, *_ = axis_pairs(x.shape[-1])
    angle = frames.astype(jnp.float32) * frequencies(time)
    return rotate(x, jnp.pad(angle, (0, x.shape[-1] // 2 - time))[None])
