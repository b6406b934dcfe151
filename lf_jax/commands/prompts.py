"""The prompts of a command: from the command line, or from a file with one a line."""

import pathlib

from lf_jax.config import check


def read_prompts(given: tuple[str, ...], file: pathlib.Path | None) -> tuple[str, ...]:
    """The prompts of `--prompt` and `--prompts`, blank ones left out.

    Raises:
        ValueError: if there are none, or the file is not UTF-8 text.
        OSError: if the file cannot be read.
    """
    lines = list(given)
    if file is not None:
        try:
            lines += file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {file} is not a text file in UTF-8: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    check(bool(prompts), f"no prompts: {'--prompt' if file is None else f'--prompts {file}'} holds none")
    return prompts
