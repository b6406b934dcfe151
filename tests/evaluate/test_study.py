"""`lf-jax eval` from prompts to the page, on the smallest model: what is made, what a second run leaves alone."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import small

from lf_jax import cli, inputs, loading, world
from lf_jax.commands.evaluate import Eval
from lf_jax.evaluate import study
from lf_jax.evaluate.cases import of_prompts, of_world
from lf_jax.evaluate.policies import names, with_policy
from lf_jax.evaluate.store import Store
from lf_jax.evaluate.vmaf import find_ffmpeg, vmaf
from lf_jax.pipeline import with_frames
from lf_jax.video import read_video

NAMES = ["dense", "full", "light_forcing"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(small.save(tmp_path_factory.mktemp("model")))


def evaluate(model, folder, *words) -> int:
    common = ("eval", "--model", model, "--output", folder, "--batch", 2, "--forced", 1, "--strips", 1)
    return cli.main([str(word) for word in (*common, *words)])


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """An evaluation of two captions of the world."""
    folder = tmp_path_factory.mktemp("evaluation")
    assert evaluate(model, folder, "--num", 2, "--seed", 3, "--policies", *NAMES[1:]) == 0
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_prompts_of_the_world_say_what_their_videos_must_show(results):
    cases = of_world(small.CONFIG, 2, 3)
    assert [(case["prompt"], case["seed"]) for case in results["prompts"]] == [(case.prompt, case.seed) for case in cases]
    assert [case.seed for case in cases] == [3, 4] and all(case.facts == world.parse(case.prompt) for case in cases)
    wide = dataclasses.replace(small.CONFIG, video=dataclasses.replace(small.CONFIG.video, width=128))
    assert of_prompts([cases[0].prompt], 7, wide)[0].facts is None  # no world is four times as wide as high
    assert of_prompts(["A poem about rain"], 7, small.CONFIG)[0].facts is None


def test_latents_are_those_of_sampled_videos(folder, results):
    pipe, prompts = small.pipe(), [case["prompt"] for case in results["prompts"]]
    for name in ("dense", "light_forcing"):
        settings = with_policy(small.CONFIG, name)
        expected = pipe(prompts, seed=[3, 4], sparsity=settings.sparsity)
        for i in range(2):
            recipes = {name: json.loads((folder / name / f"{i:04d}.scores.json").read_text())["stamp"]["recipe"]}
            latents = Store(folder, of_world(small.CONFIG, 2, 3), recipes).latents(name, i)
            assert (study.to_pixels(pipe, settings, latents[None])[0] == expected[i]).all()
            shown = read_video(folder / name / f"{i:04d}.mp4", 32, 48)
            assert shown.shape == (33, 32, 48, 3)
            assert np.corrcoef(shown.ravel(), expected[i].ravel())[0, 1] > 0.9  # through the codec


def test_scores_are_of_those_videos(results):
    pipe, prompts = small.pipe(), [case["prompt"] for case in results["prompts"]]
    dense, sparse = (
        pipe(prompts, seed=[3, 4], sparsity=with_policy(small.CONFIG, name).sparsity) for name in ("dense", "light_forcing")
    )
    for i, notes in enumerate(results["videos"]["light_forcing"]):
        error = ((dense[i].astype(float) - sparse[i]) ** 2).mean((1, 2, 3))
        decibel = np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-9)), 100)
        assert notes["scores"]["psnr"] == pytest.approx(decibel.mean(), rel=1e-4)
        np.testing.assert_allclose(notes["chunks"]["psnr"], [part.mean() for part in np.split(decibel, [9, 21])], rtol=1e-4)
        judged = world.evaluate(world.World(32, 48, 33, 16), sparse[i], world.parse(prompts[i]))
        for name, value in judged.whole().items():
            found = notes["scores"][f"world.{name}"]
            assert found == (None if value is None else pytest.approx(value, rel=1e-5))
        assert judged.colour is not None and len(notes["seconds"]["world.colour"]) == 2
        assert len(notes["seconds"]["brightness"]) == 2  # of 33 frames at 16 a second
    assert "psnr" not in results["videos"]["dense"][0]["scores"]


def test_the_results_say_what_they_were_measured_on(results):
    assert list(results["policies"]) == list(results["summary"]) == NAMES
    assert {"model", "device", "versions", "commit", "date", "seeds"} <= set(results["facts"])
    assert results["facts"]["seeds"] == "3 .. 4"
    assert results["config"]["video"]["num_frames"] == 33 and results["video"]["chunks"] == [3, 3, 3]
    assert results["left_out"] == {"VMAF": "not asked for"}
    assert results["policies"]["full"]["sparsity"]["policy"] == "full"
    for name in NAMES[1:]:
        policy = results["policies"][name]
        assert policy["computed_density"] == pytest.approx(policy["planned_density"], rel=1e-4)
        assert len(results["forced"][name]) == 1 and len(results["videos"][name]) == 2
    psnr = results["summary"]["light_forcing"]["scores"]["psnr"]
    assert psnr["low"] <= psnr["mean"] <= psnr["high"] and psnr["count"] == 2
    assert results["summary"]["full"]["scores"]["psnr"]["mean"] > psnr["mean"]


def test_the_page_needs_nothing_but_itself(folder, results):
    page = (folder / "report.html").read_text()
    links = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']*)", page) + re.findall(r"url\(([^)]*)\)", page)
    assert len(links) >= 3 + 2 + 4 + 2 + 5  # film strips, curves, pictures
    assert all(link.startswith("data:image/") for link in links)
    assert "<script" not in page and "@import" not in page
    for name in NAMES:
        assert f"<td>{name}</td>" in page
    assert results["prompts"][0]["prompt"] in page and results["prompts"][1]["prompt"] not in page  # one film strip each
    assert "VMAF: not asked for" in page and "prefers-color-scheme" not in page and "light dark" in page


def changed(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*")}


def test_a_second_run_makes_what_is_missing(model, folder):
    before = changed(folder)
    (folder / "light_forcing" / "0001.mp4").unlink()
    (folder / "full" / ".0000.safetensors.partial").write_text("of a killed run")
    assert evaluate(model, folder, "--num", 2, "--seed", 3, "--policies", *NAMES[1:], "window", "--forced", 0) == 0
    after = changed(folder)
    made = {name for name in after if after[name] != before.get(name)} - {"full/.0000.safetensors.partial"}
    assert {name for name in made if not name.startswith("window/")} == {
        "light_forcing/0001.mp4",
        "light_forcing/0001.scores.json",
    }
    assert set(json.loads((folder / "results.json").read_text())["policies"]) == {*NAMES, "window"}


def test_latents_are_not_needed_where_nothing_is_missing(model, folder, tmp_path, monkeypatch):
    """So the small files of an evaluation can go to another machine, and the page is drawn there."""
    for path in folder.glob("*/*.json"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    for name in NAMES:
        shutil.copy(folder / name / "0000.jpg", tmp_path / name)
    monkeypatch.setattr(study, "roll_out", lambda *_: pytest.fail("nothing is left to make"))
    words = ("--num", 2, "--seed", 3, "--policies", *NAMES[1:], "--forced", 1, "--mp4s", 0)
    assert evaluate(model, tmp_path, *words) == 0
    assert (tmp_path / "report.html").exists() and not list(tmp_path.glob("*/*.mp4"))
    (tmp_path / "full" / "0000.jpg").unlink()
    monkeypatch.undo()
    assert evaluate(model, tmp_path, *words) == 0  # made again, with the latents it takes
    assert {path.name for path in tmp_path.glob("full/*.jpg")} == {"0000.jpg"}


def test_files_of_other_options_are_not_mixed_in(model, folder, capsys):
    words = ("--num", 2, "--seed", 4, "--policies", "full", "--forced", 0)
    assert evaluate(model, folder, *words) == cli.BAD_INPUT
    assert "dense/0000.scores.json would be replaced, made with other options: --overwrite allows it" in capsys.readouterr().err
    assert evaluate(model, folder, *words, "--overwrite") == 0


WORKER = """
import numpy as np
from lf_jax import config, world
from lf_jax.evaluate.cases import Case
from lf_jax.evaluate.record import record
video = np.zeros((33, 32, 48, 3), np.uint8)
settings = config.Config(video=config.Video(height=32, width=48, num_frames=33))
case = Case("a red circle", 0, world.Facts((world.Thing("red", "circle"),)))
notes = record(video, case, settings, {"scores": {"psnr": np.float32(3)}, "chunks": {}, "seconds": {}}, {}, None)
assert notes["scores"]["psnr"] == 3 and notes["scores"]["world.shape"] == 0, notes
"""


def test_judging_takes_no_device():
    """Each of the processes that judge videos would take a device's memory."""
    subprocess.run([sys.executable, "-c", WORKER], env=os.environ | {"JAX_PLATFORMS": "none at all"}, check=True)


