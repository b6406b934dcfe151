"""The state of a rollout in one file, to resume or fork it later, in another process or on another machine."""

import dataclasses
import importlib
import json
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lf_jax.checkpoint import tensorfile
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import check

STATE_FORMAT = "1"


def save_state(path: str | os.PathLike, state: Any) -> None:
    """Writes a pytree of dataclasses, dicts, lists, tuples, numbers, strings, None, arrays and typed PRNG keys.

    One safetensors file, whole or not at all: arrays by their dotted path, and the structure as JSON in the metadata.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = json.dumps(_encode(state, "state", arrays))
    layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with replaced_file(path) as partial:
        metadata = {"format": STATE_FORMAT, "structure": structure}
        tensorfile.write(partial, layout, lambda name: [arrays[name]], metadata)


def load_state(path: str | os.PathLike, classes: Iterable[type] = ()) -> Any:
    """What `save_state` wrote, bit by bit, on the default device.

    Args:
        classes: dataclasses from outside lf_jax that the state may hold. Nothing else is imported or called, so a
            state file cannot run code.

    Raises:
        ValueError: if the file is missing, truncated, no state, of another format, or holds a class not allowed.
    """
    file = tensorfile.TensorFile(path)
    version = file.metadata.get("format") if "structure" in file.metadata else None
    check(version is not None, f"{path} holds tensors but no rollout state")
    check(version == STATE_FORMAT, f"{path} is a state of format {version}, this version reads {STATE_FORMAT}")
    known = {_name(kind): kind for kind in classes}
    return _decode(json.loads(file.metadata["structure"]), file, known)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name), f"{path}.{f.name}", arrays) for f in dataclasses.fields(value)}
        return {"dataclass": _name(type(value)), "fields": fields}
    if isinstance(value, dict):
        check(all(isinstance(key, str) for key in value), f"{path} has keys that are not strings")
        return {"dict": {key: _encode(item, f"{path}.{key}", arrays) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, f"{path}.{i}", arrays) for i, item in enumerate(value)]}
    check(isinstance(value, jax.Array | np.ndarray), f"{path} is a {type(value).__name__}, which cannot be saved")
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        arrays[path] = np.asarray(jax.random.key_data(value))
        return {"key": path, "impl": str(jax.random.key_impl(value))}
    arrays[path] = np.asarray(value)
    return {"array": path}


def _decode(node: dict[str, Any], file: tensorfile.TensorFile, known: dict[str, type]) -> Any:
    if "plain" in node:
        return node["plain"]
    if "array" in node:
        return jnp.asarray(file.read(node["array"]))
    if "key" in node:
        return jax.random.wrap_key_data(jnp.asarray(file.read(node["key"])), impl=node["impl"])
    if "dict" in node:
        return {key: _decode(item, file, known) for key, item in node["dict"].items()}
    if "dataclass" in node:
        kind = _class(node["dataclass"], known)
        return kind(**{name: _decode(item, file, known) for name, item in node["fields"].items()})
    kind, items = next((kind, node[kind.__name__]) for kind in (list, tuple) if kind.__name__ in node)
    return kind(_decode(item, file, known) for item in items)


def _class(name: str, known: dict[str, type]) -> type:
    if name in known:
        return known[name]
    module, _, qualname = name.partition(":")
    check(module.split(".")[0] == "lf_jax", f"the state holds a {name}: pass that class in `classes`")
    kind = getattr(importlib.import_module(module), qualname, None)
    check(isinstance(kind, type) and dataclasses.is_dataclass(kind), f"the state holds a {name}, which lf_jax does not have")
    return kind
