"""`lf-jax sample`."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import tyro

from lf_jax import generate, loading, pipeline, programs, text
from lf_jax.commands import outputs
from lf_jax.commands.console import note, progress, show_config
from lf_jax.commands.prompts import read_embeddings, read_prompts
from lf_jax.config import Config, check
from lf_jax.inputs import check_runs, video_chunks
from lf_jax.video import Mp4Writer


@dataclasses.dataclass(frozen=True)
class Sample:
    """Make mp4 videos from prompts.

    Every video depends on its own prompt and seed only: neither the batch nor the order changes it. Files get names made
    of prompt, index and seed, and appear when they are complete. A second run with the same options skips what is
    there, so an interrupted batch goes on; files made with other options are only replaced with --overwrite.

    Example: lf-jax sample --model DIR --prompt "A red ball rolls" --output videos --video.num-frames 81
    """

    model: str  # converted folder, or a preset for random weights
    output: pathlib.Path  # folder for the videos and their manifest.json
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    vae: str | None = None  # folder with another autoencoder; of a preset with random weights also wan, light or tiny
    prompt: tuple[str, ...] = ()  # one or more prompts
    prompts: pathlib.Path | None = None  # file with one prompt a line
    embeddings: pathlib.Path | None = None  # file of `lf-jax encode`; without prompts, all of its prompts
    seed: int = 0
    samples: int = 1  # videos a prompt, with the seeds seed, seed + 1, ...
    batch: int = 1  # videos made together
    num_frames: int | None = None  # pixel frames; short for --video.num-frames
    initial_image: pathlib.Path | None = None  # first frame; needs a model with rollout.independent_first_frame
    initial_video: pathlib.Path | None = None  # video to go on from
    weights_seed: int | None = None  # of a preset's random weights, 0 if not given
    overwrite: bool = False  # replace files that were made with other options
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = pipeline.with_frames(self.settings, self.num_frames)
        show_config(config, weights=self.model, output=self.output)
        for name in ("batch", "samples"):
            check(getattr(self, name) > 0, f"--{name} {getattr(self, name)} must be positive")
        check_runs(config)
        source = loading.find(self.model, config, self.weights_seed, self.vae)
        source.check(*(("dit", "vae") if self.embeddings else ("dit", "vae", "text")))
        encoded = read_embeddings(self.embeddings, source)
        prompts = self._prompts(config, encoded)
        inputs = (self.initial_image, self.initial_video, self.embeddings)
        manifest = outputs.Manifest(self.output, outputs.recipe_of(config, self.model, source.seed, inputs, self.vae))
        videos = outputs.list_videos(prompts, self.seed, self.samples)
        pending = manifest.pending(videos, self.overwrite)
        if len(pending) < len(videos):
            note(f"{len(videos) - len(pending)} of {len(videos)} videos are complete already")
        if not pending:
            return

        with programs.ahead(programs.of_videos(config, min(self.batch, len(pending)))):
            if encoded is None:  # before the transformer takes its place in memory
                note(f"encoding {len(prompts)} prompts")
                encoded = pipeline.encode_prompts(source, pipeline.texts(prompts, config))
            pipe = pipeline.load(self.model, config, seed=self.weights_seed, vae=self.vae)
        starts = {"initial_image": self.initial_image, "initial_video": self.initial_video}
        make(pipe, pending, self.batch, encoded, manifest, **starts)

    def _prompts(self, config: Config, encoded: text.Embeddings | None) -> tuple[str, ...]:
        """What to sample: the prompts given, or all of an embeddings file but the negative one."""
        if encoded is None or self.prompt or self.prompts is not None:
            return read_prompts(self.prompt, self.prompts)
        guided = config.rollout.guidance_scale != 1
        prompts = tuple(p for p in encoded.prompts if not (guided and p == config.video.negative_prompt))
        check(bool(prompts), f"--embeddings {self.embeddings} holds the negative prompt only")
        return prompts


def make(
    pipe: pipeline.Pipeline,
    videos: Sequence[outputs.Video],
    batch: int,
    encoded: text.Embeddings,
    manifest: outputs.Manifest,
    **starts: pathlib.Path | None,
) -> None:
    """Makes videos in the folder of `manifest`, `batch` at a time, and prints the name of each when it is complete.

    Args:
        encoded: their prompts, and the negative one under guidance.
        starts: what the videos begin with, as `Pipeline.stream` takes it.
    """
    with progress() as bar:
        task = bar.add_task("chunks", total=len(video_chunks(pipe.config)) * -(-len(videos) // batch))
        for start in range(0, len(videos), batch):
            together = videos[start : start + batch]
            prompts, seeds = [video.prompt for video in together], [video.seed for video in together]
            stream = pipe.stream(prompts, seed=seeds, embeddings=encoded, **starts)
            paths = [manifest.folder / video.name for video in together]
            write_videos(stream, paths, pipe.config.video.fps, lambda: bar.advance(task))
            for video, path in zip(together, paths, strict=True):
                manifest.add(video)
                print(path, flush=True)


def write_videos(
    stream: Iterable[generate.Chunk], paths: Sequence[pathlib.Path], fps: int, advance: Callable[[], None]
) -> None:
    """Writes a batch of videos while it is made: one file a video, each complete or absent."""
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Mp4Writer(path, fps)) for path in paths]
        for chunk in generate.fetch(stream):
            for writer, video in zip(writers, chunk.frames, strict=True):
                writer.add(video)
            advance()
