"""`lf-jax stream`."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro

from lf_jax import checkpoint, generate, loading, pipeline, programs
from lf_jax.commands import outputs
from lf_jax.commands.console import note, show_config
from lf_jax.commands.prompts import read_embeddings
from lf_jax.config import Config, check
from lf_jax.inputs import check_runs
from lf_jax.video import Mp4Writer


@dataclasses.dataclass(frozen=True)
class Stream:
    """Make one video chunk by chunk, with the time every chunk took and how long a viewer waits for the first.

    A chunk is written while the next one is computed. The video grows in FILE.partial.mp4, which players can open
    meanwhile, and takes its name when it is complete. The state after the last chunk can be saved, and a later run goes
    on from it as if it had not stopped, also with another prompt: it writes the new frames only. Without a window
    (cache.window), and with sparse attention, the state holds a plan of the whole video, so --num-frames is the same in
    both runs and --stop-at says where the first one ends.

    Example: lf-jax stream --model DIR --prompt "Waves" --output a.mp4 --stop-at 45 --state-out a.state
             lf-jax stream --model DIR --prompt "A storm" --output b.mp4 --state-in a.state
    """

    model: str  # converted folder, or a preset for random weights
    prompt: str
    output: pathlib.Path  # the mp4 file to write
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    vae: str | None = None  # folder with another autoencoder; of a preset with random weights also wan, light or tiny
    embeddings: pathlib.Path | None = None  # file of `lf-jax encode` that holds the prompt
    seed: int | None = None  # 0 if not given; a state goes on with its own
    num_frames: int | None = None  # pixel frames of the whole video; short for --video.num-frames
    stop_at: int | None = None  # end after the chunk that reaches this pixel frame of the whole video
    initial_image: pathlib.Path | None = None  # first frame; needs a model with rollout.independent_first_frame
    initial_video: pathlib.Path | None = None  # video to go on from
    state_in: pathlib.Path | None = None  # state to go on from
    state_out: pathlib.Path | None = None  # where to save the state after the last chunk
    weights_seed: int | None = None  # of a preset's random weights, 0 if not given
    overwrite: bool = False  # replace output and state if they exist
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = pipeline.with_frames(self.settings, self.num_frames)
        show_config(config, weights=self.model, output=self.output)
        check_runs(config)
        own = self.state_in is None or self.seed is None
        check(own, f"--seed {self.seed} has no use with --state-in: a state goes on with its own")
        for option, path in (("--output", self.output), ("--state-out", self.state_out)):
            if path is not None:
                check(self.overwrite or not path.exists(), f"{option} {path} exists; --overwrite replaces it")
                outputs.check_writable(option, path.absolute().parent)
        state = None if self.state_in is None else read_state(self.state_in)
        made, planned = 0 if state is None else pixel_frames(int(state.rollout.cache.end), config), config.video.num_frames
        check(
            self.stop_at is None or made < self.stop_at <= planned,
            f"--stop-at {self.stop_at} must lie within the {planned} frames of the video, after the {made} made already",
        )
        source = loading.find(self.model, config, self.weights_seed, self.vae)
        source.check(*(("dit", "vae") if self.embeddings else ("dit", "vae", "text")))
        encoded = read_embeddings(self.embeddings, source)
        with programs.ahead(programs.of_videos(config)):
            if encoded is None:  # before the transformer takes its place in memory
                encoded = pipeline.encode_prompts(source, pipeline.texts([self.prompt], config))
            pipe = pipeline.load(self.model, config, seed=self.weights_seed, vae=self.vae)
        start, paces = time.perf_counter(), []
        stream = pipe.stream(
            self.prompt,
            seed=self.seed,
            embeddings=encoded,
            initial_image=self.initial_image,
            initial_video=self.initial_video,
            state=state,
        )
        with Mp4Writer(self.output, config.video.fps, growing=True) as writer:
            for chunk in generate.fetch(until(stream, (self.stop_at or planned) - made)):
                [frames], now = chunk.frames, time.perf_counter()
                seconds, start = now - start, now
                paces.append((len(frames), seconds))
                writer.add(frames)
                made += len(frames)
                shown = f"frames {made - len(frames):5d} .. {made - 1:5d}"
                note(f"{shown}  {seconds:7.2f} s  {len(frames) / seconds:7.1f} frames/s")
            if self.state_out is not None:
                checkpoint.save_state(self.state_out, chunk.state)
        note(summary(paces))
        print(self.output)


def read_state(path: pathlib.Path) -> generate.StreamState:
    state = checkpoint.load_state(path)
    check(
        isinstance(state, generate.StreamState),
        f"--state-in {path} holds a {type(state).__name__}, expected a StreamState as --state-out writes it",
    )
    return state


def pixel_frames(latent_frames: int, config: Config) -> int:
    """Pixel frames that so many latent frames are decoded to."""
    return 1 + (latent_frames - 1) * config.vae.temporal_stride


def until(chunks: Iterator[generate.Chunk], frames: int) -> Iterator[generate.Chunk]:
    """The chunks up to the one that reaches so many pixel frames; the one after it is not asked for."""
    for chunk in chunks:
        yield chunk
        frames -= chunk.frames.shape[1]
        if frames <= 0:
            return


def summary(paces: Sequence[tuple[int, float]]) -> str:
    """How long a viewer waits and how steadily the rest comes, from the frames and seconds of every chunk."""
    (_, wait), *later = paces
    if not later:
        return f"first frames after {wait:.2f} s"
    frames, seconds = zip(*later, strict=True)
    return (
        f"first frames after {wait:.2f} s, then {sum(frames) / sum(seconds):.1f} frames/s: a chunk every "
        f"{1000 * statistics.median(seconds):.0f} ms ({1000 * min(seconds):.0f} .. {1000 * max(seconds):.0f})"
    )
