"""The public calls: check their arguments, pick an implementation, run it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels.choice import choose, require
from pallas_kernels.fused import triton, xla
from pallas_kernels.fused.types import Layout
from pallas_kernels.linear.types import Quantised


class Implementation(NamedTuple):
    reason: Callable[..., str | None]  # (d, head_dim, quantise) -> why it cannot run that here; None if it can
    norm: Callable[..., Any]  # (x, shift, scale, unit, eps, quantised) -> array or Quantised
    quantise: Callable[..., Quantised]  # (x) -> Quantised
    norm_rope: Callable[..., tuple]  # (x, weight, cos, sin, heads, eps, part, layout) -> array, means or None


# In order of preference.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "triton": Implementation(triton.reason, triton.norm, triton.quantise, triton.norm_rope),
    "xla": Implementation(lambda *call: None, xla.norm, xla.quantise, xla.norm_rope),
}


def norm_modulate(
    x: jax.Array,
    shift: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    quantise: bool = False,
    implementation: str | None = None,
) -> jax.Array | Quantised:
    """Layer norm without weights, then `* (1 + scale) + shift` of the frame of a token. Float32 inside, rounded once.

    Args:
        x: [b, t, d], frames in order.
        shift, scale: [b, f, d] float32; f divides t.
        quantise: round to float8 with a scale a token, instead of to the dtype of `x`.
        implementation: "triton" (compute capability 8.x, 9.x, 12.x; float8 from 8.9 on) or "xla" (any backend): a named one
            runs or raises. None takes the first that can run the call. The gradient is that of "xla" under either; of what is
            quantised there is none.

    Returns:
        [b, t, d] in the dtype of `x`, or `Quantised`.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    b, t, d = x.shape
    frames = shift.shape[1]
    for name, vector in (("shift", shift), ("scale", scale)):
        require(vector.shape == (b, frames, d), f"{name}.shape={vector.shape} must be [{b}, frame, {d}]")
    require(t % frames == 0, f"{x.shape=} must have the tokens of {frames} frames")
    return _norm(x, shift, scale, 1.0, eps, quantise, implementation)


def layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float, quantise: bool = False, implementation: str | None = None
) -> jax.Array | Quantised:
    """Layer norm `* weight + bias`. Float32 inside, rounded once.

    Args:
        x: [b, t, d].
        weight, bias: [d].
        quantise, implementation: as in `norm_modulate`.

    Returns and raises as `norm_modulate`.
    """
    for name, vector in (("weight", weight), ("bias", bias)):
        require(vector.shape == x.shape[2:], f"{name}.shape={vector.shape} must be {x.shape[2:]}")
    return _norm(x, bias[None, None], weight[None, None], 0.0, eps, quantise, implementation)


def quantise(x: jax.Array, *, implementation: str | None = None) -> Quantised:
    """Float8 with a scale a token, its largest number at the end of the range.

    Args:
        x: [b, t, d].
        implementation: as in `norm_modulate`.
    """
    return _chosen(implementation, x.shape[2], None, True).quantise(x)


def norm_rope(
    x: jax.Array,
    weight: jax.Array,
    cos: jax.Array | None = None,
    sin: jax.Array | None = None,
    *,
    heads: int,
    eps: float,
    part: int = 0,
    block: int | None = None,
    frame_tokens: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Queries or keys from a linear layer: RMS norm over the full width, rotation of the pairs of every head, means of blocks.

    Float32 inside, rounded once; the means are of what is not rounded yet.

    Args:
        x: [b, t, parts * d], the output of one or more linear layers side by side, read in place.
        weight: [d], of the norm.
        cos, sin: [t, d / heads / 2] float32, of the angles of the tokens (interleaved pairs); None: nothing turns.
        heads: they divide d.
        part: which d columns of `x`.
        block: tokens of a block whose mean is asked for.
        frame_tokens: blocks begin anew in every frame of so many tokens, and the result has every frame padded to whole blocks
            with zeros, as the key-value cache holds it. None: all tokens are one run, the last block may be short.
        implementation: as in `norm_modulate`. No gradient flows through the means.

    Returns:
        [b, t or padded, head, e] in the dtype of `x`, and [b, blocks, head, e] float32 means over the live tokens, or None.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    t, (d,) = x.shape[1], weight.shape
    parts, over = divmod(x.shape[2], d)
    require(over == 0 and 0 <= part < parts, f"{x.shape=} must hold whole parts as wide as weight, {d}, and {part=} be one")
    require(d % heads == 0, f"{heads=} must divide {d}")
    require((cos is None) == (sin is None), "cos and sin go together")
    for name, table in (("cos", cos), ("sin", sin)):
        half = f"{name}.shape={getattr(table, 'shape', None)} must be [{t}, {d / heads / 2:g}]"
        require(table is None or (table.shape[0], 2 * table.shape[1]) == (t, d // heads), half)
    require(block is None or block > 0, f"{block=} must be positive")
    require(block is not None or frame_tokens is None, f"{frame_tokens=} needs a block")
    require(frame_tokens is None or t % frame_tokens == 0, f"{x.shape=} must have whole frames of {frame_tokens} tokens")
    tokens = frame_tokens or t
    layout = Layout(t // tokens, tokens, block, padded=frame_tokens is not None and tokens % block > 0)
    chosen = _chosen(implementation, d, None if cos is None else d // heads, False).norm_rope

    def run(call: Callable) -> Callable:
        return lambda x, weight, cos, sin: call(x, weight, cos, sin, heads, eps, part, layout)

    return _differentiable(run(chosen), run(xla.norm_rope), x, weight, cos, sin)


def explain(d: int, head_dim: int | None = None, quantise: bool = False) -> dict[str, str | None]:
    """Every implementation in the order of choice: why it cannot run such calls on this machine, or None if it can.

    Args:
        d: the width of a token.
        head_dim: of what `norm_rope` turns; None for the other calls.
        quantise: whether the result is.
    """
    return {name: choice.reason(d, head_dim, quantise) for name, choice in IMPLEMENTATIONS.items()}


def _norm(x, shift, scale, unit, eps, quantised, implementation):
    chosen = _chosen(implementation, x.shape[2], None, quantised).norm
    if quantised:
        return chosen(x, shift, scale, unit, eps, True)

    def run(call: Callable) -> Callable:
        return lambda x, shift, scale: call(x, shift, scale, unit, eps, False)

    return _differentiable(run(chosen), run(xla.norm), x, shift, scale)


def _differentiable(run: Callable, reference: Callable, *arrays: Any) -> Any:
    """`run(*arrays)`; its gradient is that of `reference`, which computes the same."""
    call = jax.custom_vjp(run)
    call.defvjp(lambda *arrays: (run(*arrays), arrays), lambda arrays, out: jax.vjp(reference, *arrays)[1](out))
    return call(*arrays)


def _chosen(name: str | None, *call: Any) -> Implementation:
    return IMPLEMENTATIONS[choose("fused", name, explain(*call))]
