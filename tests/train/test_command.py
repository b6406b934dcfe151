"""`lf-jax train`: options, exit codes, signals and the next stage, on the smallest run."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import toy_training as toy

from lf_jax import checkpoint, cli
from lf_jax.commands.train import UNFINISHED
from lf_jax.train import Optimizer

STAGE = """
import dataclasses, os, signal
import toy_training as toy

@dataclasses.dataclass(frozen=True)
class Numbers(toy.Numbers):
    def batch(self, config, step, size):
        if step == 6 and "SIGNAL" in os.environ:
            os.kill(os.getpid(), int(os.environ.pop("SIGNAL")))
        return super().batch(config, step, size)

TRAIN = toy.training(data=Numbers(), steps=20)
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage") / "stage.py"
    path.write_text(STAGE)
    return path


def train(*words) -> int:
    return cli.main(["train", *map(str, words)])


@pytest.fixture(scope="module")
def whole(stage, tmp_path_factory):
    """The model of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert train("--config", stage, "--output", folder) == 0
    return (folder / "model/text/model.safetensors").read_bytes()


def test_any_field_can_be_overridden(stage):
    words = "--steps 5 --optimizers.model.learning-rate 1e-4 --optimizers.model.ema None --objective.noise 0.5 --lora.rank 4"
    more = "--mesh.fsdp 2 --data.seed 3 --init model DIR --rollout.shift 8 --sparsity.policy topk"
    command = cli.parse("train", ["--config", str(stage), "--output", "x", *words.split(), *more.split()])
    plan = command.settings
    assert (plan.steps, plan.objective.noise, plan.lora.rank, plan.mesh.fsdp, plan.data.seed) == (5, 0.5, 4, 2, 3)
    assert plan.optimizers == {"model": Optimizer(learning_rate=1e-4, decay="cosine", warmup=2)}
    assert (plan.init, plan.config.rollout.shift, plan.config.sparsity.policy) == ({"model": "DIR"}, 8.0, "topk")
    assert plan.config.model == toy.MODEL


def test_a_run_prints_its_model_and_tells_of_its_steps(stage, tmp_path, capsys):
    assert train("--config", stage, "--output", tmp_path, "--steps", 3) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [str(tmp_path / "model")]
    assert "step 2/3  model/loss " in shown.err and "samples/s" in shown.err
    assert "learning_rate=0.01" in shown.err and "vocab=512" in shown.err  # the resolved config
    assert checkpoint.components(tmp_path / "model") == ("text",)


def test_minutes_cut_a_run_into_slices(stage, whole, tmp_path, capsys):
    words = ("--config", stage, "--output", tmp_path)
    assert train(*words, "--minutes", 1e-6) == UNFINISHED
    assert "stopped after step 1 of 20; the same command goes on from there" in capsys.readouterr().err
    assert train(*words) == 0
    assert "going on after step 1 of 20" in capsys.readouterr().err
    assert (tmp_path / "model/text/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, cli.INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_stopped_goes_on_bit_by_bit(number, code, stage, whole, tmp_path, capfd):
    paths = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "SIGNAL": str(int(number))}
    words = [sys.executable, "-m", "lf_jax", "train", "--config", str(stage), "--output", str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "model").exists()
    assert ("stopped after step" in done.stderr) == (number == signal.SIGTERM)
    assert train("--config", stage, "--output", tmp_path) == 0
    assert ("going on after step" in capfd.readouterr().err) or number == signal.SIGKILL
    assert (tmp_path / "model/text/model.safetensors").read_bytes() == whole
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and set(range(8, 21, 2)) <= set(steps)


def test_the_next_stage_starts_from_the_model(stage, tmp_path):
    assert train("--config", stage, "--output", tmp_path / "one", "--steps", 1) == 0
    (tmp_path / "two.py").write_text(STAGE.replace("steps=20", f"steps=1, init={{'model': {str(tmp_path / 'one/model')!r}}}"))
    still = ("--optimizers.model.learning-rate", 1e-30, "--optimizers.model.ema", "None")
    assert train("--config", tmp_path / "two.py", "--output", tmp_path / "two", *still) == 0
    one, two = (checkpoint.flatten(checkpoint.load_component(tmp_path / n / "model", "text")[1]) for n in ("one", "two"))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_bad_input_is_one_line(stage, tmp_path, capsys):
    def failed(*words):
        assert train(*words, "--output", tmp_path / "run") == cli.BAD_INPUT
        return capsys.readouterr().err.splitlines()[-1]

    assert "'absent' is neither a Python file nor a preset" in failed("--config", "absent")
    assert "must set TRAIN to an lf_jax.train.Train" in failed("--config", "tiny")
    assert "--minutes 0.0 must be positive" in failed("--config", stage, "--minutes", 0)
    assert "self.batch=5 must be a multiple of" in failed("--config", stage, "--batch", 5, "--accumulate", 2)
    assert train("--config", stage, "--output", tmp_path / "run", "--steps", 1) == 0
    assert "holds a run with another config: seed=7, was 0; give the same" in failed("--config", stage, "--seed", 7)
    assert train() == cli.BAD_INPUT
