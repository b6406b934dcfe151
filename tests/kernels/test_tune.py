"""The sweep over configurations, the table it makes, and what looks it up. On a machine without a GPU: times are made up."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import platform, runs, timing, tune, tuned, workloads
from pallas_kernels.block_sparse import hopper
from pallas_kernels.block_sparse.hopper_common import Config
from pallas_kernels.block_sparse.types import BlockMap

GPU = platform.Device("gpu", "NVIDIA Test (1)", (9, 0), 1, 132)
FACTS = {"device": "1 x NVIDIA Test (1)", "date": "2026-01-02 03:04", "commit": "abc1234"}
FAKE = """
import os

from pallas_kernels.platform import Device
from pallas_kernels.worker import begin


def device():
    return Device("gpu", "NVIDIA Test (1)", (9, 0), 1, 132)


def describe():
    return "1 x NVIDIA Test (1)"


def measure(workload, names, repeats):
    for name in names:
        begin(name)
        if name == "stages=4":
            os._exit(1)
    times = {name: [1.0 + workload.keep * (1 + abs(int(name[-1]) - 3))] * repeats for name in names}
    return [(name, "too much shared memory" if name == "stages=2" and workload.full else times[name]) for name in names]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables, on a device that has none."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(platform, "device", lambda: GPU)
    tuned.table.cache_clear()
    yield tmp_path
    tuned.table.cache_clear()


@pytest.fixture
def fake(folder, monkeypatch):
    """The device, and kernels whose times are made up, in workers too."""
    (folder / "fake_gpu.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("fake_gpu")
    for name in ("device", "describe"):
        monkeypatch.setattr(platform, name, getattr(module, name))
    monkeypatch.setattr(tune, "measure", module.measure)
    return folder / "nvidia_test_1.json"


def write(folder, configs=(), break_even=()):
    content = {"device": GPU.kind, "configs": list(configs), "break_even": list(break_even)}
    (folder / "nvidia_test_1.json").write_text(json.dumps(content))
    tuned.table.cache_clear()


def entry(config, **change):
    call = dict(direction="forward", block_q=128, block_k=64, head_dim=128, fill=2, length=12) | change
    return {"call": call, "config": config, "measured": FACTS}


def chosen(direction="forward", tokens=4608, block_k=64, width=60):
    return tuned.config(direction, (1, tokens, 12, 128), 128, block_k, width)


def test_a_call_takes_what_was_measured_for_its_class(folder):
    write(folder, [entry({"stages": 3}), entry({"stages": 2, "key_stages": 3}, direction="backward")])
    assert chosen() == {"stages": 3}
    assert chosen("backward") == {"stages": 2, "key_stages": 3}
    assert chosen(width=33) == chosen(width=64) == chosen()  # 2112 and 4096 keys
    for other in (dict(width=32), dict(width=65), dict(block_k=32), dict(tokens=1400), dict(tokens=9216)):
        assert chosen(**other) == {}


def test_without_a_table_calls_take_the_defaults(folder):
    assert tuned.break_even(128, 64) is None
    assert Config(**chosen()) == Config()


def test_elsewhere_nothing_is_known_of_the_device(folder, monkeypatch):
    monkeypatch.setattr(platform, "device", lambda: platform.Device("cpu", "cpu", None, 1))
    assert chosen() == {}


@pytest.mark.parametrize("fill, blocks", [(0, 131), (1, 132), (1, 263), (2, 264), (2, 527), (3, 528)])
def test_how_often_thread_blocks_fill_the_device(fill, blocks):
    assert tuned.Call.of("forward", (1, 128 * blocks, 1, 64), 128, 64, 1, 132).fill == fill


def test_the_table_is_read_once(folder):
    write(folder, [entry({"stages": 3})])
    first = chosen()
    (folder / "nvidia_test_1.json").unlink()
    assert chosen() == first


def test_the_kernels_run_in_the_configuration_of_the_table(folder, monkeypatch):
    write(folder, [entry({"stages": 4}, fill=1), entry({"key_stages": 5}, direction="backward", fill=1)])
    seen = []

    def attend(kernels, q, *_):
        seen.append((kernels.config, kernels.backward_config))
        return q, q

    monkeypatch.setattr(hopper, "attend", attend)
    q = jnp.zeros((1, 128 * 133, 1, 128), jnp.bfloat16)
    index, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1, 133, 60), (1, 1, 133)))
    blocks = BlockMap(index, count, 128, 64)
    hopper.attention(q, q, q, blocks, None, 1.0, None)
    hopper.attention(q, q, q, blocks, None, 1.0, None, config=Config(parts=2))
    assert seen == [(Config(stages=4), Config(key_stages=5)), (Config(parts=2), Config(parts=2))]


def text(*configs, break_even=()):
    return json.dumps({"configs": configs, "break_even": break_even})


BROKEN = {
    "no JSON": ("{", "JSONDecodeError"),
    "no entries": ("{}", "KeyError: 'configs'"),
    "field": (text(entry({"stage": 2})), "unknown field 'stage', expected stages, key_stages"),
    "value": (text(entry({"stages": 0})), "stages=0 must be an integer of at least 1"),
    "call": (text(entry({}, direction="up")), "direction='up' must be one of forward, backward"),
    "class": (text(entry({}, fill=1.5)), "fill=1.5 must be an integer"),
    "share": (text(break_even=[dict(block_q=1, block_k=1, share=0)]), r"share=0 must lie in \(0, 1\]"),
}


