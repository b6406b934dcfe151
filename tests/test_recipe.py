"""The recipe of the model that ships: its sizes, the chain of its stages, and all of it once at a size for tests."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

import lf_jax
from lf_jax import attention, checkpoint, cli, loading, plan, presets, train
from lf_jax.checkpoint import component
from lf_jax.config import dtype_of
from lf_jax.evaluate import policies
from lf_jax.tokens import Grid
from lf_jax.train import folders
from pallas_kernels import platform, selection

ROOT = pathlib.Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("recipe", ROOT / "tools/recipe.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

WORLD = presets.load("world")
TRAININGS = [stage.name for stage in recipe.STAGES if stage.words[0] == "train"]
PARTS = [getattr(WORLD, name) for name in loading.COMPONENT_PARTS.values()]


def test_all_weights_together_may_ship():
    assert {dtype_of(part) for part in PARTS} == {jnp.dtype("bfloat16")}
    size = sum(plan.size(component.abstract(part)) for part in PARTS)
    assert 0.9 * recipe.LARGEST < size < 0.97 * recipe.LARGEST  # room for the headers of the files


def test_blocks_suit_a_frame_and_the_kernels_that_run_on_hopper(monkeypatch):
    grid = Grid.of(WORLD)
    assert (grid.frame_tokens, grid.frame_blocks, grid.padded_frame) == (96, 6, 96)
    assert grid.frame_tokens % grid.block_q == 0  # no query block straddles two frames
    device = platform.Device("gpu", "NVIDIA H200", (9, 0), 1, 132)
    monkeypatch.setattr(platform, "device", lambda: device)
    able = attention.implementations(WORLD)
    assert next(name for name, reason in able.items() if reason is None) == "triton"
    assert able["hopper"] == "needs query blocks of 64 or 128, received 32"
    assert selection.api.IMPLEMENTATIONS["triton"].reason(WORLD.model.head_dim, 21, grid.frame_blocks) is None
    dense = dataclasses.replace(WORLD, sparsity=dataclasses.replace(WORLD.sparsity, policy="dense"))
    assert attention.implementations(dense)["cudnn"] is None


def test_four_in_five_key_blocks_are_left_out():
    assert 0.19 < policies.average(policies.densities(WORLD), WORLD) <= 0.2


@pytest.mark.parametrize("name", TRAININGS)
def test_a_stage_trains_the_model_and_starts_from_stages_before_it(name):
    stage = train.load(name)
    for part in loading.COMPONENT_PARTS.values():
        assert getattr(stage.config, part) == getattr(WORLD, part)
    assert stage.config.video == WORLD.video and stage.config.rollout.shift == WORLD.rollout.shift
    before = [f"runs/{one.name}" for one in recipe.STAGES[: [one.name for one in recipe.STAGES].index(name)]]
    for place in [*stage.init.values(), *([stage.data.path] if hasattr(stage.data, "path") else [])]:
        assert place.removesuffix("/model") in before
    assert len({train.load(other).data.seed for other in TRAININGS if other != name} - {stage.data.seed}) >= 3


def test_the_last_stages_are_of_the_config_that_ships():
    assert train.load("world_light_forcing").config == WORLD
    assert train.load("world_dmd").config.rollout == WORLD.rollout and train.load("world_dmd").config.sparsity.dense


@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_at_full_size(name):
    """Shapes only: nothing is computed."""
    stage = train.load(name)
    config, b = stage.config, stage.batch // stage.accumulate
    latents, size = (21, 16, 24, WORLD.vae.channels), (WORLD.video.height, WORLD.video.width)
    batch = {
        "ids": jax.ShapeDtypeStruct((b, WORLD.text.length), jnp.int32),
        "lengths": jax.ShapeDtypeStruct((b,), jnp.int32),
        "video": jax.ShapeDtypeStruct((b, getattr(stage.data, "frames", None) or 17, *size, 3), jnp.float32),
        "latents": jax.ShapeDtypeStruct((b, *latents), jnp.float32),
    }
    if "world_vae" not in name:
        del batch["video"]

    def load(role: str, part: str):
        shapes = component.abstract(getattr(config, loading.COMPONENT_PARTS[part]))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def gradients(batch):
        key = jax.random.key(0)
        networks = stage.objective.build(config, load, key)
        return {
            role: stage.objective.gradients(role, networks.trained, networks.frozen, batch, key, config)
            for role in stage.objective.updates(0)
        }

    found = jax.eval_shape(gradients, batch)
    assert sorted(found) == sorted(stage.optimizers)
    for gradient, metrics in found.values():
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        assert metrics["loss"].shape == ()


def test_what_is_finished_is_skipped_and_minutes_end_a_slice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock, given = [0.0], []

    def execute(command, environment, limit):
        given.append((command[3:], limit))
        clock[0] += 90
        return 0 if "--config" in command else recipe.UNFINISHED

    monkeypatch.setattr(recipe, "execute", execute)
    monkeypatch.setattr(recipe.time, "monotonic", lambda: clock[0])
    names = ("vae_short", "vae", "latents", "teacher", "causal", "dmd", "light_forcing")
    stages = [stage for stage in recipe.STAGES if stage.name.removeprefix("world_") in names]
    second, third = stages[2:4]
    for stage in stages[:2]:
        (stage.folder / "model").mkdir(parents=True)
    assert recipe.run(stages[:4], 4) == recipe.UNFINISHED  # encoding outlasts its time
    assert given == [([*second.words, "--output", "runs/world_latents"], 240.0)]
    second.folder.mkdir()
    (second.folder / "manifest.json").touch()
    assert recipe.run(stages, 4) == recipe.UNFINISHED  # 240, 150, then 60 s are left, and 90 are gone
    assert [words[2] for words, _ in given[1:]] == ["world_teacher", "world_causal", "world_dmd"]
    assert [words[-1] for words, _ in given[1:]] == ["4.00", "2.50", "1.00"] and given[1][1] is None
    assert recipe.run((third,), None) == 0 and given[-1] == ([*third.words, "--output", "runs/world_teacher"], None)
    times = [json.loads(line) for line in recipe.TIMES.read_text().splitlines()]
    assert [one["stage"] for one in times][:2] == ["world_latents", "world_teacher"] and times[0]["seconds"] == 90


def test_a_command_is_killed_at_its_limit_and_told_to_end(tmp_path):
    def execute(program, limit):
        return recipe.execute([sys.executable, "-c", f"import pathlib, signal, sys, time\n{program}"], os.environ, limit)

    assert execute("sys.exit(3)", None) == 3
    assert execute("time.sleep(60)", 0.2) == recipe.UNFINISHED
    ready = tmp_path / "ready"

    def terminate():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # of the terminal's, which the command has too
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    program = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)"
    assert execute(program, 60) == 7
    thread.join()


def test_the_page_has_the_numbers_of_the_files():
    page = (ROOT / "docs/recipe.md").read_text()
    counts = [plan.count(component.abstract(part)) for part in PARTS]
    for number in (*counts, sum(counts)):
        assert f"| {number:,} |" in page
    for name in TRAININGS:
        stage = train.load(name)
        assert f"| `{name}` | {stage.steps} x {stage.batch} |" in page
    assert all(f"`{stage.name}`" in page for stage in recipe.STAGES) and "10,240 videos" in page


# A frame has its 96 tokens and a video 6 latent frames: 2 chunks. What takes time is compilation.
VIDEO = "--video.height 32 --video.width 48 --video.num-frames 11"
NETWORKS = (
    "--model.dim 32 --model.heads 2 --model.ffn-dim 32 --model.layers 1 --model.freq-dim 16 --model.text-dim 16 --text.dim 16 "
    "--text.ffn-dim 16 --text.heads 1 --text.head-dim 16 --text.layers 1 --vae.base 4 --vae.res-blocks 0 --vae.multipliers 1 1 "
    "--vae.temporal True"
)
SMALL = {
    "train": f"{VIDEO} {NETWORKS} --steps 2 --batch 2 --accumulate 1 --log-every 1 --compute-dtype float32",
    "latents": "--items 2 --batch 2",
    "eval": "--num 1 --batch 1 --forced 0 --strips 1",
}
DATA = "--data.world.height 32 --data.world.width 48"
MORE = {
    "world_vae_short": f"{DATA} --data.frames 3 --objective.measured 1",
    "world_vae": f"{DATA} --data.frames 3 --objective.measured 1",
    "world_dmd": DATA,
    "world_light_forcing": DATA,
    "world_eval": "--policies light_forcing",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The whole recipe, its own commands and files, with two steps a stage of networks that learn nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recipe"))
        for stage in recipe.STAGES:
            words = f"{SMALL[stage.words[0]]} {MORE.get(stage.name, '')}".split()
            assert cli.main([*stage.command(None), *words]) == 0, stage.name
            assert stage.finished, stage.name
        recipe.TIMES.write_text("".join(f'{{"stage": "{stage.name}", "seconds": 30}}\n' for stage in recipe.STAGES))
        recipe.assemble()
        yield pathlib.Path.cwd() / "runs"


def test_the_model_is_that_of_the_last_stage(runs):
    last = runs / "world_light_forcing/model"
    for name in ("dit", "vae", "text"):
        assert (runs / "world" / name / component.TENSORS).read_bytes() == (last / name / component.TENSORS).read_bytes()
    config = checkpoint.load_config(runs / "world")
    assert (config.sparsity, config.rollout) == (WORLD.sparsity, WORLD.rollout)
    assert config.vae.mean == checkpoint.load_part(runs / "world_vae/model", "vae").mean != WORLD.vae.mean
    trained = [checkpoint.flatten(checkpoint.load_component(runs / name / "model", "dit")[1]) for name in TRAININGS[2:]]
    for one, other in zip(trained, trained[1:], strict=False):
        assert any((one[key] != other[key]).any() for key in one)


def test_the_card_says_how_it_was_made(runs):
    card = (runs / "world/README.md").read_text()
    for name in TRAININGS:
        plan, stage = train.load(name), json.loads((runs / name / "train.json").read_text())
        assert f"| {name} | 2 | 2 | {plan.seed} | {plan.data.seed} | 0.5 | " in card and stage["steps"] == 2
    assert "in 6 minutes" in card and "on 1 captions of scenes" in card
    results = json.loads((runs / "world_eval/results.json").read_text())
    count = results["summary"]["light_forcing"]["scores"]["world.count"]["mean"]
    assert f"| light_forcing | {100 * count:.1f} (" in card and "| dense, before Light Forcing | " in card


def test_the_model_samples(runs, capsys):
    words = ("--model", runs / "world", "--prompt", "a red circle", "--output", runs / "videos")
    assert cli.main(["sample", *map(str, words)]) == 0
    assert [path.suffix for path in (runs / "videos").glob("*.mp4")] == [".mp4"]
    assert "random weights" not in capsys.readouterr().err


def test_a_preset_has_the_weights_that_come_with_the_package(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    stage = dataclasses.replace(train.load("world_causal"), init={"model": "world"})
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)  # nothing is there, whatever the package has
    assert loading.find("world").folder is None and folders.configure(stage).vae.mean == WORLD.vae.mean
    words = ("sample", "--model", "world", "--prompt", "a red circle", "--output", "videos")
    monkeypatch.setattr(loading, "SHIPPED", runs)
    assert loading.find("tiny").folder is None
    assert cli.main([*words]) == 0 and "random weights" not in capsys.readouterr().err
    assert loading.find("world").folder == runs / "world"
    config, stored = checkpoint.load_config(runs / "world"), checkpoint.load_component(runs / "world", "vae")[1]
    assert lf_jax.load("world").config == config
    for ours, theirs in zip(jax.tree.leaves(lf_jax.load("world").vae), jax.tree.leaves(stored), strict=True):
        assert (ours == theirs).all()
    stage = dataclasses.replace(stage, config=config)
    load = folders.Loader(stage, folders.configure(stage), frozenset({"latents", "ids"}), pytest.fail)
    assert load.config.vae.mean == config.vae.mean
    assert jax.tree.leaves(load("model", "dit"))[0].shape == jax.tree.leaves(lf_jax.load("world").model)[0].shape
    assert cli.main([*words]) == 0 and "complete already" in capsys.readouterr().err
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    assert cli.main([*words, *f"{VIDEO} {NETWORKS}".split()]) == cli.BAD_INPUT  # a video of other weights is not taken for it
    assert "made with other options" in capsys.readouterr().err


def test_a_model_that_is_too_large_does_not_ship(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    monkeypatch.setattr(recipe, "LARGEST", 1000)
    with pytest.raises(ValueError, match="bytes, expected at most 1,000"):
        recipe.assemble()
