"""A converted component back into the PyTorch layout: the tables read from right to left."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import torchfile
from convert.families import FAMILIES
from convert.rules import Piece, pieces_of
from convert.tensors import Tensor, Tensors
from convert.writer import Progress, check_room
from lf_jax import checkpoint
from lf_jax.checkpoint import tensorfile
from lf_jax.checkpoint.component import Part as PartConfig
from lf_jax.checkpoint.component import stored
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import check


def export(
    folder: str | os.PathLike,
    component: str,
    family: str,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Writes a component of a converted folder as the file that `family` names its tensors in.

    Args:
        component: "dit", "vae" or "text".
        target: a file ending in .safetensors, written tensor by tensor, or in .pt or .pth, which needs torch and the
            memory for all tensors at once.
        dtype: of every tensor; None, or "keep", keeps what the folder has.
        overwrite: replace a file that is there.
        progress: called with the tensor written, the bytes done and the bytes in all.

    Raises:
        ValueError: if the folder has no such component, the family has none, the component does not fit the family, or
            `target` is there already or cannot be written.
    """
    target = pathlib.Path(target)
    check(family in FAMILIES, f"{family=} is none of {', '.join(FAMILIES)}")
    check(dtype in (None, "keep", "bfloat16", "float32", "float16"), f"{dtype=} must be keep, bfloat16, float32 or float16")
    check(target.suffix in (".safetensors", ".pt", ".pth"), f"{target} must end in .safetensors, .pt or .pth")
    check(overwrite or not target.exists(), f"{target} is there already; overwrite=True (--overwrite) replaces it")
    tables = [part.module for part in FAMILIES[family].parts]
    table = next((table for table in tables if table.COMPONENT == component), None)
    check(table is not None, f"{family} has no {component}, only {', '.join(table.COMPONENT for table in tables)}")
    _, tensors = as_source(folder, component, table)
    if dtype not in (None, "keep"):
        tensors = {name: _cast(tensor, jnp.dtype(dtype)) for name, tensor in tensors.items()}
    tensors = getattr(table, "restore", lambda same: same)(tensors)
    with replaced_file(target) as partial:
        if target.suffix == ".safetensors":
            _write(partial, tensors, progress)
        else:
            torchfile.write(partial, tensors, getattr(table, "BRANCH", None))
    return target


def as_source(folder: str | os.PathLike, component: str, table: Any) -> tuple[PartConfig, Tensors]:
    """The config of a converted component, and its tensors by the names and in the layout of `table`.

    Quantised layers are multiplied out, in float32, for a table that does not know them.
    """
    config, arrays = checkpoint.load_part(folder, component), stored(folder, component)
    if getattr(config, "linears", "full") not in getattr(table, "FORMS", ("full",)):
        config = dataclasses.replace(config, linears="full")
    pieces = pieces_of(table.rules(config), checkpoint.shapes(config))
    return config, {piece.source: _tensor(piece, arrays) for piece in pieces}


def _tensor(piece: Piece, arrays: Mapping[str, np.ndarray]) -> Tensor:
    if piece.target in arrays:
        array = arrays[piece.target]
        return Tensor(piece.shape, array.dtype, lambda: piece.transform.inverse(array[piece.index]))
    layer = piece.target.removesuffix(".kernel")
    values, scale = arrays[f"{layer}.values"], arrays[f"{layer}.scale"]

    def read() -> np.ndarray:
        rows = values[piece.index].astype(np.float32) * scale[piece.index][:, None]
        return piece.transform.inverse(rows if len(piece.index) == 2 else rows.T)  # parts of a joined layer are [out, in]

    return Tensor(piece.shape, np.dtype(np.float32), read)


def _cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    return Tensor(tensor.shape, dtype, lambda: tensor.read().astype(dtype))


def _write(path: pathlib.Path, tensors: Tensors, progress: Progress | None) -> None:
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in layout.items()}
    total, done = sum(sizes.values()), 0
    check_room(path.parent, total)

    def parts(name: str) -> list[np.ndarray]:
        nonlocal done
        done += sizes[name]
        if progress:
            progress(name, done, total)
        return [tensors[name].read()]

    tensorfile.write(path, layout, parts, {"format": "pt"})
