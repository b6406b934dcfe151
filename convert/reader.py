"""Checkpoints as dictionaries of tensors that are read when they are needed."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from convert import torchfile
from convert.rules import ConversionError
from convert.tensors import Tensor, Tensors
from lf_jax.checkpoint.tensorfile import TensorFile
from lf_jax.config import check

SAFETENSORS, TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".safetensors.index.json"

# What training wrappers put into names: FSDP, activation checkpointing, torch.compile anywhere; a module's own name and
# data parallelism in front.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_FRONT = re.compile(r"^(?:(?:module|model|generator|diffusion_model)\.)+")


class Source(NamedTuple):
    """An opened checkpoint."""

    path: pathlib.Path  # of the file, or of the index
    tensors: Tensors  # by name, as stored
    branch: str | None  # the sub-dictionary that was taken, e.g. "generator"; None where there are none
    settings: Mapping[str, Any]  # the config.json beside the checkpoint; empty without one


def open_source(path: pathlib.Path, branches: Sequence[str]) -> Source:
    """Reads the names, shapes and dtypes of a checkpoint.

    Args:
        path: a safetensors file; an index of several (`*.safetensors.index.json`); a file of torch; or a folder that
            holds exactly one of these.
        branches: where a file of torch holds dictionaries in a dictionary, which one to take, by preference.

    Raises:
        ValueError: if there is no such file, it is truncated or no checkpoint, holds more than tensors, or has none of
            `branches`.
    """
    path = _file(path)
    beside = path.with_name("config.json")
    settings = json.loads(beside.read_text()) if beside.is_file() else {}
    settings = settings if isinstance(settings, dict) and "component" not in settings else {}
    if path.name.endswith(INDEX):
        return Source(path, _sharded(path), None, settings)
    if path.suffix in SAFETENSORS:
        return Source(path, _safetensors(path), None, settings)
    check(path.suffix in TORCH, f"{path} is none of {', '.join((*SAFETENSORS, INDEX, *TORCH))}")
    tensors, branch = torchfile.read(path, branches)
    return Source(path, tensors, branch, settings)


def unwrapped(tensors: Tensors) -> Tensors:
    """The same tensors without the prefixes that training wrappers and enclosing modules give their names.

    Raises:
        ConversionError: if two tensors get the same name; lists all of them.
    """
    names: dict[str, list[str]] = {}
    for name in tensors:
        names.setdefault(_FRONT.sub("", _WRAPPERS.sub("", name)), []).append(name)
    doubled = [f"{plain}: {', '.join(found)}" for plain, found in names.items() if len(found) > 1]
    if doubled:
        raise ConversionError("names that are the same without their prefixes:", {"doubled names": doubled})
    return {plain: tensors[found[0]] for plain, found in names.items()}


def _file(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        check(path.is_file(), f"no such file or folder: {path}")
        return path
    for endings in ((INDEX,), SAFETENSORS, TORCH):
        found = sorted(p for p in path.iterdir() if p.name.endswith(endings))
        check(len(found) < 2, f"{path} holds several checkpoints: {', '.join(p.name for p in found)}; name one")
        if found:
            return found[0]
    raise ValueError(f"{path} holds no checkpoint (a file ending in {', '.join((*SAFETENSORS, *TORCH))})")


def _safetensors(path: pathlib.Path) -> Tensors:
    file = TensorFile(path)
    return {name: Tensor(e.shape, e.dtype, lambda name=name: file.view(name)) for name, e in file.entries.items()}


def _sharded(index: pathlib.Path) -> Tensors:
    try:
        where = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of safetensors files") from error
    absent = sorted(name for name in set(where.values()) if not (index.parent / name).is_file())
    check(not absent, f"{index} names files that are not there: {', '.join(absent)}")
    files = {name: _safetensors(index.parent / name) for name in sorted(set(where.values()))}
    lost = [f"{name} (in {file})" for name, file in where.items() if name not in files[file]]
    if lost:
        raise ConversionError(f"{index} does not match its files:", {"tensors that are not where it says": lost})
    return {name: files[file][name] for name, file in where.items()}
