"""Streams of training examples: what stands at a position depends on the seed and the position alone."""

import abc
import dataclasses
import functools
import pathlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from lf_jax import checkpoint, loading, text
from lf_jax.config import Config, check

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """An endless stream of examples, read by position: a run that is resumed at a step sees what it would have seen.

    A source of `n` items gives each of them once in the positions [e n, e n + n) of every epoch e, shuffled anew.
    """

    seed: int = 0  # of the order, of clips, and of scenes
    model: str | None = None  # converted folder whose tokenizer reads the captions; None: the tiny preset's tokenizer
    embeddings: str | None = None  # file of `lf-jax encode` that holds every caption, in place of a tokenizer

    def __post_init__(self):
        check(0 <= self.seed < 2**32, f"{self.seed=} must lie in [0, 2**32)")

    def batch(self, config: Config, step: int, size: int) -> dict[str, Any]:
        """Examples [step * size, (step + 1) * size) of the stream.

        Returns:
            "video" [b, f, h, w, 3] in [-1, 1] or "latents" [b, f, h, w, c], float32, or neither (prompts); and "ids" int32
            [b, n] with "lengths" int32 [b], or with `embeddings` "text" [b, n, text_dim], and "negative", of the same shape,
            if the file holds `config.video.negative_prompt`. Arrays of jax where the device made them, of numpy where they
            come from files.

        Raises:
            ValueError: the source cannot serve `config`, or holds something that cannot be read.
        """
        arrays, captions = self.examples(config, range(step * size, (step + 1) * size))
        return arrays | self.words(config, captions)

    @abc.abstractmethod
    def items(self, config: Config) -> int | None:
        """How many items an epoch has; None of a source that never repeats itself.

        Raises:
            ValueError: as `batch`. Reads no pictures, so a run can ask before its long work.
        """

    @abc.abstractmethod
    def examples(self, config: Config, positions: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
        """What stands at `positions`: arrays by the names of `batch`, and captions as they were written."""

    def origin(self, config: Config) -> str:
        """What decides the examples: sources of one origin give the same ones."""
        return repr(dataclasses.replace(self, model=None, embeddings=None))

    def words(self, config: Config, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions as `batch` gives them."""
        if self.embeddings is not None:
            found, negative = _embeddings(self.embeddings, self.model, config), config.video.negative_prompt
            encoded = {"text": found.select(captions)}
            return encoded | ({"negative": found.select([negative] * len(captions))} if negative in found.prompts else {})
        ids, lengths = tokenizer(self.model, config)(captions)
        return {"ids": ids, "lengths": lengths}


@functools.lru_cache(maxsize=8)
def tokenizer(model: str | None, config: Config) -> text.Tokenizer:
    """The tokenizer of a converted folder, or the tiny preset's, which an encoder of another vocabulary may not read.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is not the tokenizer of `config.text`.
    """
    part = config.text
    spiece = text.tiny_model() if model is None else pathlib.Path(model) / "text" / loading.SPIECE
    found = text.Tokenizer(spiece, length=part.length, vocab=part.vocab)
    check(
        model is not None or found.vocab == part.vocab,
        f"text.vocab={part.vocab} is not the tiny tokenizer's {found.vocab}: set the data's model to the folder of the encoder",
    )
    return found


@functools.lru_cache(maxsize=8)
def _embeddings(file: str, model: str | None, config: Config) -> text.Embeddings:
    encoder, part = None, config.text
    if model is not None:  # its own settings: a training run computes in another dtype than the encoder was run in
        own = dataclasses.replace(config, text=checkpoint.load_part(model, "text"))
        encoder = loading.Source(own, pathlib.Path(model)).fingerprint()
    found = text.load_embeddings(file, encoder)
    rows, expected = found.values.shape[1:], (part.length, part.dim)
    check(rows == expected, f"embeddings {file} are of [n, dim] {rows}, expected {expected}")
    return found


def shuffled(seed: int, count: int, positions: Sequence[int]) -> list[int]:
    """The items, of `count`, that stand at `positions`."""
    return [int(_order(seed, position // count, count)[position % count]) for position in positions]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return _generator(seed, epoch).random_raw(count).argsort(kind="stable")


def draw(seed: int, position: int, choices: int) -> int:
    """One of `choices` for what stands at `position`, independent of the order."""
    return int(_generator(seed, position, 1).random_raw() % choices)


def _generator(*numbers: int) -> np.random.PCG64:
    """A raw generator: numpy promises that its numbers never change, as it does not of the distributions."""
    return np.random.PCG64(numbers)


def ahead(make: Callable[[int], T], steps: Iterable[int], depth: int = 2) -> Iterator[T]:
    """`make(step)` for every step, in order, made by a thread that is up to `depth` steps ahead of the reader.

    `ahead(lambda step: source.batch(config, step, size), range(start, stop))` keeps the device busy while captions are
    tokenised and files are decoded. What the thread raises is raised here, at the step it belongs to.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(*message: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(message, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                put("made", make(step))
                if stopped.is_set():
                    return
            put("end", None)
        except Exception as error:
            put("failed", error)

    thread = threading.Thread(target=work, name="data", daemon=True)
    thread.start()
    try:
        while True:
            kind, content = ready.get()
            if kind == "end":
                return
            if kind == "failed":
                raise content
            yield content
    finally:
        stopped.set()
        thread.join()
