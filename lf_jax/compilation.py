"""The persistent compilation cache: what was compiled once on this machine is not compiled again by a later process.

It is JAX's own, so its variables hold: JAX_COMPILATION_CACHE_DIR is another folder, JAX_ENABLE_COMPILATION_CACHE=false turns
it off. An entry belongs to one program, device, driver and version of XLA; the folder may be deleted at any time.
"""

import contextlib
import os
import pathlib
import threading
from collections import Counter
from collections.abc import Iterator

import jax
from jax._src.lib import mosaic_gpu_dialect  # no public name, and no other place to mend what is mended below

_HIT = "/jax/compilation_cache/cache_hits"
_NAMING = "get_or_set_dump_options"  # of jaxlib 0.11.1 and later


def default_folder() -> pathlib.Path:
    """`lf_jax/compiled` in the user's folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches) / "lf_jax" / "compiled"


def use_cache(folder: str | os.PathLike | None = None) -> None:
    """Keeps from now on every program that this process compiles, in `folder`, or where JAX was told to, or in the default.

    Of all programs, because a video takes dozens of small ones, too; JAX's own threshold would be a second.
    """
    _leave_out_circumstances()
    chosen = folder or jax.config.jax_compilation_cache_dir or default_folder()
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _leave_out_circumstances() -> None:
    """Makes a program with kernels the same program whoever calls it and whatever was lowered before.

    A kernel is a part of the program as bytes. Those of a Triton kernel hold the line of code that made each of its
    operations, with all callers. Those of a Mosaic GPU kernel hold a name for files of a debugger, which jaxlib makes with a
    running number; a kernel that has one keeps it, so each gets that of its function first.
    """
    jax.config.update("jax_traceback_in_locations_limit", 0)
    number = getattr(mosaic_gpu_dialect, _NAMING, None)
    if number is None or hasattr(number, "original"):
        return

    def named(module):
        attributes = module.operation.attributes
        attributes["mosaic_gpu.dump_basename"] = attributes["sym_name"]
        return number(module)

    named.original = number
    setattr(mosaic_gpu_dialect, _NAMING, named)


@contextlib.contextmanager
def counted_hits() -> Iterator[Counter[int]]:
    """Programs found in the cache meanwhile, by the thread that asked for them."""
    hits: Counter[int] = Counter()

    def count(event: str, **_) -> None:
        if event == _HIT:
            hits[threading.get_ident()] += 1

    jax.monitoring.register_event_listener(count)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(count)
