"""Tensors that are not in memory yet."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # whoever calls it must not write into what it returns


Tensors = dict[str, Tensor]
