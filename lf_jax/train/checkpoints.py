"""Checkpoints of a run: `FOLDER/STEP`, written by Orbax while training goes on.

Orbax writes into a temporary folder beside it and renames that at the end. Just before, a list of all files with their
digests is added; what does not match its list is never read.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint

from lf_jax.checkpoint import build, flatten
from lf_jax.config import check

FILES = "files.json"  # path in the checkpoint -> SHA-256
CHANGING = "_CHECKPOINT_METADATA"  # Orbax writes the time into it at the very end; nothing is read from it
PARTIAL = orbax.checkpoint.utils.TMP_DIR_SUFFIX  # in the name of a folder that Orbax is writing


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for what is being written.

    Args:
        folder: made if it is absent.
        keep: how many to keep, the newest.
        note: called with one line about every checkpoint that cannot be used.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, note: Callable[[str], None]):
        self.folder, self.keep, self.note = pathlib.Path(folder).absolute(), keep, note
        self._writing: int | None = None
        options = orbax.checkpoint.AsyncOptions(post_finalization_callback=self._complete)
        self._orbax = orbax.checkpoint.StandardCheckpointer(async_options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        self._orbax.close()

    def save(self, step: int, state: Any) -> None:
        """Copies the state to the host and returns; a thread writes it. Waits for the checkpoint before, if need be."""
        self.wait()
        self._writing = step
        self._orbax.save(self.folder / str(step), flatten(state), force=True)

    def wait(self) -> None:
        """Until the last checkpoint is complete. Then those that are too old go.

        Raises:
            OSError, ValueError: it could not be written.
        """
        self._orbax.wait_until_finished()
        for step in self.steps()[self.keep :]:
            shutil.rmtree(self.folder / str(step))

    def steps(self) -> list[int]:
        """Of all checkpoints, the newest first."""
        return sorted((int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()), reverse=True)

    def restore(self, like: Any) -> tuple[int, Any]:
        """The newest checkpoint that is whole, as (its step, state), with the devices and structure of `like`; (0, `like`)
        where there is none at all.

        Damaged ones get another name, so that they are not found again; half-written ones are removed.

        Raises:
            ValueError: if there are checkpoints and none is whole, or one does not fit `like`.
        """
        for path in self.folder.glob(f"*{PARTIAL}*"):
            self.note(f"checkpoint {path} was not written to its end: removed")
            shutil.rmtree(path)
        found = self.steps()
        for step in found:
            path = self.folder / str(step)
            if (damage := _damage(path)) is None:
                return step, self._read(path, like)
            aside = path.with_name(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            self.note(f"checkpoint {path} is damaged ({damage}): skipped, and renamed to {aside.name}")
        check(not found, f"none of the checkpoints in {self.folder} is whole; remove the folder to begin again")
        return 0, like

    def _read(self, path: pathlib.Path, like: Any) -> Any:
        wanted = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in flatten(like).items()}
        stored = self._orbax.metadata(path).item_metadata.tree
        differing = [f"{k} is {list(wanted[k].shape) if k in wanted else 'unknown'}" for k in _misfits(wanted, stored)]
        check(not differing, f"checkpoint {path} is of another run: here {', '.join(differing[:4])}")
        return build(like, self._orbax.restore(path, wanted))

    def _complete(self) -> None:
        """Called in Orbax's thread when all files are there, before the folder gets its name."""
        (folder,) = self.folder.glob(f"{self._writing}{PARTIAL}*")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHANGING)
        (folder / FILES).write_text(json.dumps({str(path.relative_to(folder)): _digest(path) for path in files}, indent=1))


def _misfits(wanted: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    either = {**stored, **wanted}
    return [k for k in either if k not in wanted or k not in stored or wanted[k].shape != tuple(stored[k].shape)]


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        wanted = json.loads((folder / FILES).read_text())
    except (OSError, ValueError):
        return f"{FILES} cannot be read"
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is not as it was written"
    return None
