"""Configs by name or by path: Python files that end in `CONFIG = Config(...)`."""

import os
import pathlib
import runpy

from lf_jax.config import Config, check

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"  # installed beside this package, and so in a checkout


def names() -> tuple[str, ...]:
    """The presets, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"))


def is_name(source: str | os.PathLike) -> bool:
    return str(source) in names()


def load(source: str | os.PathLike) -> Config:
    """The config of a preset, or of a Python file, which is run.

    Raises:
        ValueError: if `source` is neither a preset nor a file, or the file does not set `CONFIG` to a `Config`.
    """
    path = FOLDER / f"{source}.py" if is_name(source) else pathlib.Path(source)
    check(
        path.is_file() and path.suffix == ".py",
        f"config {str(source)!r} is neither a Python file nor a preset; the presets are {', '.join(names())}",
    )
    found = runpy.run_path(str(path)).get("CONFIG")
    check(isinstance(found, Config), f"{path} must set CONFIG to an lf_jax.config.Config, received {type(found).__name__}")
    return found
