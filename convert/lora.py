"""Low-rank updates merged into the weights they belong to: W + (alpha / rank) B A.

LongLive is a base checkpoint and a LoRA of rank 256 with alpha 256 (LongLive 1.0, configs/longlive_inference.yaml), saved
by peft as `base_model.model.blocks.0.self_attn.q.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank]. Other
tools write `lora_down` and `lora_up`, and underscores for the dots (kohya); all of these are read.
"""

import re
from collections.abc import Iterable

import numpy as np

from convert.rules import ConversionError
from convert.tensors import Tensor, Tensors

_NAME = re.compile(
    r"(?:base_model\.model\.|lora_unet_|lora_transformer_|transformer\.|diffusion_model\.|model\.)*"
    r"(?P<layer>.+?)\.(?:(?P<factor>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
_A, _B = ("lora_A", "lora_down"), ("lora_B", "lora_up")


def is_lora(names: Iterable[str]) -> bool:
    """Whether a checkpoint is nothing but low-rank updates."""
    return all(_NAME.fullmatch(name) for name in names)


def merge(tensors: Tensors, updates: Tensors, scale: float = 1.0) -> Tensors:
    """`tensors` with every update added to its weight, in float32, when it is read.

    Args:
        tensors: of a base checkpoint, `X.weight` [out, in] for a layer X.
        updates: A [rank, in], B [out, rank] and perhaps alpha [] for each of some layers. Without alpha it is the rank.
        scale: multiplies all updates.

    Raises:
        ConversionError: with all updates that are no LoRA, have no layer, lack a factor or have the wrong shape.
    """
    weights = {_plain(name.removesuffix(".weight")): name for name in tensors if name.endswith(".weight")}
    found: dict[str, dict[str, Tensor]] = {}
    unknown, doubled, lone, misshaped, coarse = [], [], [], [], []
    for name, tensor in updates.items():
        match = _NAME.fullmatch(name)
        weight = weights.get(_plain(match["layer"])) if match else None
        if weight is None:
            unknown.append(f"{name} {list(tensor.shape)}")
            continue
        role = "alpha" if match["alpha"] else "A" if match["factor"] in _A else "B"
        if role in found.setdefault(weight, {}):
            doubled.append(f"{name}: a second {role} for {weight}")
        found[weight][role] = tensor
    merged = dict(tensors)
    for weight, roles in found.items():
        if missing := [role for role in ("A", "B") if role not in roles]:
            lone.append(f"{weight}: no {' and no '.join(missing)}")
            continue
        base, a, b = tensors[weight], roles["A"], roles["B"]
        if base.dtype.itemsize == 1:
            coarse.append(f"{weight} {base.dtype}")
        if len(a.shape) != 2 or b.shape != (base.shape[0], a.shape[0]) or base.shape[1:] != a.shape[1:]:
            misshaped.append(f"{weight} {list(base.shape)}: A {list(a.shape)}, B {list(b.shape)}")
            continue
        merged[weight] = _merged(base, a, b, roles.get("alpha"), scale)
    faults = {"unknown or without a layer": unknown, "doubled": doubled, "incomplete": lone, "wrong shape": misshaped}
    faults["too coarse to add to, convert the full weights instead"] = coarse
    if any(faults.values()):
        raise ConversionError("the LoRA does not fit the model:", faults)
    return merged


def _plain(layer: str) -> str:
    return layer.replace(".", "_")


def _merged(base: Tensor, a: Tensor, b: Tensor, alpha: Tensor | None, scale: float) -> Tensor:
    def read() -> np.ndarray:
        rank = a.shape[0]
        factor = scale * (float(alpha.read().astype(np.float32).item()) / rank if alpha else 1.0)
        update = b.read().astype(np.float32) @ a.read().astype(np.float32)
        update *= np.float32(factor)
        update += base.read().astype(np.float32)
        return update.astype(base.dtype)

    return Tensor(base.shape, base.dtype, read)
