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
_KERNEL = ".kernel"
_THEIRS = {"self_attention": "self_attn", "cross_attention": "cross_attn", "up": "0", "down": "2"}  # words of Wan's names


def adapted(network: Any) -> list[str]:
    """The dotted names of the linear layers that get adapters, without `.kernel`.

    Raises:
        ValueError: if there are none.
    """
    names = [name.removesuffix(_KERNEL) for name in flatten(network) if name.endswith(_KERNEL)]
    found = [name for name in names if _LAYER.fullmatch(name)]
    check(bool(found), f"lora needs the blocks of a diffusion transformer; the network has only {', '.join(names)}")
    return found


def create(network: Any, settings: Lora, key: Key[Array, ""]) -> dict[str, Array]:
    """Adapters that change nothing yet: `NAME.a` [layer, in, rank], as peft draws it; `NAME.b` [layer, rank, out], zero."""
    kernels, adapters = flatten(network), {}
    for index, name in enumerate(adapted(network)):
        layers, inputs, outputs = kernels[name + _KERNEL].shape
        limit = 1 / math.sqrt(inputs)
        draw = jax.random.uniform(jax.random.fold_in(key, index), (layers, inputs, settings.rank), jnp.float32, -limit, limit)
        adapters |= {f"{name}.a": draw, f"{name}.b": jnp.zeros((layers, settings.rank, outputs), jnp.float32)}
    return adapters


def merge(network: Any, adapters: Mapping[str, Array], settings: Lora) -> Any:
    """`network` with the adapters added; the adapted kernels become float32."""
    arrays = flatten(network)
    for name in (name.removesuffix(".a") for name in adapters if name.endswith(".a")):
        update = settings.scale * (adapters[f"{name}.a"] @ adapters[f"{name}.b"])
        arrays[name + _KERNEL] = arrays[name + _KERNEL].astype(jnp.float32) + update
    return build(network, arrays)


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
