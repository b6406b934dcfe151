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
    """An empty temporary file beside `path`, renamed to it if the block succeeds and removed if it fails.

    What a killed process left behind is taken over by the next one.

    Raises:
        ValueError: if the place cannot be written, or another process is writing there.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    _make(path.parent, path)
    with _locked(partial, os.O_RDWR | os.O_CREAT, path):
        os.truncate(partial, 0)
        try:
            yield partial
            with _named(path):
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


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
    _make(partial, folder)
    with _locked(partial, os.O_RDONLY, folder):
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


@contextlib.contextmanager
def _locked(partial: pathlib.Path, flags: int, place: pathlib.Path) -> Iterator[None]:
    """Holds `partial` against other processes; the kernel lets go of it when this one ends, however it ends."""
    with _named(place):
        lock = os.open(partial, flags, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock), os.stat(partial))  # it may have been renamed just before
        except (BlockingIOError, FileNotFoundError):
            ours = False
        check(ours, f"another process is writing {place}")
        yield
    finally:
        os.close(lock)


def _make(folder: pathlib.Path, place: pathlib.Path) -> None:
    with _named(place):
        folder.mkdir(parents=True, exist_ok=True)
    check(os.access(folder, os.W_OK), f"{place} cannot be written: permission denied")


@contextlib.contextmanager
def _named(place: pathlib.Path) -> Iterator[None]:
    """Failures are those of `place`: the temporary name beside it means nothing to the reader."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{place} cannot be written: {error.strerror}") from error
