"""The public call: checks its arguments, picks an implementation, runs it."""

from collections.abc import Callable
from functools import partial
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
    plain: Callable[..., jax.Array]  # of plain arrays: (x, w, bias, layer, sliced, *, activation, gate, residual, turned)


# In order of preference.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "hopper": Implementation(hopper.reason, hopper.linear, hopper.plain),
    "xla": Implementation(lambda *call: None, xla.linear, xla.plain),
}


def linear(
    x: Quantised | jax.Array,
    w: Quantised | jax.Array,
    bias: jax.Array,
    *,
    layer: jax.Array | None = None,
    sliced: tuple[jax.Array, jax.Array] | None = None,
    turned: bool = False,
    activation: Literal["gelu"] | None = None,
    gate: jax.Array | None = None,
    residual: jax.Array | None = None,
    quantise: bool = False,
    reach: jax.Array | None = None,
    dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array | Quantised:
    """y = x w + bias, its products summed in float32; then gelu(y), or residual + y, or residual + gate * y.

    Plain arrays: "hopper" rounds once, what comes out. "xla" rounds what each operation returns to the dtype of x, the gated
    sum excepted. Differentiated, an implementation that nobody named is "xla", in value and gradient.

    Float8, for inference only. With `quantise` the output is float8 again, for the next layer. The scale of a row is then
    known before the row is, from the bound that `types.reach` explains, so that nothing is read twice, neither the activations
    for their norm nor the output for its largest number. The bound is loose: at 1536 inputs 35 times for Gaussian activations,
    280 for those with one channel a hundred times the others. But float8 has 15 octaves of full relative precision, and GELU
    has no use for more than a few: what is lost lies far below the largest number of a row. In these two cases the rounding
    costs 2.70e-2 and 2.68e-2 of a row, and 2.64e-2 and 2.63e-2 with a scale taken from the finished row
    (tests/kernels/test_linear.py).

    Args:
        x: [..., in]; or float8, with its scale [...] float32.
        w: [in, out], or where `turned` [out, in]; or float8 [out, in], with its scale [out] float32. With `layer`, each has
            a leading [layer] axis.
        bias: [out], or with `layer` [layer, out].
        layer: [] int32: which of a stack of layers. The kernel reads it where it lies, while a slice would be copied.
        sliced: of plain arrays with `layer`, that layer of (w, bias), from a scan over the stack: "xla" reads it in place of
            the stack, and a gradient goes to it. Where the kernel runs it is not used, and so never made.
        turned: whether plain w lies as float8 does, [out, in].
        activation: "gelu", the tanh form, or None.
        gate: [b, f, out]: what the outputs of the tokens of each frame are multiplied with, before they are added to
            `residual`. x is [b, t, in] then, with t / f tokens a frame.
        residual: [..., out] of `dtype`.
        quantise: whether to return float8; from float8, and not with a residual.
        reach: `types.reach(w, bias)`, [2] or with `layer` [layer, 2] float32. None: computed in this call, which reads all
            weights.
        dtype: of the output of a float8 layer, bfloat16 or float32, unless that is float8. None: bfloat16, and the dtype of
            plain x, which admits no other.
        implementation: "hopper" (compute capability 9.0; float8 or bfloat16) or "xla" (any backend): a named one runs or
            raises. None takes the first that can run the call.

    Returns:
        [..., out] of `dtype`, or Quantised.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason; where float8, or a named
            "hopper", is differentiated.
    """
    float8 = isinstance(x, Quantised)
    dtype = jnp.dtype(dtype or (jnp.bfloat16 if float8 else x.dtype))
    _check(x, w, bias, layer, sliced, turned, activation, gate, residual, quantise, reach, dtype)
    numbers, weights = (x.values, w.values) if float8 else (x, w)
    inputs, outputs = _sizes(weights, float8 or turned)
    tokens = None if gate is None else numbers.shape[1] // gate.shape[1]
    operands = jnp.promote_types(numbers.dtype, weights.dtype)
    can = explain(inputs, outputs, tokens, None if quantise else dtype, operands)
    choice = choose("linear", implementation, can)
    if float8 or implementation == "hopper":
        x, w, bias, sliced, gate, residual = _for_inference((x, w, bias, sliced, gate, residual))
    if float8:
        if quantise and reach is None:
            reach = types.reach(w, bias)
        run = IMPLEMENTATIONS[choice].run
        return run(x, w, bias, layer, activation=activation, gate=gate, residual=residual, reach=reach, dtype=dtype)
    run = _run if choice != "xla" and implementation is None else _plain
    return run(choice, activation, turned, x, w, bias, layer, sliced, gate, residual)


def explain(
    inputs: int, outputs: int, frame_tokens: int | None = None, dtype: Any = jnp.bfloat16, operands: Any = FLOAT8
) -> dict[str, str | None]:
    """Every implementation in the order of choice: why it cannot run such calls on this machine, or None if it can.

    Args:
        inputs, outputs: of the layer.
        frame_tokens: tokens of a frame, where there is a gate.
        dtype: of the output; None where it is quantised.
        operands: the dtype of x and w.
    """
    call = inputs, outputs, frame_tokens, dtype, operands
    return {name: choice.reason(*call) for name, choice in IMPLEMENTATIONS.items()}


def _plain(choice, activation, turned, x, w, bias, layer, sliced, gate, residual):
    run = IMPLEMENTATIONS[choice].plain
    return run(x, w, bias, layer, sliced, activation=activation, gate=gate, residual=residual, turned=turned)


_run = partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))(_plain)


