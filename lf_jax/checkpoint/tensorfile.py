"""Safetensors files, read and written one tensor at a time.

The format (huggingface/safetensors, "Format"): 8 bytes, little-endian, the length of the header; the header, JSON
`{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`; then the bytes of all tensors without gaps, row by
row. The library of that name writes only whole dictionaries and does not hand bfloat16 or float8 to numpy.
"""

import dataclasses
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from lf_jax.config import check

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the library's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # bytes from the beginning of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file whose header has been read and whose length is right.

    Attributes:
        entries: name -> Entry, in the order of the file.
        metadata: the file's own strings.

    Raises:
        ValueError: if the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        check(self.path.is_file(), f"no such file: {self.path}")
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            check(0 < length <= _HEADER_LIMIT, f"{self.path} is not a safetensors file ({size} bytes)")
            check(size >= 8 + length, f"{self.path} is truncated: its header needs {8 + length} bytes, the file has {size}")
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ValueError(f"{self.path} is not a safetensors file: {error}") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = {name: _entry(self.path, name, fields, 8 + length) for name, fields in header.items()}
        end = max((entry.start + entry.nbytes for entry in self.entries.values()), default=8 + length)
        check(size >= end, f"{self.path} is truncated: expected {end} bytes, the file has {size}")
        check(size == end, f"{self.path} has {size - end} bytes after its last tensor: not a whole safetensors file")

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor in memory."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            array = np.empty(entry.nbytes, np.uint8)
            received = file.readinto(array)
        check(received == entry.nbytes, f"{self.path} was shortened while it was read: {name}")
        return array.view(entry.dtype).reshape(entry.shape)

    def view(self, name: str) -> np.ndarray:
        """One tensor as a read-only view of the file: pages are read when they are used and can be dropped again."""
        entry = self.entries[name]
        if not entry.nbytes:
            return np.empty(entry.shape, entry.dtype)
        page = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), entry.start - page + entry.nbytes, offset=page, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8, entry.nbytes, entry.start - page).view(entry.dtype).reshape(entry.shape)


def _entry(path: pathlib.Path, name: str, fields: Mapping, data: int) -> Entry:
    check(fields.get("dtype") in DTYPES, f"{path}: {name} has dtype {fields.get('dtype')}, which cannot be read here")
    start, end = fields["data_offsets"]
    entry = Entry(tuple(fields["shape"]), DTYPES[fields["dtype"]], data + start)
    check(entry.nbytes == end - start, f"{path}: {name} spans {end - start} bytes, its shape and dtype need {entry.nbytes}")
    return entry


def write(
    path: str | os.PathLike,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    parts: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file from front to back, holding one part of one tensor at a time.

    Args:
        layout: name -> (shape, dtype) of every tensor. Wider dtypes are put first, so that all are aligned.
        parts: name -> the tensor, cut along its first axis or whole; called once for each name, when its turn comes.

    Raises:
        ValueError: if the parts of a tensor do not add up to its shape, or have another dtype.
    """
    order = sorted(layout, key=lambda name: -layout[name][1].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        shape, dtype = layout[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            shape, dtype = layout[name]
            written = 0
            for part in parts(name):
                check(part.dtype == dtype, f"{name} is laid out as {dtype}, received a part of {part.dtype}")
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                written += part.size
                del part  # before the next is made
            check(written == math.prod(shape), f"{name} needs {math.prod(shape)} numbers, received {written}")
        file.flush()
        os.fsync(file.fileno())