KILLED = """
import os, signal, time
from lf_jax.evaluate.record import workers
pool = workers()
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_process_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        os.kill(worker, 0)
        process.kill()
    for _ in range(100):
        if not pathlib.Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"{worker} is still there")


def test_prompts_from_a_file(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("A poem about rain\n\nRain\n")
    words = ("--prompts", tmp_path / "prompts.txt", "--num", 1, "--policies", "dense", "--forced", 0)
    assert evaluate(model, tmp_path / "out", *words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [case["prompt"] for case in results["prompts"]] == ["A poem about rain"]
    assert set(results["left_out"]) == {"VMAF", "Evaluator of the procedural world", "Teacher-forced measures"}
    assert set(results["summary"]["dense"]["scores"]) == {"flicker"}
    assert "Recall by layer" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policies", "denser"), "policy 'denser' must be one of dense, full"),
        (("--num", 0), "--num 0 must be at least 1"),
        (("--forced", -1), "--forced -1 must be at least 0"),
        (("--extended", "x.txt"), "has no use without --vbench"),
        (("--prompts", "absent.txt"), "absent.txt: No such file"),
        (("--num-frames", 10), "num_frames=10 does not fit"),
    ],
)
def test_bad_input_is_said_before_anything_is_made(model, tmp_path, words, message, capsys):
    assert evaluate(model, tmp_path / "out", *words) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_asks_for_its_extra(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lf_jax.evaluate.page", None)  # as if importing it failed
    monkeypatch.delattr("lf_jax.evaluate.page", raising=False)
    assert evaluate(model, tmp_path / "out", "--num", 1) == cli.BAD_INPUT
    assert "pip install 'lf-jax[report]'" in capsys.readouterr().err


def test_vbench_export(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na red ball, 4k.\n")
    words = ("--vbench", tmp_path / "prompts.txt", "--samples", 2, "--seed", 5)
    assert evaluate(model, tmp_path / "out", *words) == 0
    names = {f"{prompt}-{i}.mp4" for prompt in ("a cat", "a red ball, 4k.") for i in range(2)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"manifest.json"}
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())["videos"]
    assert {(name, video["prompt"], video["seed"]) for name, video in made.items()} == {
        (f"{prompt}-{i}.mp4", prompt, 5 + i) for prompt in ("a cat", "a red ball, 4k.") for i in range(2)
    }
    (tmp_path / "out" / "a cat-1.mp4").unlink()
    capsys.readouterr()
    assert evaluate(model, tmp_path / "out", *words) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out" / "a cat-1.mp4")]
    monkeypatch.setattr(loading.Source, "dit", lambda self: pytest.fail("nothing is left to make"))
    assert evaluate(model, tmp_path / "out", *words) == 0


def test_help_explains_every_option(capsys):
    assert cli.main(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("prompts", "policies", "vbench", "forced")) and Eval.__doc__[:40] in shown


def test_vmaf_where_it_is_there():
    """Only where this machine has an ffmpeg with libvmaf: the real one agrees that a video is like itself."""
    ffmpeg, reason = find_ffmpeg()
    if ffmpeg is None:
        pytest.skip(reason)
    video = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    same, worse = (vmaf(video, other, 16, ffmpeg) for other in (video, video[:, ::-1]))
    assert same.shape == (3,) and same.min() > 95 and worse.max() < 50


def test_the_commands_of_the_page_of_documentation_parse():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    commands = re.findall(r"^lf-jax (eval .*)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        name, *words = shlex.split(command.replace("DIR", "tiny"))
        settings = cli.parse(name, words)
        assert settings.vbench is not None or inputs.video_chunks(with_frames(settings.settings, settings.num_frames))
    for policy in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE):
        assert policy in names()
