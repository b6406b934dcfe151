"""The bench: its workloads, its count of operations, its table, and what it says where something cannot run."""

import contextlib
import dataclasses
import gc
import importlib
import json
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMap, bench, check_block_map, runs, timing, worker, workloads
from pallas_kernels.workloads import Workload

RAGGED = Workload(0.5, 16, 16, frame_tokens=40, past_frames=2, chunk_frames=1, heads=2, head_dim=32, dtype="float32")
FORMS = {
    "topk": RAGGED,
    "random": dataclasses.replace(RAGGED, lists="random"),
    "full": dataclasses.replace(RAGGED, lists="full", keep=1.0),
    "whole frames": dataclasses.replace(RAGGED, frame_tokens=32),
    "no past": dataclasses.replace(RAGGED, past_frames=0),
    "batch": dataclasses.replace(RAGGED, batch=2),
    "backward": dataclasses.replace(RAGGED, backward=True),
}
forms = pytest.mark.parametrize("workload", FORMS.values(), ids=FORMS)


@forms
def test_lists_of_a_workload_are_valid(workload):
    case = workloads.case(workload)
    check_block_map(case.blocks, workload.key_blocks)
    assert case.blocks.count.tolist() == np.full(case.blocks.count.shape, workload.width).tolist()
    keys, values = case.all_keys()
    assert keys.shape == values.shape == (workload.batch, workload.key_blocks * 16, 2, 32)


def test_lists_name_the_blocks_with_the_best_mean_keys():
    work = RAGGED
    case = workloads.case(work)
    keys = np.asarray(case.all_keys()[0])[0, :, 1]
    frames = keys.reshape(3, 48, 32)
    means = [frame[i : min(i + 16, 40)].mean(0) for frame in frames for i in (0, 16, 32)]
    query = np.asarray(case.q)[0, 32:40, 1].mean(0)  # the last query block is short
    best = np.argsort([-query @ mean for mean in means], kind="stable")[: work.width]
    assert case.blocks.index[0, 1, 2].tolist() == sorted(best.tolist(), key=lambda block: (block % 3 == 2, block))


def test_operations_of_a_known_case():
    """Three query blocks of 16, 16 and 8 rows; frames of 40 tokens, so blocks 2, 5 and 8 have 8 live tokens."""
    case = workloads.case(dataclasses.replace(RAGGED, heads=1))
    index = jnp.array([[[[0, 2, 5, 7], [8, 1, 0, 0], [3, 4, 6, 2]]]], jnp.int32)
    count = jnp.array([[[4, 1, 3]]], jnp.int32)
    case = dataclasses.replace(case, blocks=BlockMap(index, count, 16, 16))
    pairs = 16 * (16 + 8 + 8 + 16) + 16 * 8 + 8 * (16 + 16 + 16)
    assert case.flops() == 4 * 32 * pairs
    gradients = dataclasses.replace(case, workload=dataclasses.replace(case.workload, backward=True))
    assert gradients.flops() == 10 * 32 * pairs


def test_operations_of_the_dense_workload():
    dense = workloads.WORKLOADS["32256-dense-128x128"]
    small = dataclasses.replace(dense, heads=1, head_dim=2)
    assert workloads.case(small).flops() * 12 * 64 == 4 * 4608 * 32256 * 12 * 128


def test_the_workloads_of_the_issue_are_there():
    names = [f"32256-keep{keep}-{tile}" for keep in (20, 12) for tile in ("128x128", "128x64", "128x32", "64x64")]
    names += ["18432-keep12-128x64", "32760-keep12-128x32", "backward-18432-keep12-128x64"]
    names = [f"{name}-{lists}" for name in names for lists in ("topk", "random")] + ["32256-dense-128x128"]
    assert set(names) <= set(workloads.WORKLOADS)
    every = [*workloads.FORWARD, *workloads.BACKWARD, *workloads.TUNING, *workloads.SMALL]
    assert len(workloads.WORKLOADS) == len(every), "two workloads of one name"
    for work in workloads.FORWARD:
        assert (work.batch, work.heads, work.head_dim, work.dtype) == (1, 12, 128, "bfloat16")
        assert work.queries == (4680 if work.frame_tokens == 1560 else 4608)


def test_a_launch_is_some_calls_one_after_the_other():
    program = jax.jit(runs.repeated(lambda x: (jnp.sin(x),)))
    x = jnp.arange(3.0)
    text = program.lower((x,)).as_text()
    assert text.count("stablehlo.sine") == text.count("stablehlo.optimization_barrier") == runs.CALLS
    assert [outputs[0].tolist() for outputs in program((x,))] == [jnp.sin(x).tolist()] * runs.CALLS