@pytest.mark.parametrize("content, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_named(content, message, folder):
    (folder / "nvidia_test_1.json").write_text(content)
    with pytest.raises(ValueError, match=f"nvidia_test_1.json is not a table .*{message}"):
        chosen()


@pytest.mark.parametrize("path", sorted(tuned.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_tables_that_come_with_the_package_can_be_read(path):
    content = tuned.load(path)
    assert tuned.file(content["device"]) == path and tuned.parse(content, path).measured


def test_the_sweep_writes_the_fastest_and_keeps_the_rest(fake, capsys):
    names = ["32256-keep12-128x64-topk", "32256-keep20-128x64-topk", "32256-dense-128x64"]
    write(fake.parent, [entry({"stages": 5}), entry({"stages": 6}, head_dim=64)])
    tune.main(["--workloads", *names, "--repeats", "3", "--selection", "128x64=0.46"])
    printed = capsys.readouterr().out
    content = json.loads(fake.read_text())
    assert [e["call"]["head_dim"] for e in content["configs"]] == [64, 128, 128, 128], "the class measured anew is replaced"
    assert [e["call"]["length"] for e in content["configs"][1:]] == [13, 12, 15]
    for e in content["configs"][1:]:
        assert e["config"] == {"stages": 3}
        assert e["milliseconds"]["stages=4"] == "the process died (exit code 1)"
        assert (e["milliseconds"]["stages=2"] == "too much shared memory") == ("dense" in e["workload"])
        assert len(e["milliseconds"]["stages=3"]) == 3
        assert {"device", "versions", "commit", "date", "timed"} == set(e["measured"])
    assert printed.count("stages=2") == 3 and f"table: {fake}" in printed
    tuned.table.cache_clear()
    assert chosen() == {"stages": 3}
    # Attention to a share s takes 1 + s: selecting costs 0.46, so it pays up to a share of 0.54.
    assert tuned.break_even(128, 64) == pytest.approx(0.54)


def test_the_break_even():
    attention = {0.1: 0.2, 0.3: 0.4, 1.0: 1.0}
    assert tune.break_even(attention, 0.0) == 1.0
    assert tune.break_even(attention, 0.3) == pytest.approx(0.3 + 0.7 * 0.5)
    assert tune.break_even(attention, 5.0) == 0.1, "nothing was measured below"
    assert tune.break_even({0.1: 0.5, 0.2: 0.4, 1.0: 1.0}, 0.6) <= 0.2, "noise"


def test_without_a_gpu_there_is_nothing_to_measure(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "needs an NVIDIA GPU, this is 1 x cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repeats", "0"], "--repeats 0 must be positive"),
        (["--workloads", "32k"], "no workload is called '32k'"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--selection", "128=0.1"], "'128=0.1' must be like 128x64=0.021"),
        (["--selection", "16x16=0.1"], "needs the workloads '32256-*-16x16*'"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert message in capsys.readouterr().err


def test_a_table_of_another_device_is_not_overwritten(fake, capsys):
    fake.write_text(json.dumps({"device": "NVIDIA Other", "configs": [], "break_even": []}))
    with pytest.raises(SystemExit):
        tune.main(["--workloads", "32256-dense-128x64"])
    assert "is of NVIDIA Other, this is NVIDIA Test (1)" in capsys.readouterr().err


def test_the_usual_workloads_stand_for_different_classes():
    calls = [tune.call(work, 132) for work in workloads.named(tune.USUAL)]
    assert len(set(calls)) == len(calls) == 4 * 3 + 4
    blocks = {(call.block_q, call.block_k) for call in calls}
    assert all(sum((c.block_q, c.block_k) == b and c.direction == "backward" for c in calls) == 1 for b in blocks)


def test_what_is_tried_are_fields_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert {name for space in tune.SPACE.values() for name in space} == set(tuned.FIELDS) <= fields
    default = Config()
    for direction, space in tune.SPACE.items():
        assert {name: value for name in space if (value := getattr(default, name)) is not None} in tune.candidates(
            direction
        ).values()


def test_configurations_that_fail_or_are_wrong_are_left_out(folder, monkeypatch):
    work = workloads.SMALL[0]
    right = runs.prepare("xla", workloads.case(work))

    def configured(case, config):
        if config.stages == 4:
            raise RuntimeError("too much\nshared memory")
        return dataclasses.replace(right, head=lambda array, h: right.head(array, h) * (1.5 if config.stages == 3 else 1))

    monkeypatch.setattr(runs, "configured", configured)
    results = dict(tune.measure(work, ["stages=2", "stages=4", "stages=3"], 2))
    assert len(results["stages=2"]) == 2
    assert results["stages=4"] == "RuntimeError: too much shared memory"
    assert results["stages=3"] == "wrong: relative L2 error 5.0e-01"
    monkeypatch.setattr(timing, "device_is_well", lambda: False)
    with pytest.raises(RuntimeError, match="too much"):
        tune.measure(work, ["stages=4"], 1)


@pytest.mark.gpu
def test_a_small_sweep_on_the_gpu(tmp_path, monkeypatch):
    if platform.device().compute_capability != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    work = dataclasses.replace(workloads.WORKLOADS["32256-keep12-128x64-topk"], heads=2, past_frames=2)
    results = dict(tune.measure(work, list(tune.candidates("forward")), 1))
    assert tune.best(results) is not None
    assert not any(isinstance(result, str) and result.startswith("wrong") for result in results.values())
