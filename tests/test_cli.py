"""The commands, called as the console script calls them, on the smallest model."""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import small

from lf_jax import checkpoint, cli, plan, presets
from lf_jax.commands import outputs, stream
from lf_jax.video import read_video


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(small.save(tmp_path_factory.mktemp("model")))


def run(*words) -> None:
    assert cli.main([str(word) for word in words]) == 0


def frames(path) -> np.ndarray:
    return read_video(path, 32, 48)


def test_help_names_every_command(capsys):
    run("--help")
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_and_option_explains_itself(name, capsys):
    run(name, "--help")
    shown = capsys.readouterr().out
    assert cli.load_command(name).__doc__.splitlines()[0].split()[0] in shown
    assert "--" in shown


def test_sample_writes_one_file_a_prompt_and_seed(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n\n  \n../up & away: a / b?\n", encoding="utf-8")
    run(
        "sample",
        "--model",
        model,
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out",
        "--samples",
        2,
        "--batch",
        3,
        "--seed",
        5,
    )
    shown = capsys.readouterr()
    names = ["a-red-ball-0000-seed5", "a-red-ball-0000-seed6", "up-away-a-b-0001-seed5", "up-away-a-b-0001-seed6"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*(f"{name}.mp4" for name in names), "manifest.json"}
    assert shown.out.splitlines() == [str(tmp_path / "out" / f"{name}.mp4") for name in names]
    assert "policy='light_forcing'" in shown.err  # the resolved config
    made = frames(tmp_path / "out" / "a-red-ball-0000-seed6.mp4")
    assert made.shape == (33, 32, 48, 3)
    expected = small.pipe()("a red ball", seed=6)[0]
    assert np.corrcoef(made.ravel(), expected.ravel())[0, 1] > 0.9  # through the codec


def test_an_interrupted_batch_goes_on(model, tmp_path, monkeypatch, capsys):
    words = ("sample", "--model", model, "--prompt", "one", "two", "--output", tmp_path)
    add = outputs.Manifest.add

    def interrupt(self, video):
        add(self, video)
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs.Manifest, "add", interrupt)
    assert cli.main([str(word) for word in words]) == cli.INTERRUPTED
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "one-0000-seed0.mp4"]
    first = (tmp_path / "one-0000-seed0.mp4").stat().st_mtime_ns
    monkeypatch.setattr(outputs.Manifest, "add", add)
    run(*words)
    assert "1 of 2 videos are complete already" in capsys.readouterr().err
    assert (tmp_path / "two-0001-seed0.mp4").exists()
    assert (tmp_path / "one-0000-seed0.mp4").stat().st_mtime_ns == first


def test_nothing_is_overwritten_silently(model, tmp_path, capsys):
    words = ["sample", "--model", model, "--prompt", "one", "--output", str(tmp_path), "--num-frames", "9"]
    run(*words)
    before = (tmp_path / "one-0000-seed0.mp4").read_bytes()
    assert cli.main([*words, "--rollout.shift", "8"]) == cli.BAD_INPUT
    assert "one-0000-seed0.mp4 would be replaced" in capsys.readouterr().err
    assert (tmp_path / "one-0000-seed0.mp4").read_bytes() == before
    run(*words, "--rollout.shift", "8", "--overwrite")
    assert (tmp_path / "one-0000-seed0.mp4").read_bytes() != before


