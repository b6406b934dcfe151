"""What goes into and comes out of a float8 linear layer."""

import dataclasses

import jax
import jax.numpy as jnp

FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448  # of e4m3
SMALLEST_ROW = 1e-5  # rows whose largest number is less are scaled as if it were this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Rows of float8 numbers with a scale each: `values * scale[..., None]` is what they stand for."""

    values: jax.Array  # [..., d] float8_e4m3fn
    scale: jax.Array  # [...] float32: of a token's row of activations, or of an output channel's row of weights


def quantise_rows(x: jax.Array) -> Quantised:
    """Every row in float8, its largest number at the end of the range: for weights, and what activations are checked against.

    scale = max(max|row|, 1e-5) / 448, as LightX2V makes its files (tools/convert/quant/quant.py).

    Args:
        x: [..., d], weights as [out, in] (or a stack of them), activations as [..., in].
    """
    x = x.astype(jnp.float32)
    scale = row_scale(jnp.abs(x).max(-1))
    return Quantised((x / scale[..., None]).astype(FLOAT8), scale)


def row_scale(largest: jax.Array) -> jax.Array:
    """The scale of rows whose numbers are at most `largest`, [...] float32, in magnitude."""
    return jnp.maximum(largest, SMALLEST_ROW) / LARGEST


def reach(w: Quantised, bias: jax.Array) -> jax.Array:
    """(c0, c1), with which every output of the layer lies within c0 * scale + c1 for a row of activations of that scale.

    The numbers of a float8 row are at most 448 in magnitude, so |y_j| <= scale * 448 * |w_j|_1 + |bias_j| (Hoelder). c0 takes
    the largest of the 448 |w_j|_1, c1 the largest of the |bias_j|. Both depend on the weights alone.

    Args:
        w: [out, in], or a stack of them [layer, out, in].
        bias: [out], or [layer, out].

    Returns:
        [2], or [layer, 2], float32.
    """
    rows = jnp.abs(w.values.astype(jnp.float32)).sum(-1) * w.scale
    return jnp.stack([LARGEST * rows.max(-1), jnp.abs(bias.astype(jnp.float32)).max(-1)], axis=-1)
