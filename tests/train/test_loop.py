"""Whole runs of eight steps: interrupted ones end bit by bit like the one that was not."""

import dataclasses
import json
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import toy_training as toy

import lf_jax
from lf_jax import checkpoint, loading
from lf_jax.config import Vae
from lf_jax.text import tiny_model
from lf_jax.train import Lora, run

VAE = Vae(kind="tiny", widths=(8, 8, 8, 8), temporal=(True, True, False), dtype="float32")
CONFIG = dataclasses.replace(toy.CONFIG, vae=VAE)


class Killed(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Breaking(toy.Numbers):
    """Fails where `at` says; not a field, so that the config is the same."""

    at = None

    def batch(self, config, step, size):
        if step == self.at:
            raise Killed
        return super().batch(config, step, size)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder to start from."""
    folder = tmp_path_factory.mktemp("base")
    for name, part in (("dit", CONFIG.model), ("vae", VAE), ("text", CONFIG.text)):
        checkpoint.save_component(folder, name, part, loading.random_module(part, 5))
    (folder / "text" / "spiece.model").write_bytes(tiny_model())
    checkpoint.save_settings(folder, CONFIG)
    return folder


def plan(base, **changes):
    return toy.training(config=CONFIG, init={"model": str(base)}, data=Breaking(), **changes)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    toy.traced.clear()
    assert run(plan(base), folder) == (8, True)
    assert toy.traced == ["model"]  # one compilation
    return folder


def arrays(folder, step=8):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute() / "checkpoints" / str(step))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder, whole):
    ours, theirs = arrays(folder), arrays(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert (folder / "model/text/model.safetensors").read_bytes() == (whole / "model/text/model.safetensors").read_bytes()


def test_a_run_learns_and_says_so(whole):
    found = lines(whole)
    assert [line["step"] for line in found] == [2, 3, 4, 6, 8]  # every second step, and with every checkpoint
    assert set(found[0]) == {
        "step", "time", "seconds", "samples_per_second", "model/loss", "model/grad_norm", "model/learning_rate"
    }  # fmt: skip
    assert found[-1]["model/loss"] < found[0]["model/loss"]
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [6, 8]  # the newest two of 3, 6 and the end


def test_the_weights_that_a_run_starts_from_are_let_go(tmp_path):
    started, left = [], []

    class Watched(toy.Blocks):
        def build(self, config, load, key):
            networks = super().build(config, load, key)
            started.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(networks.trained))
            return networks

    def count(step, line):
        left.append(sum(weight() is not None for weight in started))

    assert run(toy.training(objective=Watched(), steps=1), tmp_path, report=count).finished
    assert len(started) > 10 and left == [0]


def test_a_killed_run_goes_on_bit_by_bit(base, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Breaking, "at", 5)
    with pytest.raises(Killed):
        run(plan(base), tmp_path)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(Breaking, "at", None)
    notes = []
    assert run(plan(base), tmp_path, note=notes.append) == (8, True)
    assert "going on after step 3 of 8" in notes
    assert_same(tmp_path, whole)
    metrics = [{k: v for k, v in line.items() if k.startswith("model/")} for line in lines(tmp_path)]
    assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4, 6, 8]
    assert metrics == [{k: v for k, v in line.items() if k.startswith("model/")} for line in lines(whole)]


def test_slices_end_with_a_checkpoint_and_a_damaged_one_is_stepped_over(base, whole, tmp_path):
    seen = []
    assert run(plan(base), tmp_path, stop=lambda: len(seen) > 3, report=lambda *said: seen.append(said)) == (5, False)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert [line["step"] for _, line in seen if line] == [2, 3, 4, 5]
    damaged = tmp_path / "checkpoints/5/manifest.ocdbt"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    notes = []
    assert run(plan(base), tmp_path, minutes=1e-9, note=notes.append) == (4, False)  # at least one step a slice
    assert any("5 is damaged" in note for note in notes) and "going on after step 3 of 8" in notes
    assert run(plan(base), tmp_path) == (8, True)
    assert_same(tmp_path, whole)


def test_another_config_is_refused_and_a_longer_run_is_not(base, whole, tmp_path):
    with pytest.raises(ValueError) as failure:
        run(plan(base, seed=3, objective=toy.Sums(scale=2.0)), whole)
    message = str(failure.value)
    assert "objective.scale=2.0, was 1.0" in message and "seed=3, was 0" in message and "batch" not in message
    longer = shutil.copytree(whole, tmp_path / "longer")
    assert run(plan(base, steps=9, log_every=1), longer) == (9, True)
    assert lines(longer)[-1]["step"] == 9


def test_the_average_is_exported_beside_what_was_not_trained(base, whole):
    state, folder = arrays(whole), whole / "model"
    assert checkpoint.components(folder) == ("dit", "vae", "text")
    for name in ("dit", "vae"):
        assert (folder / name / "model.safetensors").read_bytes() == (base / name / "model.safetensors").read_bytes()
    _, text = checkpoint.load_component(folder, "text")
    raw = 0.0
    for name, array in checkpoint.flatten(text).items():
        np.testing.assert_array_equal(array, state[f"model.average.text.{name}"])
        raw += float(jnp.abs(array - state[f"model.parameters.text.{name}"]).max())
    assert raw > 0
    pipe = lf_jax.load(folder)
    assert pipe.config == CONFIG
    assert pipe.encode("a red ball").values.shape == (1, toy.LENGTH, toy.WIDTH)


def test_an_objective_may_settle_the_config_at_the_end(base, tmp_path):
    class Measuring(toy.Sums):
        def finish(self, config, exported, frozen, batch):
            mean = float(batch(0)["sum"].mean())
            assert set(exported) == {"text"} and set(frozen) == {"text"}
            return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, shift=mean))

    train = plan(base, objective=Measuring(), steps=1, save_every=1)
    run(train, tmp_path)
    expected = float(train.data.batch(CONFIG, 0, train.batch)["sum"].mean())
    assert checkpoint.load_config(tmp_path / "model").rollout.shift == pytest.approx(expected)


def test_adapters_are_merged_into_the_model(base, tmp_path):
    run(plan(base, objective=toy.Blocks(), steps=2, lora=Lora(rank=2, alpha=4.0)), tmp_path)
    (_, before), (_, after) = (checkpoint.load_component(folder, "dit") for folder in (base, tmp_path / "model"))
    before, after = checkpoint.flatten(before), checkpoint.flatten(after)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {"blocks.self_attention.qkv.kernel", "blocks.ffn.up.kernel"}
    file = checkpoint.tensorfile.TensorFile(tmp_path / "lora.safetensors")
    a, b = (file.read(f"base_model.model.blocks.1.ffn.0.lora_{f}.weight") for f in "AB")
    np.testing.assert_allclose(after["blocks.ffn.up.kernel"][1], before["blocks.ffn.up.kernel"][1] + 2 * (b @ a).T, atol=1e-6)


def test_what_init_lacks_or_contradicts_is_named(base, tmp_path):
    with pytest.raises(ValueError, match="init 'absent' is neither a model folder nor a preset; the presets are .*tiny"):
        run(dataclasses.replace(plan(base), init={"model": "absent"}), tmp_path / "a")
    wide = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, ffn_dim=32))
    with pytest.raises(ValueError, match="model does not fit its init: text.ffn_dim=32 but 16 in "):
        run(dataclasses.replace(plan(base), config=wide), tmp_path / "b")
    with pytest.raises(ValueError, match="init has no use for techer: the objective loads model"):
        run(dataclasses.replace(plan(base), init={"model": str(base), "techer": "tiny"}), tmp_path / "c")


def test_a_folder_has_one_process(base, tmp_path):
    words = []

    def second(step, line):
        with pytest.raises(ValueError, match=f"another process is training in {tmp_path}"):
            run(plan(base, steps=1), tmp_path)
        words.append(step)

    assert run(plan(base, steps=1), tmp_path, report=second) == (1, True)
    assert words == [1]


def test_a_loss_that_breaks_down_is_not_saved(base, tmp_path):
    with pytest.raises(ValueError, match="training broke down by step 1: model/grad_norm=nan, model/loss=(inf|nan)"):
        run(plan(base, objective=toy.Sums(scale=float("inf")), save_every=1), tmp_path)
    assert list((tmp_path / "checkpoints").glob("*")) == []