@_run.defjvp
def _differentiated(choice, activation, turned, arrays, tangents):
    return jax.jvp(partial(_plain, "xla", activation, turned), arrays, tangents)


@jax.custom_jvp
def _for_inference(arrays):
    return arrays


@_for_inference.defjvp
def _no_gradient(arrays, tangents):
    raise NotImplementedError(
        "a linear layer on float8 numbers has no gradient, nor one with implementation='hopper': "
        "train with the full-precision weights, and leave the choice open"
    )


def _sizes(w: jax.Array, turned: bool) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    return w.shape[:-3:-1] if turned else w.shape[-2:]


def _check(x, w, bias, layer, sliced, turned, activation, gate, residual, quantise, reach, dtype) -> None:
    float8 = isinstance(x, Quantised)
    require(isinstance(w, Quantised) == float8, f"x and w must both be Quantised or neither, not {type(x)} and {type(w)}")
    if float8:
        _check_float8(x, w, quantise, reach, dtype, () if layer is None else w.values.shape[:1])
        x, w = x.values, w.values
    else:
        require(not quantise, "quantise=True goes with float8")
        require(dtype == x.dtype, f"dtype={dtype.name} goes with float8: of plain x it is {x.dtype}")
    require(not (float8 and (turned or sliced)), "turned and sliced go with plain arrays")
    require(sliced is None or layer is not None, "sliced goes with layer")
    stack, order = () if layer is None else w.shape[:1], "out, in" if float8 or turned else "in, out"
    require(
        w.ndim == 2 + (layer is not None),
        f"{w.shape=} must be {f'[{order}] without layer' if layer is None else f'[layer, {order}] with layer'}",
    )
    if layer is not None:
        require(jnp.ndim(layer) == 0, f"layer must be a scalar, received shape {jnp.shape(layer)}")
    inputs, out = _sizes(w, float8 or turned)
    require(x.size > 0 and x.shape[-1] == inputs, f"{x.shape=} must be [..., {inputs}], nothing empty")
    require(bias.shape == (*stack, out), f"{bias.shape=} must be {(*stack, out)}")
    if sliced is not None:
        shapes = tuple(array.shape for array in sliced)
        require(shapes == (w.shape[1:], (out,)), f"sliced must be of {w.shape[1:]} and {(out,)}, received {shapes}")
    require(activation in ACTIVATIONS, f"{activation=} must be one of {', '.join(map(repr, ACTIVATIONS))}")
    whole = (*x.shape[:-1], out)
    if residual is not None:
        require(residual.shape == whole, f"{residual.shape=} must be {whole}")
        require(residual.dtype == dtype, f"{residual.dtype=} must be {dtype=}")
        require(not quantise, "quantise=True goes without a residual")
        require(activation is None, f"{activation=} goes without a residual")
    if gate is not None:
        require(residual is not None, "gate goes with a residual")
        require(len(whole) == 3, f"{x.shape=} must be [b, t, in] where there is a gate")
        require(
            gate.ndim == 3 and gate.shape[::2] == (whole[0], out) and whole[1] % gate.shape[1] == 0,
            f"{gate.shape=} must be [{whole[0]}, f, {out}], f frames of equally many of the {whole[1]} tokens",
        )


def _check_float8(x, w, quantise, reach, dtype, stack) -> None:
    for name, rows in (("x", x), ("w", w)):
        require(rows.values.dtype == FLOAT8, f"{name}.values must be float8_e4m3fn, received {rows.values.dtype}")
        require(rows.scale.dtype == jnp.float32, f"{name}.scale must be float32, received {rows.scale.dtype}")
        shape = rows.values.shape[:-1]
        require(
            rows.scale.shape == shape, f"{name}.scale.shape={rows.scale.shape} must be {shape}, of the rows of {name}.values"
        )
    require(dtype in (jnp.bfloat16, jnp.float32), f"dtype={dtype.name} must be bfloat16 or float32")
    if reach is not None:
        require(quantise, "reach goes with quantise=True")
        require(
            reach.shape == (*stack, 2) and reach.dtype == jnp.float32,
            f"reach must be float32 {(*stack, 2)}, received {reach.dtype} {reach.shape}",
        )
