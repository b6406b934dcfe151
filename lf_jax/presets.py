"""Configs by name or by path: Python files that end in `CONFIG = Config(...)`, or in `TRAIN = Train(...)`, which has one."""

import os
import pathlib
import sys
import types
from typing import Any

from lf_jax.config import Config, check

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"  # installed beside this package, and so in a checkout


def names() -> tuple[str, ...]:
    """The presets, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"))


def is_name(source: str | os.PathLike) -> bool:
    return str(source) in names()


def load(source: str | os.PathLike) -> Config:
    """The config of a preset, or of a Python file, which is run. Of a training run it is the model's.

    Raises:
        ValueError: if `source` is neither a preset nor a file, or the file does not set `CONFIG` to a `Config`.
    """
    path, found = run(source)
    config = found.get("CONFIG", getattr(found.get("TRAIN"), "config", None))
    check(isinstance(config, Config), f"{path} must set CONFIG to an lf_jax.config.Config, received {type(config).__name__}")
    return config


def run(source: str | os.PathLike) -> tuple[pathlib.Path, dict[str, Any]]:
    """The path of a preset or a Python file, and what it sets.

    Raises:
        ValueError: if `source` is neither.
    """
    path = FOLDER / f"{source}.py" if is_name(source) else pathlib.Path(source)
    check(
        path.is_file() and path.suffix == ".py",
        f"config {str(source)!r} is neither a Python file nor a preset; the presets are {', '.join(names())}",
    )
    module = types.ModuleType(str(path))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where the command line looks up the comments of a dataclass from the file
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return path, vars(module)
