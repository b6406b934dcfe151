"""LightX2V's float8 files: the linear layers of the blocks as e4m3 with one scale for every output row.

    X.weight        float8_e4m3fn [out, in]
    X.weight_scale  float32 (or bfloat16) [out, 1]: max |row| / 448, at least 1e-5 / 448

(LightX2V, tools/convert/quant/quant.py.) They stay as they are, both ways: a transformer with `linears="fp8"`. Export of
one with full weights quantises by the same rule.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.families import self_forcing, wan
from convert.families.wan import COMPONENT
from convert.rules import ConversionError, Rule, Shape
from convert.tensors import Tensor, Tensors
from convert.transforms import ones
from lf_jax.config import Model
from pallas_kernels.linear import Quantised, reach

__all__ = ["COMPONENT", "FORMS", "describe", "prepare", "restore", "rules"]

FORMS = ("full", "fp8")  # of a model's linear layers, that the table knows
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST, SMALLEST_ROW = np.float32(448), np.float32(1e-5)
_QUANTISED = re.compile(r"blocks\.\d+\.(?:self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])\.weight")
_ONWARD = re.compile(r"(blocks\.\d+\.ffn\.0)\.weight")  # its output goes, quantised, into the next layer


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Model:
    """As `convert.families.wan.describe`."""
    return wan.describe(shapes, settings)


def rules(part: Model) -> tuple[Rule, ...]:
    if part.linears == "full":
        return wan.rules(part)
    quantised = [
        rule
        for source, target, _ in wan.LINEARS
        for rule in (
            Rule(f"{source}.weight", f"{target}.values"),
            Rule(f"{source}.weight_scale", f"{target}.scale", ones(after=1)),
            Rule(f"{source}.bias", f"{target}.bias"),
        )
    ]
    return (*wan.rest(part), *quantised, Rule("blocks.{layer}.ffn.0.reach", "blocks.ffn.up.reach"))


def prepare(tensors: Tensors) -> Tensors:
    """The tensors as they are, and beside the weights whose output is quantised what bounds it: `X.reach`.

    Raises:
        NotImplementedError: for files in NVFP4.
        ConversionError: with all weights and scales that do not belong together.
    """
    if any(name.endswith(".weight_global_scale") for name in tensors):
        raise NotImplementedError("the file is in NVFP4 (it has weight_global_scale); only float8 e4m3 is read")
    lone, misshaped, bounds = [], [], {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if name.endswith(".weight_scale") and name.removesuffix("_scale") not in tensors:
            lone.append(f"{name} has no weight")
        elif tensor.dtype == FLOAT8 and scale is None:
            lone.append(f"{name} has no weight_scale")
        elif scale is not None and (tensor.dtype != FLOAT8 or len(tensor.shape) != 2 or scale.shape != (tensor.shape[0], 1)):
            misshaped.append(f"{name} {tensor.dtype} {list(tensor.shape)}, scale {list(scale.shape)}")
        elif (onward := _ONWARD.fullmatch(name)) and scale is not None and f"{onward[1]}.bias" in tensors:
            bounds[f"{onward[1]}.reach"] = _reach(tensor, scale, tensors[f"{onward[1]}.bias"])
    faults = {"without its partner": lone, "no float8 e4m3 [out, in] with a scale [out, 1]": misshaped}
    if any(faults.values()):
        raise ConversionError("float8 weights and scales that do not belong together:", faults)
    return tensors | bounds


def restore(tensors: Tensors) -> Tensors:
    """The linear layers of the blocks as float8 and scale, and the prefix that the files have."""
    quantised: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".reach"):
            continue
        quantised[name] = tensor
        if _QUANTISED.fullmatch(name) and tensor.dtype != FLOAT8:
            out = tensor.shape[0]
            quantised[name] = Tensor(tensor.shape, FLOAT8, lambda t=tensor: quantise(t.read())[0])
            quantised[f"{name}_scale"] = Tensor((out, 1), np.dtype(np.float32), lambda t=tensor: quantise(t.read())[1])
    return self_forcing.restore(quantised)


def _reach(weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    def read() -> np.ndarray:
        rows = Quantised(jnp.asarray(weight.read()), jnp.asarray(scale.read()[:, 0].astype(np.float32)))
        return np.asarray(reach(rows, jnp.asarray(bias.read())))

    return Tensor((2,), np.dtype(np.float32), read)


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
