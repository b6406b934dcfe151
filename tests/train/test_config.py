"""Configs of training: what they refuse, and how they are told apart."""

import dataclasses
import pathlib

import pytest
import toy_training as toy

from lf_jax import presets
from lf_jax.train import Lora, Mesh, Optimizer, Train, load
from lf_jax.train.config import describe, differences

WRONG = [
    (lambda: Optimizer(learning_rate=0.0), "self.learning_rate=0.0 must be positive"),
    (lambda: Optimizer(betas=(0.9, 1.0)), r"self.betas=\(0.9, 1.0\) must lie in"),
    (lambda: Optimizer(clip=0.0), "self.clip=0.0 must be positive, or None"),
    (lambda: Optimizer(ema=1.0), "self.ema=1.0 must lie in"),
    (lambda: Optimizer(ema_start=5), "self.ema_start=5 has no use without ema"),
    (lambda: Optimizer(warmup=-1), "self.warmup=-1 must not be negative"),
    (lambda: Lora(alpha=3.0), "self.alpha=3.0 has no use at self.rank=0"),
    (lambda: Mesh(fsdp=0), "self.fsdp=0 must be positive"),
    (lambda: toy.training(batch=6, accumulate=4), r"self.batch=6 must be a multiple of accumulate x devices = 4"),
    (lambda: toy.training(batch=4, mesh=Mesh(data=2, fsdp=4)), "multiple of accumulate x devices = 8"),
    (lambda: toy.training(steps=0), "steps=0 must be positive"),
    (lambda: toy.training(compute_dtype="int8"), "dtype='int8' must be"),
    (lambda: toy.training(optimizers={"critic": Optimizer()}), "optimizers are for critic; expected one of model or generator"),
    (lambda: dataclasses.replace(toy.training(), objective=3), "self.objective=3 must be an objective"),
    (lambda: toy.training(data=None), "self.data=None must be a source of data"),
]


@pytest.mark.parametrize("make, message", WRONG)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_field_is_compared_but_those_that_may_change():
    plan = toy.training()
    deep = dataclasses.replace(plan.config, rollout=dataclasses.replace(plan.config.rollout, shift=8.0))
    changed = dataclasses.replace(
        plan,
        config=deep,
        objective=toy.Sums(noise=0.5),
        init={"model": "a"},
        optimizers={"model": Optimizer(clip=None, ema=0.9)},
    )
    found = differences(describe(changed), describe(plan))
    assert {"config.rollout.shift=8.0, was 5.0", "objective.noise=0.5, was 0.1", "init.model='a', was absent"} <= set(found)
    assert "optimizers.model.clip=None, was 10.0" in found
    free = dataclasses.replace(plan, steps=99, save_every=1, keep=9, log_every=7)
    assert differences(describe(free), describe(plan)) == []


def test_an_objective_of_another_class_differs():
    @dataclasses.dataclass(frozen=True)
    class Other(toy.Sums):
        pass

    found = differences(describe(toy.training(objective=Other())), describe(toy.training()))
    assert found == ["objective='Other', was 'Sums'"]


def test_a_function_cannot_be_written():
    sparsity = dataclasses.replace(toy.CONFIG.sparsity, policy=lambda *inputs: None)
    with pytest.raises(ValueError, match="config.sparsity.policy=.* cannot be written into a file"):
        describe(toy.training(config=dataclasses.replace(toy.CONFIG, sparsity=sparsity)))


def test_a_training_file_is_a_preset_of_its_model_too(tmp_path):
    path = tmp_path / "stage.py"
    path.write_text("import toy_training\nTRAIN = toy_training.training(steps=5)\n")
    assert isinstance(load(path), Train) and load(path).steps == 5
    assert presets.load(path) == toy.CONFIG
    with pytest.raises(ValueError, match="tiny.py must set TRAIN to an lf_jax.train.Train, received NoneType"):
        load("tiny")


def test_the_stage_in_the_documentation_loads(tmp_path):
    text = (pathlib.Path(__file__).parents[2] / "docs/training.md").read_text()
    (tmp_path / "teacher.py").write_text(text.split("```python\n")[1].split("```")[0])
    plan = load(tmp_path / "teacher.py")
    assert plan.config == presets.load("wan_1_3b") and plan.batch == 64 and plan.main == "model"
