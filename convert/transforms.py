"""How one tensor changes between a PyTorch checkpoint and our layout: numpy functions in pairs, each the other's inverse.

Both functions must be made of views (transpose, reshape, squeeze): they run on memory-mapped tensors of gigabytes, and
on shapes without memory when a conversion is planned.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """`forward`: one tensor of the source (of one layer) to our layout; `inverse`: back, exactly."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def transpose(*axes: int) -> Transform:
    """`axes[i]` is the source axis that becomes our axis `i`."""
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(back))


def ones(before: int = 0, after: int = 0) -> Transform:
    """Axes of length 1 in the source, `before` and `after` ours: [1, 6, d] is `ones(1)`, [c, 1, 1, 1] `ones(after=3)`."""

    def forward(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[before : x.ndim - after])

    def inverse(x: np.ndarray) -> np.ndarray:
        return x.reshape((1,) * before + x.shape + (1,) * after)

    return Transform(forward, inverse)


def chain(first: Transform, *others: Transform) -> Transform:
    """One after the other, `first` next to the source."""
    for then in others:
        first = _pair(first, then)
    return first


def _pair(first: Transform, then: Transform) -> Transform:
    return Transform(lambda x: then.forward(first.forward(x)), lambda x: first.inverse(then.inverse(x)))


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = transpose(1, 0)  # [out, in] -> [in, out]
CONV2D = transpose(2, 3, 1, 0)  # [out, in, kh, kw] -> [kh, kw, in, out]
CONV3D = transpose(2, 3, 4, 1, 0)  # [out, in, kt, kh, kw] -> [kt, kh, kw, in, out]
POINTWISE2D = chain(ones(after=2), LINEAR)  # a 1 x 1 convolution as a linear layer: [out, in, 1, 1] -> [in, out]
POINTWISE3D = chain(ones(after=3), LINEAR)  # [out, in, 1, 1, 1] -> [in, out]


def PATCH(patch: tuple[int, int, int]) -> Transform:
    """A convolution whose stride is its kernel, as a linear layer on flattened patches.

    [out, c, pt, ph, pw] -> [pt * ph * pw * c, out]: row `((t * ph + h) * pw + w) * c + channel`, channel innermost.
    """

    def forward(x: np.ndarray) -> np.ndarray:
        return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])

    def inverse(x: np.ndarray) -> np.ndarray:
        return x.reshape(*patch, -1, x.shape[-1]).transpose(4, 3, 0, 1, 2)

    return Transform(forward, inverse)
