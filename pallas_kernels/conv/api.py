"""The public call: checks its arguments, picks an implementation, runs it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from pallas_kernels.choice import choose, require
from pallas_kernels.conv import hopper, xla
from pallas_kernels.conv.types import SIDE, Form

PAST = 2  # frames that a kernel over time sees before each frame


class Implementation(NamedTuple):
    reason: Callable[..., str | None]  # (x, kernel, form) -> why it cannot run that here; None if it can
    slow: Callable[..., str | None]  # the same -> why another should be taken; None if none should
    run: Callable[..., jax.Array]  # (x, kernel, bias, past, residual, scale, form, eps) -> y


# In order of preference.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "hopper": Implementation(hopper.reason, hopper.slow, hopper.conv),
    "xla": Implementation(lambda *call: None, lambda *call: None, xla.conv),
}


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    past: jax.Array | None = None,
    residual: jax.Array | None = None,
    scale: jax.Array | None = None,
    eps: float | None = None,
    upsample: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """A convolution over rows and columns of a video, with zeros around the image, and over time if `past` is given.

    y = conv(x) + bias + residual, and with `scale` y = silu(y / rms(y) * scale), rms over the channels of a pixel.

    Args:
        x: [b, f, h, w, c].
        kernel: [3, side, side, c, out] with `past`, otherwise [1, side, side, c, out]; `side` is 1 or 3.
        bias: [out].
        past: [b, 2, h, w, c], the frames before `x`: a frame sees itself and the two before it.
        residual: as the output, added to it.
        scale: [out], of the norm; None: no norm and no SiLU.
        eps: added to the mean square; goes with `scale`.
        upsample: first doubles rows and columns, by repeating them; goes without `past`, and with a side of 3.
        implementation: "hopper" (compute capability 9.0, bfloat16) or "xla" (any backend): a named one runs or raises. None
            takes the first that can run the call and is not slow at it; under differentiation "xla", as the other has no
            gradients.

    Returns:
        [b, f, h, w, out] in the dtype of `x`; [b, f, 2 h, 2 w, out] with `upsample`. Products are summed in float32.

    Raises:
        ValueError: for arguments that do not fit together, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run this call, with the reason.
    """
    _check(x, kernel, bias, past, residual, scale, eps, upsample)
    form, arrays = Form(upsample, scale is not None), (x, kernel, bias, past, residual, scale)
    if implementation is None:
        can = explain(x, kernel, upsample=upsample, norm=form.norm)
        return _run(choose("convolution", None, can), form, eps, *arrays)
    can = {name: choice.reason(x, kernel, form) for name, choice in IMPLEMENTATIONS.items()}
    return IMPLEMENTATIONS[choose("convolution", implementation, can)].run(*arrays, form, eps)


def explain(x: Any, kernel: Any, *, upsample: bool = False, norm: bool = False) -> dict[str, str | None]:
    """Every implementation in the order of choice: why it is not chosen for such a call on this machine, or None.

    Args:
        x, kernel: as in `convolve`; their shapes and the dtype of `x` are read.
        norm: whether there is a `scale`.
    """
    form = Form(upsample, norm)
    return {name: choice.reason(x, kernel, form) or choice.slow(x, kernel, form) for name, choice in IMPLEMENTATIONS.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(name: str, form: Form, eps: float | None, *arrays: jax.Array | None) -> jax.Array:
    return IMPLEMENTATIONS[name].run(*arrays, form, eps)


def _forward(name: str, form: Form, eps: float | None, *arrays: jax.Array | None) -> tuple[jax.Array, Callable]:
    return jax.vjp(lambda *arrays: xla.conv(*arrays, form, eps), *arrays)


def _backward(name: str, form: Form, eps: float | None, pull: Callable, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    return pull(gradient)


_run.defvjp(_forward, _backward)


def _check(x, kernel, bias, past, residual, scale, eps, upsample) -> None:
    require(x.ndim == 5, f"{x.shape=} must be [b, f, h, w, c]")
    b, f, h, w, c = x.shape
    taps, sides = 1 if past is None else PAST + 1, (SIDE,) if upsample else (1, SIDE)
    fits = kernel.ndim == 5 and kernel.shape[:4] in [(taps, side, side, c) for side in sides]
    require(fits, f"{kernel.shape=} must be [{taps}, side, side, {c}, out] with a side of {' or '.join(map(str, sides))}")
    out = kernel.shape[-1]
    image = (b, f, 2 * h, 2 * w, out) if upsample else (b, f, h, w, out)
    fitting = {
        "bias": (bias, (out,)),
        "scale": (scale, (out,)),
        "residual": (residual, image),
        "past": (past, (b, PAST, h, w, c)),
    }
    for name, (array, expected) in fitting.items():
        require(array is None or array.shape == expected, f"{name} must be {expected}, received {getattr(array, 'shape', '')}")
    require((scale is None) == (eps is None), "scale and eps go together")
    require(past is None or not upsample, "upsample goes without a past")
