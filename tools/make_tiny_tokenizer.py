"""Trains the tokenizer of the tiny preset: python tools/make_tiny_tokenizer.py [TARGET]

512 unigram pieces with the layout of UMT5's model: pad 0, end 1, start 2, unknown 3, one piece a byte, no normalisation.
The sentences are our own; the same sentencepiece version gives the same file.
"""

import io
import itertools
import pathlib
import string
import sys

import sentencepiece

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


def train() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
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
