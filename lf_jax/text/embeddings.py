"""Embedding files: prompts encoded once, so that the text encoder need not be in memory while videos are made."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lf_jax import config

FORMAT = "lf_jax.embeddings.1"


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Encoded prompts in host memory.

    Raises:
        ValueError: the parts do not fit together.
    """

    values: np.ndarray  # [b, n, dim] in the dtype of the encoder; rows from `lengths` on are zero
    lengths: np.ndarray  # [b] int32
    prompts: tuple[str, ...]  # as they were given, before cleaning
    encoder: str  # `fingerprint` of what made them

    def __post_init__(self):
        config.check(np.ndim(self.values) == 3, f"embeddings of shape {np.shape(self.values)} must be [b, n, dim]")
        b, n, _ = np.shape(self.values)
        config.check(
            len(self.prompts) == b and np.shape(self.lengths) == (b,),
            f"{b} embeddings need as many prompts and lengths, not {len(self.prompts)} and {np.shape(self.lengths)}",
        )
        lengths = np.asarray(self.lengths)
        config.check(bool(np.all((lengths >= 1) & (lengths <= n))), f"lengths={lengths.tolist()} must lie in [1, {n}]")

    def select(self, prompts: Sequence[str]) -> np.ndarray:
        """The values of `prompts`, [len(prompts), n, dim], in their order.

        Raises:
            ValueError: a prompt that was not encoded.
        """
        missing = [prompt for prompt in prompts if prompt not in self.prompts]
        config.check(not missing, f"not among the {len(self.prompts)} encoded prompts: {missing}")
        return np.asarray(self.values)[[self.prompts.index(prompt) for prompt in prompts]]


def fingerprint(part: config.Text, tokenizer: bytes, weights: str | pathlib.Path | Mapping[str, Any]) -> str:
    """What identifies an encoder: its settings, its tokenizer and the first and last row of every tensor, hashed.

    A sample of the weights, because reading 11 GB to check a file of 4 MB would defeat its purpose. Rows are rounded to
    `part.dtype` first, so that a float32 file and the bfloat16 model made from it agree.

    Args:
        tokenizer: `Tokenizer.model`.
        weights: the encoder's safetensors file, or its arrays by the same names (`lf_jax.checkpoint.flatten`).
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(part), sort_keys=True).encode())
    digest.update(hashlib.sha256(tokenizer).digest())
    with contextlib.ExitStack() as stack:
        if not isinstance(weights, Mapping):
            file = stack.enter_context(safetensors.safe_open(weights, "numpy"))
            weights = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for name, tensor in sorted(weights.items()):
            shape = tuple(tensor.shape if hasattr(tensor, "shape") else tensor.get_shape())
            digest.update(f"{name}{shape}".encode())
            for edge in ([slice(0, 1) for _ in shape[:-1]], [slice(size - 1, size) for size in shape[:-1]]):
                row = np.asarray(tensor[tuple(edge) or slice(None)]).astype(config.dtype_of(part))
                digest.update(row.astype(np.float32).tobytes())
    return digest.hexdigest()


def save_embeddings(path: str | pathlib.Path, embeddings: Embeddings) -> None:
    """Writes a safetensors file, under a temporary name first: `path` is whole or as it was. Replaces what is there.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    path = pathlib.Path(path)
    metadata = {"format": FORMAT, "prompts": json.dumps(embeddings.prompts), "encoder": embeddings.encoder}
    arrays = {"embeddings": np.asarray(embeddings.values), "lengths": np.asarray(embeddings.lengths, np.int32)}
    content = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_embeddings(path: str | pathlib.Path, encoder: str | None = None) -> Embeddings:
    """Reads a file of `save_embeddings`.

    Args:
        encoder: the fingerprint that the file must carry; None accepts any (nothing to compare with at hand).

    Raises:
        FileNotFoundError: no file at `path`.
        ValueError: another kind of file, a damaged one, or one made by another encoder.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"embeddings: no file at {path}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"embeddings: {path} has format {metadata.get('format')!r}, expected {FORMAT!r}")
            values, lengths = file.get_tensor("embeddings"), file.get_tensor("lengths")
    except safetensors.SafetensorError as error:
        raise ValueError(f"embeddings: {path} is damaged or not a safetensors file ({error})") from error
    if encoder is not None and metadata["encoder"] != encoder:
        raise ValueError(
            f"embeddings: {path} was made by encoder {metadata['encoder'][:12]}, not by {encoder[:12]}: other weights, "
            "tokenizer or text settings; encode the prompts again"
        )
    return Embeddings(values, lengths, tuple(json.loads(metadata["prompts"])), metadata["encoder"])
