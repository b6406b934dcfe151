"""Prompts without pictures, for training on what the model itself makes."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from lf_jax.config import Config, check
from lf_jax.train.data.source import Source, shuffled


@dataclasses.dataclass(frozen=True)
class Prompts(Source):
    """The lines of a text file. Of the procedural world there are prompts without end: `World(video=False)`."""

    path: str  # one prompt a line; blank lines are left out

    def items(self, config: Config) -> int:
        """
        Raises:
            ValueError: no such file, not UTF-8, or no prompts in it.
        """
        return len(_lines(self.path))

    def examples(self, config: Config, positions: Sequence[int]) -> tuple[dict, list[str]]:
        lines = _lines(self.path)
        return {}, [lines[n] for n in shuffled(self.seed, len(lines), positions)]


@functools.lru_cache(maxsize=8)
def _lines(path: str) -> tuple[str, ...]:
    check(pathlib.Path(path).is_file(), f"prompts: no file at {path}")
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not a text file in UTF-8: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    check(bool(prompts), f"prompts: {path} holds none")
    return prompts
