"""The public call: checks its arguments, picks an implementation, runs it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.choice import choose, require
from pallas_kernels.linear import hopper, types, xla
from pallas_kernels.linear.types import FLOAT8, Quantised

ACTIVATIONS = (None, "gelu")


class Implementation(NamedTuple):
    reason: Callable[..., str | None]  # as `explain`: why it cannot run this call here; None if it can
    run: Callable[..., Any]  # (x, w, bias, layer, *, activation, gate, residual, reach, dtype) -> what `linear` returns


# In order of preference.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "hopper": Implementation(hopper.reason, hopper.linear),
    "xla": Implementation(lambda *call: None, xla.linear),
}


def linear(
    x: Quantised,
    w: Quantised,
    bias: jax.Array,
    *,
    layer: jax.Array | None = None,
    activation: Literal["gelu"] | None = None,
    gate: jax.Array | None = None,
    residual: jax.Array | None = None,
    quantise: bool = False,
    reach: jax.Array | None = None,
    dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array | Quantised:
    """y = x w^T + bias, its products summed in float32; then gelu(y), or residual + y, or residual + gate * y.

    With `quantise` the output is float8 again, for the next layer. The scale of a row is then known before the row is, from
    the bound that `types.reach` explains, so that nothing is read twice, neither the activations for their norm nor the
    output for its largest number. The bound is loose: at 1536 inputs 35 times for Gaussian activations, 280 for those with
    one channel a hundred times the others. But float8 has 15 octaves of full relative precision, and GELU has no use for
    more than a few: what is lost lies far below the largest number of a row. In these two cases the rounding costs 2.70e-2
    and 2.68e-2 of a row, and 2.64e-2 and 2.63e-2 with a scale taken from the finished row (tests/kernels/test_linear.py).

    For inference only: differentiating this call raises NotImplementedError.

    Args:
        x: [..., in] float8 and its scale [...] float32.
        w: [out, in] float8 and its scale [out] float32; with `layer`, [layer, out, in] and [layer, out].
        bias: [out], or with `layer` [layer, out].
        layer: [] int32: which of a stack of layers. The kernel reads it where it lies, while a slice would be copied.
        activation: "gelu", the tanh form, or None.
        gate: [b, f, out]: what the outputs of the tokens of each frame are multiplied with, before they are added to
            `residual`. x is [b, t, in] then, with t / f tokens a frame.
        residual: [..., out] of `dtype`.
        quantise: whether to return float8; not with a residual.
        reach: `types.reach(w, bias)`, [2] or with `layer` [layer, 2] float32. None: computed in this call, which reads all
            weights.
        dtype: of the output, bfloat16 or float32, unless it is float8.
        implementation: "hopper" (compute capability 9.0) or "xla" (any backend): a named one runs or raises. None takes the
            first that can run the call.

    Returns:
        [..., out] of `dtype`, or Quantised.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    dtype = jnp.dtype(dtype)
    _check(x, w, bias, layer, activation, gate, residual, quantise, reach, dtype)
    x, w, bias, gate, residual = _for_inference((x, w, bias, gate, residual))
    tokens = None if gate is None else x.values.shape[1] // gate.shape[1]
    can = explain(w.values.shape[-1], w.values.shape[-2], tokens, None if quantise else dtype)
    choice = choose("linear", implementation, can)
    if quantise and reach is None:
        reach = types.reach(w, bias)
    run = IMPLEMENTATIONS[choice].run
    return run(x, w, bias, layer, activation=activation, gate=gate, residual=residual, reach=reach, dtype=dtype)


def explain(inputs: int, outputs: int, frame_tokens: int | None = None, dtype: Any = jnp.bfloat16) -> dict[str, str | None]:
    """Every implementation in the order of choice: why it cannot run such calls on this machine, or None if it can.

    Args:
        inputs, outputs: of the layer.
        frame_tokens: tokens of a frame, where there is a gate.
        dtype: of the output; None where it is quantised.
    """
    return {name: choice.reason(inputs, outputs, frame_tokens, dtype) for name, choice in IMPLEMENTATIONS.items()}


@jax.custom_jvp
def _for_inference(arrays):
    return arrays


@_for_inference.defjvp
def _no_gradient(arrays, tangents):
    raise NotImplementedError("a linear layer on float8 numbers has no gradient: train with the full-precision weights")


def _check(x, w, bias, layer, activation, gate, residual, quantise, reach, dtype) -> None:
    for name, rows in (("x", x), ("w", w)):
        require(rows.values.dtype == FLOAT8, f"{name}.values must be float8_e4m3fn, received {rows.values.dtype}")
        require(rows.scale.dtype == jnp.float32, f"{name}.scale must be float32, received {rows.scale.dtype}")
        shape = rows.values.shape[:-1]
        require(
            rows.scale.shape == shape, f"{name}.scale.shape={rows.scale.shape} must be {shape}, of the rows of {name}.values"
        )
    shape, stack = w.values.shape, () if layer is None else w.values.shape[:1]
    require(
        len(shape) == 2 + (layer is not None),
        f"{w.values.shape=} must be {'[out, in] without layer' if layer is None else '[layer, out, in] with layer'}",
    )
    if layer is not None:
        require(jnp.ndim(layer) == 0, f"layer must be a scalar, received shape {jnp.shape(layer)}")
    out, inputs = shape[-2:]
    require(x.values.size > 0 and x.values.shape[-1] == inputs, f"{x.values.shape=} must be [..., {inputs}], nothing empty")
    require(bias.shape == (*stack, out), f"{bias.shape=} must be {(*stack, out)}")
    require(activation in ACTIVATIONS, f"{activation=} must be one of {', '.join(map(repr, ACTIVATIONS))}")
    require(dtype in (jnp.bfloat16, jnp.float32), f"dtype={dtype.name} must be bfloat16 or float32")
    whole = (*x.values.shape[:-1], out)
    if residual is not None:
        require(residual.shape == whole, f"{residual.shape=} must be {whole}")
        require(residual.dtype == dtype, f"{residual.dtype=} must be {dtype=}")
        require(not quantise, "quantise=True goes without a residual")
        require(activation is None, f"{activation=} goes without a residual")
    if gate is not None:
        require(residual is not None, "gate goes with a residual")
        require(len(whole) == 3, f"{x.values.shape=} must be [b, t, in] where there is a gate")
        require(
            gate.ndim == 3 and gate.shape[::2] == (whole[0], out) and whole[1] % gate.shape[1] == 0,
            f"{gate.shape=} must be [{whole[0]}, f, {out}], f frames of equally many of the {whole[1]} tokens",
        )
    if reach is not None:
        require(quantise, "reach goes with quantise=True")
        require(
            reach.shape == (*stack, 2) and reach.dtype == jnp.float32,
            f"reach must be float32 {(*stack, 2)}, received {reach.dtype} {reach.shape}",
        )
