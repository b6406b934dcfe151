"""From a prompt to token ids: cleaning as Wan2.1 trains with, then the checkpoint's own sentencepiece model."""

import html
import importlib.resources
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import ftfy
import numpy as np
import sentencepiece

PAD, EOS = 0, 1


def clean(prompt: str) -> str:
    """Mended encoding errors, HTML entities resolved (twice, for `&amp;lt;`), every run of white space one space."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text.strip()).strip()


def tiny_model() -> bytes:
    """The sentencepiece model of the tiny preset: 512 pieces, laid out like UMT5's (`tools/make_tiny_tokenizer.py`)."""
    return (importlib.resources.files("lf_jax.text") / "tiny.model").read_bytes()


class Tokenizer:
    """Reads prompts as the tokenizer of `google/umt5-xxl` does: cleaned pieces, end token 1, padding 0.

    Characters that the vocabulary lacks become one unknown token a run. The sentencepiece model would spell them in bytes
    instead, but the published tokenizer does not, so the weights have never seen that. Names of special tokens
    (`</s>`, `<extra_id_0>`) that stand in a prompt are plain text here.

    Args:
        source: a sentencepiece model: the path of a `spiece.model`, or the content of one.
        length: tokens of a row, end token and padding included; longer prompts are cut so that the end token stays.
        vocab: rows of the encoder's embedding table, to be checked against the tokenizer.

    Raises:
        FileNotFoundError: no file at `source`.
        ValueError: `source` is not a sentencepiece model, numbers its special tokens otherwise, or has more than
            `vocab` pieces.
    """

    def __init__(self, source: str | pathlib.Path | bytes, *, length: int = 512, vocab: int | None = None):
        name = "the given bytes" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes):
            path = pathlib.Path(source)
            if not path.is_file():
                raise FileNotFoundError(f"tokenizer: no file at {name}; expected the checkpoint's spiece.model")
            source = path.read_bytes()
        if length < 1:
            raise ValueError(f"{length=} must be at least 1: the end token")
        self.model = source  # the sentencepiece model itself, so that it can be stored beside converted weights
        self.length = length
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(source)
        except RuntimeError as error:
            hint = " (a Git LFS pointer: fetch the file itself)" if source.startswith(b"version https://git-lfs") else ""
            raise ValueError(f"tokenizer: {name} is not a sentencepiece model{hint}") from error
        special = (self._pieces.pad_id(), self._pieces.eos_id())
        if special != (PAD, EOS):
            raise ValueError(f"tokenizer: {name} has pad and end ids {special}, expected {(PAD, EOS)} as in UMT5")
        if vocab is not None and self.vocab > vocab:
            raise ValueError(f"tokenizer: {name} has {self.vocab} pieces, but the encoder embeds {vocab=}")

    @property
    def vocab(self) -> int:
        """Pieces, special ones included."""
        return self._pieces.get_piece_size()

    def pieces(self, prompt: str) -> list[int]:
        """The ids of one cleaned prompt, without end token, of any length."""
        unknown, ids = self._pieces.unk_id(), []
        for piece in self._pieces.encode(clean(prompt)):
            piece = unknown if self._pieces.is_byte(piece) else piece
            if not (piece == unknown and ids[-1:] == [unknown]):
                ids.append(piece)
        return ids

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [b, length], lengths int32 [b] with the end token counted.

        Raises:
            ValueError: no prompts, or a string where a list of them belongs.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"{prompts=} must be a list of at least one prompt")
        rows = [self.pieces(prompt)[: self.length - 1] + [EOS] for prompt in prompts]
        ids = np.full((len(rows), self.length), PAD, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids, np.array([len(tokens) for tokens in rows], np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of a row, special tokens left out."""
        return self._pieces.decode([int(i) for i in ids if i not in (PAD, EOS)])