def test_encoded_prompts_are_sampled_without_the_encoder(model, tmp_path, capsys):
    file = tmp_path / "prompts.safetensors"
    run("encode", "--model", model, "--prompt", "one", "two", "--output", file)
    for folder, words in (("a", ("--embeddings", file)), ("b", ("--prompt", "one", "two"))):
        run("sample", "--model", model, "--output", tmp_path / folder, "--num-frames", 9, *words)
    for name in ("one-0000-seed0.mp4", "two-0001-seed0.mp4"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "taken as they are" not in capsys.readouterr().err
    run("sample", "--model", "tiny", "--output", tmp_path / "c", "--num-frames", 9, "--embeddings", file)
    assert "taken as they are: there is no text/model.safetensors" in capsys.readouterr().err
    assert cli.main(["encode", "--model", model, "--prompt", "one", "--output", str(file)]) == cli.BAD_INPUT
    assert "--overwrite replaces it" in capsys.readouterr().err


def test_a_stream_stops_and_goes_on(model, tmp_path, capsys):
    shared = ("stream", "--model", model, "--prompt", "one")
    run(*shared, "--output", tmp_path / "whole.mp4")
    run(*shared, "--output", tmp_path / "a.mp4", "--stop-at", 10, "--state-out", tmp_path / "a.state")
    assert "frames     9 ..    20" in capsys.readouterr().err
    run(*shared, "--output", tmp_path / "b.mp4", "--state-in", tmp_path / "a.state", "--stop-at", 33)
    assert "frames    21 ..    32" in capsys.readouterr().err
    whole, start, rest = (frames(tmp_path / name) for name in ("whole.mp4", "a.mp4", "b.mp4"))
    assert (len(whole), len(start), len(rest)) == (33, 21, 12)
    np.testing.assert_array_equal(start, whole[:21])
    assert np.corrcoef(rest.ravel(), whole[21:].ravel())[0, 1] > 0.9  # another key frame, so not the same bytes


def test_a_stream_says_how_long_a_viewer_waits():
    assert stream.summary([(9, 1.5)]) == "first frames after 1.50 s"
    paces = [(9, 1.5), (12, 0.15), (12, 0.16), (12, 0.29)]
    assert stream.summary(paces) == "first frames after 1.50 s, then 60.0 frames/s: a chunk every 160 ms (150 .. 290)"


def test_a_terminated_stream_leaves_nothing(model, tmp_path):
    words = ["stream", "--model", model, "--prompt", "one", "--output", tmp_path / "a.mp4", "--num-frames", "12009"]
    endless = ["--cache.window", "6", "--sparsity.policy", "dense"]
    command = [sys.executable, "-m", "lf_jax", *map(str, words), *endless]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        seen = next(line for line in process.stderr if line.startswith("frames "))
        assert (tmp_path / "a.partial.mp4").exists()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == cli.INTERRUPTED, seen + rest
    assert rest.splitlines()[-1] == "lf-jax stream: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_export_and_convert_are_inverse(model, tmp_path, capsys):
    run("export", "self_forcing", model, tmp_path / "a.safetensors")
    run("convert", "self_forcing", tmp_path / "a.safetensors", tmp_path / "back", "--preset", "tiny")
    assert "has no vae and no text yet" in capsys.readouterr().err
    (_, before), (_, after) = (checkpoint.load_component(folder, "dit") for folder in (model, tmp_path / "back"))
    before, after = checkpoint.flatten(before), checkpoint.flatten(after)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_a_family_of_several_components_needs_a_name(model, tmp_path, capsys):
    assert cli.main(["export", "wan", model, str(tmp_path / "a.safetensors")]) == cli.BAD_INPUT
    assert "name one with --component" in capsys.readouterr().err


def test_any_field_can_be_overridden():
    words = "--config tiny --rollout.shift 8 --rollout.timesteps 900 500 --sparsity.policy topk --sparsity.base None"
    command = cli.parse("plan", [*words.split(), "--cache.window=6"])
    tiny = presets.load("tiny")
    assert command.settings == dataclasses.replace(
        tiny,
        rollout=dataclasses.replace(tiny.rollout, shift=8.0, timesteps=(900.0, 500.0)),
        sparsity=dataclasses.replace(tiny.sparsity, policy="topk", base=None),
        cache=dataclasses.replace(tiny.cache, window=6),
    )


def test_the_config_is_that_of_the_model_or_the_one_named(model):
    assert cli.parse("plan", ["--model", model]).settings == small.CONFIG
    mixed = cli.parse("plan", [f"--model={model}", "--config=longlive_1_3b"]).settings
    assert (mixed.model, mixed.cache.window, mixed.video.num_frames) == (small.CONFIG.model, 12, 477)


def test_plan_counts_what_is_allocated(capsys):
    run("plan", "--config", "light_forcing_1_3b", "--json")
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert found["transformer"]["bytes"] == 2 * 1_418_996_800
    assert found["KV cache"]["bytes"] == 2 * 30 * 21 * 1536 * 1536 * 2
    assert found["means of key blocks"]["bytes"] == 30 * 21 * 24 * 1536 * 4
    assert found["text encoder"]["bytes"] == 2 * 5_680_910_336
    assert found["text keys and values"]["bytes"] == 2 * 30 * 512 * 1536 * 2


def test_plan_agrees_with_a_real_run():
    budget = {item.name: item.bytes for item in plan.memory(small.CONFIG).items}
    pipe = small.pipe()
    *_, last = pipe.stream("one")
    assert budget["transformer"] == plan.size(pipe.model)
    assert budget["autoencoder"] == plan.size(pipe.vae)
    assert budget["decoder cache"] == plan.size(last.state.vae)
    cache = last.state.rollout.cache
    assert budget["KV cache"] == plan.size((cache.k, cache.v))
    assert budget["means of key blocks"] == plan.size(cache.pooled)


def test_plan_says_what_fits(capsys):
    words = ("plan", "--config", "longlive_1_3b", "--batch", 2)
    run(*words, "--memory", 24)
    assert "\nfits into 24.0 GiB" in capsys.readouterr().out
    run(*words, "--memory", 8)
    assert "does NOT fit into 8.0 GiB" in capsys.readouterr().out


def test_the_window_that_fits_fits_exactly():
    longlive, memory = presets.load("longlive_1_3b"), 16 * 2**30
    config = dataclasses.replace(longlive, sparsity=dataclasses.replace(longlive.sparsity, policy="topk"))

    def rollout(window: int) -> int:
        cache = dataclasses.replace(config.cache, window=window)
        return plan.memory(dataclasses.replace(config, cache=cache)).total("rollout")

    fits = plan.memory(config).window_that_fits(memory)
    assert fits > 12
    assert rollout(fits) <= memory < rollout(fits + 1)


def test_doctor_says_what_runs_and_why(capsys):
    run("doctor", "--config", "light_forcing_1_3b", "--model.linears", "fp8", "--json")
    report = json.loads(capsys.readouterr().out)
    sparse, choice, cross, norms, linears, convolutions = report["operations"]
    assert (sparse["name"], sparse["choice"]) == ("self-attention (light_forcing, blocks 64x64)", "xla")
    assert (choice["name"], choice["choice"]) == ("choice of blocks", "xla")
    assert choice["reasons"][0].startswith("triton: needs an NVIDIA GPU")
    assert cross["choice"] == "xla" and cross["reasons"][0].startswith("cudnn: needs an NVIDIA GPU")
    assert (norms["name"], norms["choice"]) == ("norms and rotation", "xla")
    assert (linears["name"], linears["choice"]) == ("float8 linear layers", "xla")
    assert (convolutions["name"], convolutions["choice"]) == ("finest convolutions of the autoencoder", "xla")
    assert convolutions["reasons"][0].startswith("hopper: needs an NVIDIA GPU of compute capability 9.0")
    assert "torch" in report["optional"]
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(report["versions"]) == {"jaxlib", *(re.match(r"[\w-]+", need)[0] for need in project["dependencies"])}
    assert all(report["versions"].values())
    run("doctor")
    assert "self-attention (dense)" in capsys.readouterr().out


def test_file_names_are_safe_and_stable():
    assert outputs.file_name("A red ball, rolling.", 3, 7) == "A-red-ball-rolling-0003-seed7.mp4"
    assert outputs.file_name("../../etc/passwd", 0, 0) == "etc-passwd-0000-seed0.mp4"
    assert outputs.file_name("???", 0, 0) == "video-0000-seed0.mp4"
    assert len(outputs.file_name("球" * 300, 0, 0).encode()) < 200
    assert outputs.file_name("球" * 300, 0, 0).startswith("球球")
