"""Trains the tokenizer of the tiny preset: python tools/make_tiny_tokenizer.py [TARGET]

512 unigram pieces with the layout of UMT5's model: pad 0, end 1, start 2, unknown 3, one piece a byte, no normalisation.
Every word that the captions of the procedural world use is one piece; what is left of the vocabulary spells other English.
The sentences are our own; the same sentencepiece version gives the same file.
"""

import collections
import contextlib
import io
import itertools
import pathlib
import random
import re
import string
import sys
import tempfile

import sentencepiece

from lf_jax.world import Facts, Thing, phrase
from lf_jax.world.settings import BACKGROUNDS, CAMERAS, COLOURS, HEADINGS, SHAPES, SIZES, SPEEDS, TINTS, WALLS

TARGET = pathlib.Path(__file__).parent.parent / "lf_jax" / "text" / "tiny.model"

SUBJECTS = (
    "a cat", "an old fisherman", "a red fox", "two children", "a small robot", "a woman in a yellow coat",
    "a white horse", "a street musician", "a flock of birds", "a paper boat", "an astronaut", "a dancer",
    "a brown bear", "a glass of water", "a sailing ship", "three friends",
)  # fmt: skip
ACTIONS = (
    "walks slowly through the rain", "plays the piano by candle light", "runs across a field of snow",
    "is looking at the camera and smiling", "drifts down a quiet river", "turns around and waves",
    "jumps over a stone wall", "stands still while the crowd moves past", "opens a wooden door",
    "flies above the clouds", "pours tea into a blue cup", "reads a letter aloud", "climbs down from the roof",
    "sinks below the surface",
)  # fmt: skip
PLACES = (
    "at sunset", "in a busy market", "on the beach in the early morning", "under a bright street lamp",
    "between tall green trees", "near a burning fire", "inside an empty station", "on top of a mountain",
    "beside a neon sign", "in front of a castle", "after midnight", "during a thunderstorm",
)  # fmt: skip
STYLES = (
    "The camera follows from behind, close to the ground.", "Soft light, shallow depth of field, film grain.",
    "A wide shot; the background is out of focus.", "Slow motion, realistic, highly detailed, 4K.",
    "The colours are warm and the shadows are long.", "Hand-drawn animation with simple shapes.",
    "The scene is calm, and nothing else moves.", "Shot from above with a drone, moving forward.",
)  # fmt: skip


def sentences() -> list[str]:
    scenes = itertools.product(SUBJECTS, ACTIONS, PLACES)
    return [f"{a[0].upper()}{a[1:]} {b} {c}. {STYLES[i % len(STYLES)]}" for i, (a, b, c) in enumerate(scenes)]


def captions(count: int = 6000) -> list[str]:
    """Captions of the procedural world. Some are of scenes that cannot be: only the words matter here."""
    draw = random.Random(0)
    return [phrase(_facts(draw), seed) for seed in range(count)]


def _facts(draw: random.Random) -> Facts:
    def maybe(names):
        return draw.choice([None, *names])

    things = tuple(
        Thing(colour, draw.choice(SHAPES), maybe(SIZES), maybe(SPEEDS), maybe(HEADINGS), maybe([True]))
        for colour in draw.sample(list(COLOURS), draw.randint(1, 3))
    )
    background = maybe(BACKGROUNDS)
    tints = tuple(draw.sample(list(TINTS), {None: 0, "plain": 1}.get(background, 2)))
    return Facts(things, maybe(WALLS[1:]), background, tints, maybe(CAMERAS[1:]))


def seeds(corpus: list[str], longest: int) -> collections.Counter:
    """Parts of words with how often they occur. The trainer's own candidates leave out a word that is no part of another."""
    words = collections.Counter(f"\u2581{word}" for line in corpus for word in re.findall(r"\w+", line))
    parts = collections.Counter()
    for word, count in words.items():
        for start, stop in itertools.combinations(range(len(word) + 1), 2):
            if stop - start <= longest:
                parts[word[start:stop]] += count
    return parts


def train() -> bytes:
    model, ours, others = io.BytesIO(), captions(), sentences()
    parts = seeds(ours, longest=20) + seeds(others, longest=2)
    lines = "".join(f"{part}\t{parts[part]}\n" for part in sorted(parts, key=lambda part: (-parts[part], part)))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the path becomes part of the model
        pathlib.Path("seeds.tsv").write_text(lines, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(ours + others),
            model_writer=model,
            model_type="unigram",
            vocab_size=512,
            seed_sentencepieces_file="seeds.tsv",
            byte_fallback=True,
            required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
            normalization_rule_name="identity",
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    return model.getvalue()


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.write_bytes(train())
    print(f"{target}: {target.stat().st_size} bytes")