@pytest.mark.gpu
def test_the_compiler_does_not_make_one_of_equal_calls():
    program = jax.jit(runs.repeated(lambda x: (jnp.sin(x),)))  # XLA for the CPU does
    assert program.lower((jnp.arange(3.0),)).compile().as_text().count("sine(") == runs.CALLS


def test_blocks_with_dead_tokens_come_last_as_selection_lists_them():
    blocks = workloads.case(RAGGED).blocks
    ends = blocks.index % RAGGED.frame_blocks == RAGGED.frame_blocks - 1
    behind = np.arange(RAGGED.width) >= np.asarray(blocks.whole)[..., None]
    assert (np.asarray(ends) == behind).all() and behind.any()


@forms
def test_xla_and_the_reference_are_timed_and_right(workload):
    rows = bench.measure(workload, ("xla", "reference"), repeats=2)
    for row in rows:
        assert 0 < row.least <= row.ms <= row.most and row.note == "program"
        assert row.tflops == pytest.approx(workloads.case(workload).flops() / row.ms / 1e9)
        assert row.error < 1e-5


def test_an_error_is_that_of_the_worst_head_and_output(monkeypatch):
    prepare = runs.prepare

    def spoilt(name, case):
        run = prepare(name, case)
        return dataclasses.replace(run, head=lambda array, h: run.head(array, h) * (1.25 if h == 1 else 1))

    monkeypatch.setattr(runs, "prepare", spoilt)
    (row,) = bench.measure(RAGGED, ("xla",), repeats=1)
    assert row.error == pytest.approx(0.25, rel=1e-3)


def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.delitem(sys.modules, "pallas_kernels.peers", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = bench.measure(RAGGED, ("hopper", "cudnn", "flex", "xla"), repeats=1)
    assert [row.implementation for row in rows] == ["hopper", "cudnn", "flex", "xla"]
    assert [row.ms is None for row in rows] == [True, True, True, False]
    assert "hopper" in rows[0].note and "needs" in rows[0].note
    assert rows[1].note == runs.DENSE_ONLY
    assert rows[2].note.startswith("torch is not installed")


def test_a_failure_while_compiling_is_a_row(monkeypatch):
    def broken(name, case):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(runs, "_peer", broken)
    (row,) = bench.measure(RAGGED, ("fa4",), repeats=1)
    assert row.ms is None and row.note == "RuntimeError: first line second line"


DEADLY = """
import os

from pallas_kernels import bench
from pallas_kernels.worker import begin


def measure(workload, implementations, repeats):
    if "hopper" in implementations:
        begin("hopper")
        os.abort()
    begin("xla")
    if "triton" in implementations:
        begin("triton")
        raise MemoryError("lost\\nthe device")
    return [bench.Row(workload.name, name, 1.0) for name in implementations]
"""


def test_what_kills_the_process_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bench, "measure", importlib.import_module("deadly").measure)
    with worker.Worker() as process:
        rows = bench.rows_of(process, RAGGED, ["xla", "hopper", "triton", "reference"], 1)
    assert [row.implementation for row in rows] == ["xla", "hopper", "triton", "reference"]
    assert [row.note for row in rows] == ["", "the process died (exit code -6)", "MemoryError: lost the device", ""]


def test_a_dead_device_ends_the_process(monkeypatch):
    """A row would say that the next implementation failed, too."""
    monkeypatch.setattr(runs, "_peer", lambda name, case: 1 / 0)
    monkeypatch.setattr(timing, "device_is_well", lambda: False)
    with pytest.raises(ZeroDivisionError):
        bench.measure(RAGGED, ("fa4",), repeats=1)


def test_the_table_and_the_file_agree(tmp_path, capsys):
    file = tmp_path / "bench.json"
    small = [work.name for work in workloads.SMALL]
    bench.main(["--implementations", "xla", "cudnn", "--workloads", "*120-*", "--repeats", "1", "--json", str(file)])
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert [(row["workload"], row["implementation"]) for row in report["rows"]] == [
        (name, implementation) for name in small for implementation in ("xla", "cudnn")
    ]
    for row in report["rows"]:
        assert (bench.line(bench.Row(**row)) in printed) == (row["implementation"] == "xla"), "cuDNN knows no lists"
        assert (row["note"] == runs.DENSE_ONLY) == (row["implementation"] == "cudnn")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert {"device", "versions", "commit", "date", "timed"} == set(report["facts"])
    assert f"device: {report['facts']['device']}" in printed and "jax " in report["facts"]["versions"]


