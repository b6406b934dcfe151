"""Checkpoints of random numbers in any family's layout, small enough to write in milliseconds."""

import importlib
import json
import pathlib

import ml_dtypes
import numpy as np

from convert.rules import pieces_of
from lf_jax import checkpoint
from lf_jax.checkpoint import tensorfile
from lf_jax.config import Config, Model, Text, Vae

MODEL = Model(
    dim=32, ffn_dim=48, heads=2, layers=3, freq_dim=8, text_dim=16, text_len=12, dtype="float32"
)  # fmt: skip
VAE = Vae(base=8, dtype="float32")
TINY_VAE = Vae(kind="tiny", widths=(12, 8, 8, 8), dtype="float32")
TEXT = Text(vocab=40, dim=16, ffn_dim=24, heads=2, head_dim=8, layers=3, length=12, dtype="float32")
CONFIG = Config(model=MODEL, vae=VAE, text=TEXT)
WAN_SETTINGS = {"num_heads": MODEL.heads, "text_len": MODEL.text_len}
DIFFUSERS_SETTINGS = {"num_attention_heads": MODEL.heads}


def table(name: str):
    return importlib.import_module(f"convert.families.{name}")


def tensors(family_table: str, part, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors by the names and in the shapes of a table, before `prepare`."""
    random = np.random.default_rng(seed)
    pieces = pieces_of(table(family_table).rules(part), checkpoint.shapes(part))
    return {piece.source: random.standard_normal(piece.shape, np.float32).astype(dtype) for piece in pieces}


def float8(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The linear layers of the blocks as LightX2V stores them: e4m3 and a scale for each row."""
    found = {}
    for name, weight in weights.items():
        found[f"model.{name}"] = weight
        if name.startswith("blocks.") and weight.ndim == 2:
            scale = np.abs(weight).max(1, keepdims=True).clip(1e-5) / np.float32(448)
            found[f"model.{name}"] = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
            found[f"model.{name}_scale"] = scale
    return found


def write(path: pathlib.Path, found: dict[str, np.ndarray], settings: dict | None = None) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensorfile.write(path, {name: (x.shape, x.dtype) for name, x in found.items()}, lambda name: [found[name]])
    if settings is not None:
        path.with_name("config.json").write_text(json.dumps(settings))
    return path


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    file = tensorfile.TensorFile(path)
    return {name: file.read(name) for name in file.entries}


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
