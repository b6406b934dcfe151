"""The prompts of a command: from the command line, from a file with one a line, or encoded already."""

import pathlib

from lf_jax import loading, text
from lf_jax.commands.console import note
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


def read_embeddings(file: pathlib.Path | None, source: loading.Source) -> text.Embeddings | None:
    """The file of `--embeddings`, which the text encoder of `source` must have made where there is one to compare with.

    Raises:
        ValueError, OSError: as `lf_jax.text.load_embeddings`.
    """
    if file is None:
        return None
    encoder = source.fingerprint()
    if encoder is None:
        note(f"--embeddings {file} are taken as they are: there is no text/model.safetensors to compare their encoder with")
    return text.load_embeddings(file, encoder)