BAD = {
    "implementation": (["--implementations", "cuddn"], "invalid choice: 'cuddn'"),
    "workload": (["--workloads", "32k"], "no workload is called '32k'; there are: 32256-keep20"),
    "repeats": (["--repeats", "0"], "--repeats 0 must be positive"),
    "folder": (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation 'hoper' must be one of hopper, triton"):
        runs.prepare("hoper", workloads.case(RAGGED))


@pytest.mark.parametrize("fields", [dict(lists="best"), dict(keep=0.0), dict(keep=1.0), dict(lists="full")], ids=str)
def test_bad_workloads_are_named(fields):
    with pytest.raises(ValueError, match="self.lists|self.keep"):
        dataclasses.replace(RAGGED, **fields)


@pytest.mark.torch
@forms
def test_flex_attention_is_given_the_same_lists(workload):
    pytest.importorskip("torch")
    from pallas_kernels import peers

    case = workloads.case(workload)
    mask = peers.block_mask(case, device="cpu")
    index, count = np.asarray(case.blocks.index), np.asarray(case.blocks.count)
    listed = np.zeros((*index.shape[:3], workload.key_blocks), bool)
    for at in np.ndindex(*count.shape):
        listed[at][index[at][: count[at]]] = True
    assert (mask.to_dense().numpy().astype(bool) == listed).all()
    dead = workload.padded & (np.arange(workload.key_blocks) % workload.frame_blocks == workload.frame_blocks - 1)
    assert (mask.kv_num_blocks.numpy() == (listed & dead).sum(-1)).all()
    assert (mask.full_kv_num_blocks.numpy() == (listed & ~dead).sum(-1)).all()
    tokens = np.arange(workload.key_blocks * workload.block_k)
    live = [bool(mask.mask_mod(0, 0, 0, int(token))) for token in tokens]
    assert sum(live) == workload.keys and live == (tokens % workload.padded_frame < workload.frame_tokens).tolist()


@pytest.mark.torch
@forms
def test_flash_attention_is_given_the_lists_of_the_keys(workload):
    pytest.importorskip("torch")
    from pallas_kernels import peers

    case = workloads.case(workload)
    lists, lengths = peers.transposed(case)
    index, count = np.asarray(case.blocks.index), np.asarray(case.blocks.count)
    assert lists.dtype == lengths.dtype == np.int32
    assert lists.shape == (*count.shape[:2], workload.key_blocks, count.shape[2])
    for b, h, key in np.ndindex(*lengths.shape):
        naming = [i for i in range(count.shape[2]) if key in index[b, h, i, : count[b, h, i]]]
        assert lists[b, h, key, : lengths[b, h, key]].tolist() == naming


@pytest.mark.torch
def test_a_graph_keeps_the_tensors_that_it_reads(monkeypatch):
    """CUDA graphs hold addresses only: freed, the memory is another's, or nobody's, at the next replay."""
    torch = pytest.importorskip("torch")
    from pallas_kernels import peers

    class Graph:
        replay = staticmethod(lambda: output.fill_(1))

    output, stream = torch.zeros(2), types.SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def prepared():
        inputs = torch.ones(2)
        return weakref.ref(inputs), *peers._captured(lambda: (output, inputs)[:1], stream)

    inputs, launch, launched, calls = prepared()
    gc.collect()
    assert (launched, calls) == ("CUDA graph", runs.CALLS) and inputs() is not None
    assert launch()[0].tolist() == [1, 1]
    del launch
    gc.collect()
    assert inputs() is None


@pytest.mark.torch
def test_numbers_reach_torch_unchanged(monkeypatch):
    torch = pytest.importorskip("torch")
    from pallas_kernels import peers

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    values = np.array([[1.5, -2.25], [0.0, 3e38]])
    for dtype in (jnp.bfloat16, jnp.float32, jnp.int32):
        array = jnp.asarray(values, dtype) if dtype != jnp.int32 else jnp.asarray([[1, -2], [3, 4]], dtype)
        assert peers._tensor(array).double().numpy().tolist() == np.asarray(array.astype(jnp.float32)).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hopper", "triton", "xla", "cudnn", "sdpa", "flex", "fa4"])
def test_what_runs_on_a_gpu_is_right(name):
    """Every implementation that is there, on a workload that all of them can run."""
    work = Workload(1.0, 128, 128, "full", frame_tokens=256, past_frames=2, heads=2)
    (row,) = bench.measure(work, (name,), repeats=1)
    if row.ms is None:
        pytest.skip(row.note)
    assert row.error < 5e-3
