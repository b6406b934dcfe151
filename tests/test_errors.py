"""Bad input ends in one line that names what is wrong, exit code 2, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
import small

from lf_jax import cli
from lf_jax.video import write_mp4


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(good, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def not_encoded(monkeypatch):
    """What is wrong must be found before the text encoder, the largest part, has been loaded and has run."""
    monkeypatch.setattr("lf_jax.pipeline.encode_prompts", lambda *_: pytest.fail("prompts were encoded before"))


def fails(capsys, *words) -> str:
    """The one line that the command ends in; what was printed before it (the config) is not looked at."""
    assert cli.main([str(word) for word in words]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    message = captured.err.splitlines()[-1]
    assert message.startswith(f"lf-jax {words[0]}: error: ")
    return message


def sample(model, tmp_path, *words):
    return ("sample", "--model", model, "--prompt", "one", "--output", tmp_path / "out", *words)


def untouched(tmp_path) -> bool:
    folder = tmp_path / "out"
    return not folder.exists() or not list(folder.iterdir())


def test_unknown_command(capsys):
    assert cli.main(["smaple"]) == cli.BAD_INPUT
    assert capsys.readouterr().err == f"unknown command 'smaple'; the commands are {', '.join(cli.COMMANDS)}\n"


def test_unknown_field(capsys):
    assert cli.main(["plan", "--config", "tiny", "--rollout.shfit", "8"]) == cli.BAD_INPUT
    assert "--rollout.shfit" in capsys.readouterr().err


def test_missing_option(capsys, tmp_path):
    assert cli.main(["sample", "--prompt", "one", "--output", str(tmp_path)]) == cli.BAD_INPUT
    assert "--model" in capsys.readouterr().err


def test_value_out_of_range(capsys):
    assert cli.main(["plan", "--config", "tiny", "--sparsity.target", "1.5"]) == cli.BAD_INPUT
    assert "self.target=1.5 must lie in [0, 1)" in capsys.readouterr().err


def test_unknown_preset(capsys, tmp_path):
    assert "'tinny' is neither a Python file nor a preset; the presets are light_forcing" in fails(
        capsys, "plan", "--config", "tinny"
    )
    assert "model 'tinny' is neither a folder nor a preset" in fails(capsys, *sample("tinny", tmp_path))


def test_wrong_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty is not a converted folder: it has none of dit/config.json" in fails(
        capsys, *sample(tmp_path / "empty", tmp_path)
    )
    (tmp_path / "file.pt").write_bytes(b"x")
    assert "file.pt is a file; `lf-jax convert` makes a folder" in fails(capsys, *sample(tmp_path / "file.pt", tmp_path))
    assert untouched(tmp_path)


def test_missing_component(capsys, tmp_path, model):
    shutil.rmtree(model / "vae")
    message = fails(capsys, *sample(model, tmp_path))
    assert "model has no vae, only dit, text: `lf-jax convert` adds it" in message
    shutil.rmtree(model / "text")
    assert "model has no vae, only dit" in fails(capsys, "stream", *sample(model, tmp_path, "--overwrite")[1:])
    assert untouched(tmp_path)


def test_missing_tokenizer(capsys, tmp_path, model):
    (model / "text" / "spiece.model").unlink()
    assert "spiece.model" in fails(capsys, *sample(model, tmp_path))


@pytest.mark.parametrize("component", ["dit", "vae", "text"])
def test_truncated_weights(capsys, tmp_path, model, component, not_encoded):
    file = model / component / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    message = fails(capsys, *sample(model, tmp_path))
    assert f"{file} is truncated: expected" in message
    assert untouched(tmp_path)


def test_weights_of_another_size(capsys, tmp_path, model, not_encoded):
    path = model / "dit" / "config.json"
    text = json.loads(path.read_text())
    text["config"]["ffn_dim"] = 96
    path.write_text(json.dumps(text))
    assert cli.main([str(word) for word in sample(model, tmp_path)]) == cli.BAD_INPUT
    message = capsys.readouterr().err
    assert "does not fit the config beside it" in message and "expected [2, 64, 96], received [2, 64, 128]" in message


def test_dimensions_that_the_folder_does_not_have(capsys, tmp_path, good):
    message = fails(capsys, *sample(good, tmp_path, "--model.layers", 3))
    assert f"model.layers=3 but {good} has 2" in message


@pytest.mark.parametrize(
    "frames, rule",
    [
        (80, "nearest that do are 69 or 81"),
        (82, "nearest that do are 81 or 93"),
        (1, "nearest that do are 9"),
        (0, "must be positive"),
    ],
)
def test_frame_count_that_does_not_fit(capsys, tmp_path, good, frames, rule):
    message = fails(capsys, *sample(good, tmp_path, "--num-frames", frames))
    assert message.endswith(rule) and f"num_frames={frames}" in message
    assert untouched(tmp_path)


def test_unwritable_target(capsys, tmp_path, good):
    (tmp_path / "out").write_text("a file is in the way")
    assert "--output" in (message := fails(capsys, *sample(good, tmp_path))) and "cannot be written" in message
    words = ("--model", good, "--prompt", "one", "--output", tmp_path / "out" / "a.mp4")
    assert "cannot be written" in fails(capsys, "stream", *words)
    assert "cannot be written" in fails(capsys, "encode", *words)
    state = ("--output", tmp_path / "a.mp4", "--state-out", tmp_path / "out" / "a.state")
    assert f"--state-out {tmp_path / 'out'} cannot be written" in fails(capsys, "stream", *words[:4], *state)


def test_prompts(capsys, tmp_path, good):
    (tmp_path / "empty.txt").write_text("\n \n")
    words = ("sample", "--model", good, "--output", tmp_path / "out")
    assert "no prompts: --prompts" in fails(capsys, *words, "--prompts", tmp_path / "empty.txt")
    assert "no prompts: --prompt holds none" in fails(capsys, *words)
    assert "nowhere.txt: No such file" in fails(capsys, *words, "--prompts", tmp_path / "nowhere.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    assert "not a text file in UTF-8" in fails(capsys, *words, "--prompts", tmp_path / "bad.txt")


def test_embeddings(capsys, tmp_path, good):
    assert "no file at" in fails(capsys, *sample(good, tmp_path, "--embeddings", tmp_path / "nowhere"))
    (tmp_path / "bad").write_bytes(b"123")
    assert "damaged or not a safetensors file" in fails(capsys, *sample(good, tmp_path, "--embeddings", tmp_path / "bad"))


def test_initial_frames(capsys, tmp_path, good):
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png is not an image or a video" in fails(
        capsys,
        *sample(
            good, tmp_path, "--initial-image", tmp_path / "text.png", "--rollout.independent-first-frame", "--num-frames", 25
        ),
    )
    pipe = small.pipe()
    write_mp4(tmp_path / "a.mp4", pipe("one", num_frames=9)[0], 16)
    message = fails(capsys, *sample(good, tmp_path, "--initial-video", tmp_path / "a.mp4", "--num-frames", 9))
    assert "9 initial frames leave nothing to generate" in message


def test_states(capsys, tmp_path, good):
    words = ("stream", "--model", good, "--prompt", "one", "--output", tmp_path / "a.mp4")
    assert "no such file" in fails(capsys, *words, "--state-in", tmp_path / "nowhere")
    (tmp_path / "bad").write_bytes(b"123")
    assert "not a safetensors file" in fails(capsys, *words, "--state-in", tmp_path / "bad")
    assert cli.main([str(word) for word in (*words, "--stop-at", 9, "--state-out", tmp_path / "a.state")]) == 0
    capsys.readouterr()
    assert "a.mp4 exists; --overwrite replaces it" in fails(capsys, *words)
    resumed = (*words[:-1], tmp_path / "b.mp4", "--state-in", tmp_path / "a.state")
    assert "state was made with other settings" in fails(capsys, *resumed, "--cache.window", 6)
    assert "--seed 3 has no use with --state-in" in fails(capsys, *resumed, "--seed", 3)
    assert "--stop-at 9 must lie within the 33 frames of the video, after the 9" in fails(capsys, *resumed, "--stop-at", 9)
    longer = fails(capsys, *resumed, "--num-frames", 45)
    assert "num_frames=45 but state was planned for 33 frames" in longer
    os.truncate(tmp_path / "a.state", 5000)
    assert "truncated" in fails(capsys, *resumed)
    assert not (tmp_path / "b.mp4").exists()


def test_damaged_manifest(capsys, tmp_path, good):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    assert "manifest.json is not a manifest of this program" in fails(capsys, *sample(good, tmp_path))


def test_named_implementation_that_cannot_run(capsys, good, tmp_path, not_encoded):
    message = fails(capsys, "doctor", "--config", "light_forcing_1_3b", "--sparsity.implementation", "quantum")
    assert "sparsity.implementation='quantum' must be one of" in message
    message = fails(capsys, "doctor", "--config", "self_forcing_1_3b", "--sparsity.implementation", "quantum")
    assert "sparsity.implementation='quantum' must be one of cudnn, xla, or None" in message
    message = fails(capsys, *sample(good, tmp_path, "--sparsity.implementation", "triton"))
    assert "sparsity.implementation='triton': " in message
    assert untouched(tmp_path)


def test_unknown_policy(capsys, good, tmp_path, not_encoded):
    message = fails(capsys, *sample(good, tmp_path, "--sparsity.policy", "best"))
    assert "policy='best' must be 'dense', a function, or one of light_forcing" in message
    assert "policy='best' must be" in fails(capsys, "doctor", "--config", "tiny", "--sparsity.policy", "best")
    assert "policy='best' must be" in fails(capsys, "bench", "--model", "tiny", "--sparsity.policy", "best")
    assert untouched(tmp_path)


def test_options_without_use(capsys, good, tmp_path):
    assert "(7) has no use" in fails(capsys, *sample(good, tmp_path, "--weights-seed", 7))
    negative = ("--video.negative-prompt", "blurry")
    message = fails(capsys, *sample(good, tmp_path, *negative))
    assert "--video.negative-prompt 'blurry' has no use at --rollout.guidance-scale 1" in message
    stream = ("stream", "--model", good, "--prompt", "one", "--output", tmp_path / "a.mp4")
    assert "--stop-at 0 must lie within the 33 frames" in fails(capsys, *stream, "--stop-at", 0)
    assert "--stop-at 45 must lie within the 33 frames" in fails(capsys, *stream, "--stop-at", 45)
    assert untouched(tmp_path)
    guided = cli.parse("plan", ["--config", "tiny", *negative, "--rollout.sampler", "euler", "--rollout.guidance-scale", "3"])
    assert guided.settings.video.negative_prompt == "blurry"


def test_a_preset_may_have_a_negative_prompt_without_guidance(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from lf_jax.config import *\nCONFIG = Config(video=Video(negative_prompt='blurry'))\n")
    assert cli.parse("plan", ["--config", str(file)]).settings.video.negative_prompt == "blurry"


def test_conversion_of_what_is_not_a_checkpoint(capsys, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"123")
    message = fails(capsys, "convert", "wan_vae", tmp_path / "a.safetensors", tmp_path / "out")
    assert "a.safetensors is not a safetensors file" in message
    assert not (tmp_path / "out").exists()


def test_the_console_sees_one_line(tmp_path):
    """As a user runs it: another process, no terminal."""
    command = [sys.executable, "-m", "lf_jax", "plan", "--model", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "nowhere' is neither a folder nor a preset" in done.stderr


def test_out_of_memory_points_to_the_plan(capsys, monkeypatch, good, tmp_path):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 9 bytes")

    monkeypatch.setattr("lf_jax.loading.Source.dit", exhausted)
    assert cli.main([str(word) for word in sample(good, tmp_path)]) == cli.FAILED
    assert "the device is out of memory; `lf-jax plan` shows" in capsys.readouterr().err.splitlines()[-1]
    assert untouched(tmp_path)


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="neither"):
        cli.main(["plan", "--model", str(tmp_path / "nowhere"), "--traceback"])
