"""One component on its way to disk, piece by piece: never much more in memory than the largest tensor of the source."""

import functools
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.rules import Piece, Shape
from convert.tensors import Tensors
from lf_jax.checkpoint import component, tensorfile
from lf_jax.checkpoint.replace import replaced_folder
from lf_jax.config import check

Progress = Callable[[str, int, int], None]  # what is written now, bytes done, bytes in all


def dtypes_of(
    pieces: Sequence[Piece], tensors: Tensors, dtype: str | None, fixed: Mapping[str, np.dtype]
) -> dict[str, np.dtype]:
    """The dtype that every target is stored in: `dtype`, or the source's; of a stack, the one that holds all layers.

    Args:
        fixed: of targets that have one dtype whatever the others have.
    """
    found: dict[str, list[np.dtype]] = {}
    for piece in pieces:
        found.setdefault(piece.target, []).append(tensors[piece.source].dtype)
    if dtype is not None:
        return dict.fromkeys(found, jnp.dtype(dtype)) | fixed
    return {target: np.dtype(functools.reduce(jnp.promote_types, kinds)) for target, kinds in found.items()} | fixed


def main_dtype(dtypes: Mapping[str, np.dtype], shapes: Mapping[str, Shape]) -> str:
    """The dtype of most of the numbers, as the module's own; float32 where a module cannot have it."""
    numbers: dict[str, int] = {}
    for target, dtype in dtypes.items():
        numbers[dtype.name] = numbers.get(dtype.name, 0) + math.prod(shapes[target])
    most = max(numbers, key=numbers.__getitem__)
    return most if most in ("bfloat16", "float32", "float16") else "float32"


def write_component(
    folder: pathlib.Path,
    name: str,
    part: component.Part,
    pieces: Sequence[Piece],
    tensors: Tensors,
    *,
    dtypes: Mapping[str, np.dtype],
    format: str,
    beside: Mapping[str, pathlib.Path],
    notes: Mapping[str, Any],
    progress: Progress | None,
) -> pathlib.Path:
    """Writes `folder/name` whole, or not at all.

    Args:
        pieces: of `rules.plan`, complete.
        beside: files that are copied into the component's folder, by their name there.

    Raises:
        ValueError: if the place cannot be written or has too little room.
    """
    stacks: dict[str, list[Piece]] = {}
    for piece in pieces:
        stacks.setdefault(piece.target, []).append(piece)
    shapes = component.shapes(part)
    layout = {target: (shapes[target], dtypes[target]) for target in stacks}
    total, done = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values()), 0

    def parts(target: str) -> Iterator[np.ndarray]:
        nonlocal done
        for piece in stacks[target]:
            # Not kept in a name: the one before would live on while the next is made.
            yield piece.transform.forward(tensors[piece.source].read()).astype(dtypes[target], order="C", copy=False)
            done += math.prod(piece.shape) * dtypes[target].itemsize
            if progress:
                progress(f"{name}: {target}", done, total)

    with replaced_folder(folder / name) as partial:
        check_room(partial, total)
        tensorfile.write(partial / component.TENSORS, layout, parts)
        for file, source in beside.items():
            shutil.copyfile(source, partial / file)
        component.finish_component(partial, name, part, format=format, **notes)
    return folder / name


def check_room(folder: pathlib.Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    check(free >= total, f"{folder.parent} has {free / 1e9:.1f} GB left, the result needs {total / 1e9:.1f} GB")
