"""`lf-jax stream`."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import tyro

from lf_jax import checkpoint, generate, loading, text
from lf_jax.commands import outputs
from lf_jax.commands.console import note, show_config
from lf_jax.config import Config, check
from lf_jax.inputs import video_chunks
from lf_jax.video import Mp4Writer


@dataclasses.dataclass(frozen=True)
class Stream:
    """Make one video chunk by chunk, with the time every chunk took.

    The video grows in FILE.partial.mp4, which players can open meanwhile, and takes its name when it is complete. The state
    after the last chunk can be saved, and a later run goes on from it, also with another prompt: it writes the new
    frames only, and --num-frames counts the old ones too.

    Example: lf-jax stream --model DIR --prompt "Waves" --output a.mp4 --num-frames 81 --state-out a.state
             lf-jax stream --model DIR --prompt "A storm" --output b.mp4 --num-frames 153 --state-in a.state
    """

    model: str  # converted folder, or a preset for random weights
    prompt: str
    output: pathlib.Path  # the mp4 file to write
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    embeddings: pathlib.Path | None = None  # file of `lf-jax encode` that holds the prompt
    seed: int = 0
    num_frames: int | None = None  # pixel frames of the whole video; short for --video.num-frames
    initial_image: pathlib.Path | None = None  # first frame; needs a model with rollout.independent_first_frame
    initial_video: pathlib.Path | None = None  # video to go on from
    state_in: pathlib.Path | None = None  # state to go on from
    state_out: pathlib.Path | None = None  # where to save the state after the last chunk
    weights_seed: int = 0  # of random weights
    overwrite: bool = False  # replace output and state if they exist
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = generate.with_frames(self.settings, self.num_frames)
        show_config(config, weights=self.model, output=self.output)
        video_chunks(config)
        for name in ("output", "state_out"):
            if (path := getattr(self, name)) is not None:
                check(self.overwrite or not path.exists(), f"--{name.replace('_', '-')} {path} exists; --overwrite replaces it")
                outputs.check_writable(path.absolute().parent)
        state = None if self.state_in is None else checkpoint.load_state(self.state_in)
        source = loading.find(self.model, config, self.weights_seed)
        encoded = None if self.embeddings is None else text.load_embeddings(self.embeddings, source.fingerprint())
        pipe = generate.load(self.model, config, seed=self.weights_seed)
        stream = pipe.stream(
            self.prompt,
            seed=self.seed,
            embeddings=encoded,
            initial_image=self.initial_image,
            initial_video=self.initial_video,
            state=state,
        )
        last = None
        with Mp4Writer(self.output, config.video.fps, growing=True) as writer:
            for chunk, seconds in timed(stream):
                made = chunk.frames.shape[1]
                writer.add(np.asarray(chunk.frames[0]))
                frames = f"{writer.frames - made:5d} .. {writer.frames - 1:5d}"
                note(f"frames {frames}  {seconds:7.2f} s  {made / seconds:7.1f} frames/s")
                last = chunk.state
            if self.state_out is not None:
                checkpoint.save_state(self.state_out, last)
        note("the time of the first chunks includes compilation")
        print(self.output)


def timed(stream: Iterator[generate.Chunk]) -> Iterator[tuple[generate.Chunk, float]]:
    """Chunks with the seconds from asking for each to having its pixels."""
    while True:
        start = time.perf_counter()
        chunk = next(stream, None)
        if chunk is None:
            return
        chunk.frames.block_until_ready()
        yield chunk, time.perf_counter() - start
