"""VBench's list of prompts, and the names that it looks for videos under.

VBench scores files called `{prompt}-{i}.mp4`, five a prompt, and 25 of those prompts that measure temporal flickering,
which it picks the stillest of. Its networks and their weights do not come with this library.
"""

import dataclasses
import json
import pathlib

from lf_jax.config import check

FLICKER, FLICKER_SAMPLES = "temporal_flickering", 25
LONGEST = 255  # bytes of a file's name


@dataclasses.dataclass(frozen=True)
class Entry:
    """One prompt of the list."""

    prompt: str  # in VBench's own words: what the files are called by
    text: str  # what the videos are made from
    samples: int

    def file_name(self, sample: int) -> str:
        return f"{self.prompt}-{sample}.mp4"


def read(path: pathlib.Path, samples: int, extended: pathlib.Path | None = None) -> tuple[Entry, ...]:
    """The prompts of VBench's `VBench_full_info.json`, or of a text file with one a line, which names no dimensions.

    Args:
        samples: videos a prompt.
        extended: text file with what is generated in place of each prompt, line by line; None generates the prompts.

    Raises:
        ValueError: if a file is not of these forms, has another number of lines, or a prompt cannot name a file.
        OSError: if a file cannot be read.
    """
    check(samples > 0, f"{samples=} must be positive")
    if path.suffix == ".json":
        dimensions = _dimensions(path)
    else:
        dimensions = {line: set() for line in _lines(path)}
    prompts = list(dimensions)
    check(bool(prompts), f"{path} holds no prompts")
    for prompt in prompts:
        fits = "/" not in prompt and len(f"{prompt}-{max(samples, FLICKER_SAMPLES)}.mp4".encode()) <= LONGEST
        check(fits, f"{path}: {prompt!r} cannot be part of a file's name, which VBench expects")
    texts = prompts if extended is None else _lines(extended)
    check(len(texts) == len(prompts), f"{extended} has {len(texts)} lines, expected {len(prompts)}, as {path} has prompts")
    return tuple(
        Entry(prompt, text, max(samples, FLICKER_SAMPLES) if FLICKER in dimensions[prompt] else samples)
        for prompt, text in zip(prompts, texts, strict=True)
    )


def _dimensions(path: pathlib.Path) -> dict[str, set[str]]:
    """Every prompt of VBench's list once, with all that it measures."""
    found: dict[str, set[str]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            found.setdefault(entry["prompt_en"], set()).update(entry["dimension"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of entries with 'prompt_en' and 'dimension'") from error
    return found


def _lines(path: pathlib.Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    return lines
