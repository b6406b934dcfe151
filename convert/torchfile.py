"""Files of torch, read without executing pickles and without loading what is not asked for. The only import of torch."""

import pathlib
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from convert.tensors import Tensor, Tensors
from lf_jax.config import check

# Dtypes that numpy does not have cross as integers of the same width, bit by bit.
_CARRIERS = {
    "bfloat16": (np.dtype(np.int16), np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e5m2)),
}


def read(path: pathlib.Path, branches: Sequence[str]) -> tuple[Tensors, str | None]:
    """The tensors of a dictionary, or of the first of `branches` in a dictionary of dictionaries, and which one it was.

    Raises:
        ValueError: if torch is absent, the file is truncated, holds more than tensors, or has none of `branches`.
    """
    torch = _torch(path)
    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint, or holds more than tensors, which is never executed here: {error}"
        ) from error
    except Exception as error:  # what the reader of old files stumbles over first in any other file could be anything
        raise ValueError(f"{path} is truncated or no checkpoint of torch: {type(error).__name__}: {error}") from error
    check(isinstance(loaded, dict), f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    inside = [name for name, value in loaded.items() if isinstance(value, dict)]
    branch = next((name for name in branches if name in inside), None)
    check(
        branch is not None or not inside,
        f"{path} has no {' or '.join(branches)}, only {', '.join(map(str, loaded))}"
        + ("; the averaged weights are taken when asked for (ema)" if "generator_ema" in inside else ""),
    )
    found = loaded if branch is None else loaded[branch]
    others = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    check(not others, f"{path} holds values that are no tensors: {', '.join(others[:12])}")
    check(bool(found), f"{path} holds no tensors")
    return {name: _lazy(torch, tensor.detach()) for name, tensor in found.items()}, branch


def write(path: pathlib.Path, tensors: Tensors, branch: str | None) -> None:
    """Writes a state dict, inside a dictionary under `branch` if there is one. All tensors are in memory at once."""
    torch = _torch(path)
    found = {name: _to_torch(torch, tensor.read()) for name, tensor in tensors.items()}
    torch.save(found if branch is None else {branch: found}, path)


def _torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path} is a file of torch, which is not installed: pip install 'lf-jax[convert]'") from error
    return torch


def _lazy(torch: Any, tensor: Any) -> Tensor:
    name = str(tensor.dtype).removeprefix("torch.")
    if name in _CARRIERS:
        carrier, dtype = _CARRIERS[name]
        carried = getattr(torch, carrier.name)
        return Tensor(tuple(tensor.shape), dtype, lambda: tensor.view(carried).numpy().view(dtype))
    return Tensor(tuple(tensor.shape), torch.empty(0, dtype=tensor.dtype).numpy().dtype, tensor.numpy)


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.array(array, order="C")  # torch cannot share read-only memory
    if array.dtype.name in _CARRIERS:
        return torch.from_numpy(array.view(_CARRIERS[array.dtype.name][0])).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
