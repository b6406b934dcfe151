"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from lf_jax.config import check


@contextlib.contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path in the same folder, renamed to `path` if the block succeeds and removed if it fails.

    Raises:
        ValueError: if the folder cannot be written.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _make(path.parent)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """An empty temporary folder beside `folder`, renamed to it if the block succeeds and removed if it fails.

    What a killed process left behind is removed by the next one. A folder that is replaced is put aside first and comes
    back if the process dies between the two renames and another one writes here.

    Raises:
        ValueError: if the place cannot be written, or another process is writing there.
    """
    folder = pathlib.Path(folder)
    partial, aside = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.replaced")
    _make(partial)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        check(ours, f"another process is writing {folder}")
        if aside.exists():
            shutil.rmtree(aside) if folder.exists() else aside.rename(folder)
        for old in partial.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial)
            raise
        if folder.exists():
            folder.rename(aside)
        partial.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error
    check(os.access(folder, os.W_OK), f"{folder} cannot be written: permission denied")
