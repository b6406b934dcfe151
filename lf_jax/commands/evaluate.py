"""`lf-jax eval`."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated

import tyro

from lf_jax import bench, loading, pipeline, programs, text
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.commands import outputs
from lf_jax.commands.console import note, progress, show_config
from lf_jax.commands.prompts import read_prompts
from lf_jax.commands.sample import make
from lf_jax.config import Config, check
from lf_jax.evaluate import vbench
from lf_jax.evaluate.cases import Case, of_prompts, of_world
from lf_jax.evaluate.policies import DEFAULT, with_policy
from lf_jax.evaluate.store import STRIP, Store
from lf_jax.evaluate.study import DENSE, Study
from lf_jax.evaluate.vmaf import find_ffmpeg
from lf_jax.inputs import check_runs

FACTS = ("device", "versions", "commit", "date")
WORLD = "world"  # in place of a file of prompts


@dataclasses.dataclass(frozen=True)
class Eval:
    """Compare attention policies on the same prompts and noise, or export videos for VBench.

    Every policy makes a video of every prompt, which is scored and compared with the dense one; on the first prompts
    the policies are also run on the dense video's past (--forced). OUTPUT gets a folder a policy, results.json with all
    numbers, and report.html, one page to look at. A second run goes on where the first one stopped, with more prompts or
    policies if they are asked for.

    With --vbench, PROMPT-0.mp4, PROMPT-1.mp4, ... of every prompt are written in place of all that, for VBench to score.

    Example: lf-jax eval --model DIR --prompts world --num 200 --batch 8 --output comparison
             lf-jax eval --model DIR --vbench VBench_full_info.json --samples 5 --output videos
    """

    model: str  # converted folder, or a preset for random weights
    output: pathlib.Path  # folder for everything that is made
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    prompts: str = WORLD  # file with one prompt a line, or `world`: captions of the procedural world
    num: int = 200  # prompts; of a file at most so many, the first ones
    policies: tuple[str, ...] = DEFAULT  # what is compared; dense is always there
    seed: int = 0  # of the first prompt; the next ones have seed + 1, ...
    batch: int = 1  # videos made together
    forced: int = 8  # prompts that are also run teacher-forced, the first ones
    strips: int = 3  # prompts whose film strips are on the page, the first ones
    mp4s: int | None = None  # prompts whose videos are kept as mp4 files, the first ones; without it all
    vmaf: bool = False  # compute VMAF, too, by an ffmpeg with libvmaf; slower than everything else
    vbench: pathlib.Path | None = None  # VBench_full_info.json, or a file with one prompt a line
    samples: int = 5  # videos a prompt with --vbench; 25 where VBench measures temporal flickering
    extended: pathlib.Path | None = None  # with --vbench: what is generated in place of its prompts, line by line
    num_frames: int | None = None  # pixel frames; short for --video.num-frames
    weights_seed: int | None = None  # of a preset's random weights, 0 if not given
    overwrite: bool = False  # replace files that were made with other options
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        config = pipeline.with_frames(self.settings, self.num_frames)
        show_config(config, weights=self.model, output=self.output)
        for name, least in (("batch", 1), ("num", 1), ("forced", 0), ("strips", 0), ("mp4s", 0)):
            given = getattr(self, name)
            check(given is None or given >= least, f"--{name} {given} must be at least {least}")
        check(self.extended is None or self.vbench is not None, f"--extended {self.extended} has no use without --vbench")
        check_runs(config)
        source = loading.find(self.model, config, self.weights_seed)
        source.check("dit", "vae", "text")
        if self.vbench is None:
            self._compare(config, source)
        else:
            self._export(config, source)

    def _compare(self, config: Config, source: loading.Source) -> None:
        page = report_page()
        ffmpeg, reason = find_ffmpeg() if self.vmaf else (None, "")
        check(bool(ffmpeg) == self.vmaf, f"--vmaf: {reason}")
        policies = {name: with_policy(config, name) for name in dict.fromkeys((DENSE, *self.policies))}
        for settings in policies.values():
            check_runs(settings)
        cases = self._cases(config)
        recipes = {name: outputs.recipe_of(settings, self.model, source.seed, ()) for name, settings in policies.items()}
        outputs.check_writable("--output", self.output)
        mp4s = len(cases) if self.mp4s is None else self.mp4s
        store = Store(self.output, cases, recipes, self.overwrite, self.strips, mp4s, self.vmaf)
        with programs.ahead(self._programs(policies, store)):
            pipe, encoded = self._load(config, source, [case.prompt for case in cases])
        study, forced = Study(pipe, policies, cases, encoded, store), min(self.forced, len(cases))
        with progress() as bar:
            videos = len(cases) * len(policies)
            for task, run, total in (
                ("videos", lambda advance: study.videos(self.batch, advance), videos),
                ("teacher-forced", lambda advance: study.forced(forced, advance), forced),
            ):
                note(task)
                row = bar.add_task(task, total=total)
                run(lambda row=row: bar.advance(row))
        found = bench.facts(config)
        facts = {"model": self.model, **{name: found[name] for name in FACTS}, "seeds": f"{cases[0].seed} .. {cases[-1].seed}"}
        results = {"facts": facts, "config": dataclasses.asdict(config), **study.results(forced)}
        shown = {name: [store.path(name, i, STRIP) for i in range(min(self.strips, len(cases)))] for name in policies}
        for name, written in (("results.json", json.dumps(results)), ("report.html", page.render(results, shown))):
            with replaced_file(self.output / name) as partial:
                partial.write_text(written, encoding="utf-8")
            print(self.output / name)

    def _export(self, config: Config, source: loading.Source) -> None:
        entries = vbench.read(self.vbench, self.samples, self.extended)
        videos = [
            outputs.Video(entry.text, self.seed + n, entry.file_name(n)) for entry in entries for n in range(entry.samples)
        ]
        manifest = outputs.Manifest(self.output, outputs.recipe_of(config, self.model, source.seed, ()))
        pending = manifest.pending(videos, self.overwrite)
        if len(pending) < len(videos):
            note(f"{len(videos) - len(pending)} of {len(videos)} videos are complete already")
        if pending:
            pipe, encoded = self._load(config, source, [video.prompt for video in pending])
            make(pipe, pending, self.batch, encoded, manifest)

    def _cases(self, config: Config) -> tuple[Case, ...]:
        if self.prompts == WORLD:
            return of_world(config, self.num, self.seed)
        return of_prompts(read_prompts((), pathlib.Path(self.prompts))[: self.num], self.seed, config)

    def _programs(self, policies: Mapping[str, Config], store: Store) -> programs.Programs:
        """What is compiled for the policies that have videos to make; each has a program of its own for chunks."""
        number = range(len(store.cases))
        wanted = [name for name in policies if not all(store.complete(name, i, name != DENSE) for i in number)]
        found = programs.of_videos(policies[DENSE], self.batch) if wanted else {}
        for name in wanted:
            chunks = programs.of_chunks(policies[name], self.batch)
            found = {**found, **{f"{name}: {chunk}": lower for chunk, lower in chunks.items() if name != DENSE}}
        return found

    def _load(self, config: Config, source: loading.Source, prompts: list[str]) -> tuple[pipeline.Pipeline, text.Embeddings]:
        note(f"encoding {len(set(prompts))} prompts")  # before the transformer takes its place in memory
        encoded = pipeline.encode_prompts(source, pipeline.texts(prompts, config))
        return pipeline.load(self.model, config, seed=self.weights_seed), encoded


def report_page() -> ModuleType:
    """`lf_jax.evaluate.page`. Raises ValueError if what it draws with is not installed."""
    try:
        from lf_jax.evaluate import page
    except ImportError as error:
        raise ValueError(f"the page needs matplotlib and jinja2: pip install 'lf-jax[report]' ({error})") from error
    return page
