"""Low-rank adapters on the linear layers of the transformer blocks: W + (alpha / rank) A B in our layout, [in, out].

Adapted are q, k, v and o of both attentions and the two layers of the feed-forward (LongLive 1.0, utils/lora_utils.py).
Files carry peft's names and layout, as LongLive's do and as `lf-jax convert longlive` reads them.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.arrays import Array, Key
from lf_jax.checkpoint import build, flatten, tensorfile
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import check
from lf_jax.train.config import Lora

_LAYER = re.compile(r"(?:.*\.)?blocks\.((?:self_attention|cross_attention)\.[qkvo]|ffn\.(?:up|down))")
_KERNEL, _JOINED, _PARTS = ".kernel", "self_attention.qkv", "qkv"
_THEIRS = {"self_attention": "self_attn", "cross_attention": "cross_attn", "up": "0", "down": "2"}  # words of Wan's names


def adapted(network: Any) -> list[str]:
    """The dotted names of the linear layers that get adapters; of q, k and v also where they are joined in one kernel.

    Raises:
        ValueError: if there are none.
    """
    return list(_kernels(network))


def create(network: Any, settings: Lora, key: Key[Array, ""]) -> dict[str, Array]:
    """Adapters that change nothing yet: `NAME.a` [layer, in, rank], as peft draws it; `NAME.b` [layer, rank, out], zero."""
    adapters = {}
    for index, (name, (_, _, shape)) in enumerate(_kernels(network).items()):
        layers, inputs, outputs = shape
        limit = 1 / math.sqrt(inputs)
        draw = jax.random.uniform(jax.random.fold_in(key, index), (layers, inputs, settings.rank), jnp.float32, -limit, limit)
        adapters |= {f"{name}.a": draw, f"{name}.b": jnp.zeros((layers, settings.rank, outputs), jnp.float32)}
    return adapters


def merge(network: Any, adapters: Mapping[str, Array], settings: Lora) -> Any:
    """`network` with the adapters added; the adapted kernels become float32."""
    arrays = flatten(network)
    for name, (kernel, part, _) in _kernels(network).items():
        update = settings.scale * (adapters[f"{name}.a"] @ adapters[f"{name}.b"])
        whole = arrays[kernel].astype(jnp.float32)
        arrays[kernel] = whole + update if part is None else whole.at[:, part].add(update.swapaxes(1, 2))
    return build(network, arrays)


def _kernels(network: Any) -> dict[str, tuple[str, int | None, tuple[int, int, int]]]:
    """Of every adapted layer the kernel that holds it, its part of a joined one [layer, part, out, in], and its own shape."""
    found, names = {}, []
    for kernel, array in flatten(network).items():
        if not kernel.endswith(_KERNEL):
            continue
        name = kernel.removesuffix(_KERNEL)
        names.append(name)
        if name.endswith(_JOINED):
            layers, _, outputs, inputs = array.shape
            front = name.removesuffix(_PARTS)
            found |= {front + letter: (kernel, part, (layers, inputs, outputs)) for part, letter in enumerate(_PARTS)}
        elif _LAYER.fullmatch(name):
            found[name] = (kernel, None, array.shape)
    check(bool(found), f"lora needs the blocks of a diffusion transformer; the network has only {', '.join(names)}")
    return found


def save(path: str | os.PathLike, adapters: Mapping[str, Array], settings: Lora) -> None:
    """Writes adapters as one safetensors file: `base_model.model.blocks.0.self_attn.q.lora_A.weight` [rank, in], `lora_B`
    [out, rank], and `alpha` [] where it is not the rank."""
    tensors = {}
    for name, factor in adapters.items():
        name, _, letter = name.rpartition(".")
        layer = ".".join(_THEIRS.get(word, word) for word in _LAYER.fullmatch(name)[1].split("."))
        for index, one in enumerate(np.asarray(factor)):
            front = f"base_model.model.blocks.{index}.{layer}"
            tensors[f"{front}.lora_{letter.upper()}.weight"] = one.T
            if settings.scale != 1:
                tensors[f"{front}.alpha"] = np.float32(settings.alpha)
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with replaced_file(path) as partial:
        tensorfile.write(partial, layout, lambda name: [tensors[name]], {"format": "pt", "rank": str(settings.rank)})
