"""LightX2V's float8 files: the linear layers of the blocks as e4m3 with one scale for every output row.

    X.weight        float8_e4m3fn [out, in]
    X.weight_scale  float32 (or bfloat16) [out, 1]: max |row| / 448, at least 1e-5 / 448

(LightX2V, tools/convert/quant/quant.py.) Conversion multiplies them out, in float32. Export quantises by the same rule:
the float8 numbers come back bit by bit, the scales too if the weights were kept in float32.
"""

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from convert.families import self_forcing, wan
from convert.families.wan import COMPONENT, rules
from convert.rules import ConversionError, Shape
from convert.tensors import Tensor, Tensors
from lf_jax.config import Model

__all__ = ["COMPONENT", "describe", "prepare", "restore", "rules"]

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST, SMALLEST_ROW = np.float32(448), np.float32(1e-5)
_QUANTISED = re.compile(r"blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])\.weight")


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Model:
    """As `convert.families.wan.describe`, of dequantised tensors."""
    return wan.describe(shapes, settings)


def prepare(tensors: Tensors) -> Tensors:
    """Every `X.weight` times its `X.weight_scale`, in float32; the rest as it is.

    Raises:
        NotImplementedError: for files in NVFP4.
        ConversionError: with all weights and scales that do not belong together.
    """
    if any(name.endswith(".weight_global_scale") for name in tensors):
        raise NotImplementedError("the file is in NVFP4 (it has weight_global_scale); only float8 e4m3 is read")
    plain, lone, misshaped = {}, [], []
    scales = {name.removesuffix("_scale"): name for name in tensors if name.endswith(".weight_scale")}
    for name, tensor in tensors.items():
        if name in scales:
            scale = tensors[scales[name]]
            if tensor.dtype != FLOAT8 or len(tensor.shape) != 2 or scale.shape != (tensor.shape[0], 1):
                misshaped.append(f"{name} {tensor.dtype} {list(tensor.shape)}, scale {list(scale.shape)}")
            plain[name] = _dequantised(tensor, scale)
        elif tensor.dtype == FLOAT8:
            lone.append(f"{name} has no weight_scale")
        elif name.endswith(".weight_scale"):
            if name.removesuffix("_scale") not in tensors:
                lone.append(f"{name} has no weight")
        else:
            plain[name] = tensor
    faults = {"without its partner": lone, "no float8 e4m3 [out, in] with a scale [out, 1]": misshaped}
    if any(faults.values()):
        raise ConversionError("float8 weights and scales that do not belong together:", faults)
    return plain


def restore(tensors: Tensors) -> Tensors:
    """The linear layers of the blocks as float8 and scale, and the prefix that the files have."""
    quantised: Tensors = {}
    for name, tensor in tensors.items():
        quantised[name] = tensor
        if _QUANTISED.fullmatch(name):
            out = tensor.shape[0]
            quantised[name] = Tensor(tensor.shape, FLOAT8, lambda t=tensor: quantise(t.read())[0])
            quantised[f"{name}_scale"] = Tensor((out, 1), np.dtype(np.float32), lambda t=tensor: quantise(t.read())[1])
    return self_forcing.restore(quantised)


def _dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    def read() -> np.ndarray:
        return weight.read().astype(np.float32) * scale.read().astype(np.float32)

    return Tensor(weight.shape, np.dtype(np.float32), read)


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [out, in] as float8 [out, in] and float32 scales [out, 1].

    For rows that are themselves products of float8 numbers and a scale, the quotient by 448 may miss that scale by a
    rounding. So its neighbours are tried as well, and the one that gives the row back exactly is taken.
    """
    weight = weight.astype(np.float32)
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True), SMALLEST_ROW) / LARGEST
    number = (weight / scale).astype(FLOAT8)
    for near in (np.nextafter(scale, np.float32(0)), np.nextafter(scale, np.float32(1))):
        missed = (number.astype(np.float32) * scale != weight).any(axis=1)
        exact = missed.copy()
        exact[missed] = (number[missed].astype(np.float32) * near[missed] == weight[missed]).all(axis=1)
        scale[exact] = near[exact]
    return number, scale
