"""The bench of the operations around attention: shapes, errors, the table, and what it says where something cannot run."""

import importlib
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import bench_layers, operations, timing
from pallas_kernels.bench_layers import SIDES, Row, Side
from pallas_kernels.operations import OPERATIONS, SMALL, Conv, FeedForward, Linear, NormModulate, NormRope, Quantise
from pallas_kernels.worker import Worker

NAMES = [operation.name for operation in OPERATIONS]
GATED = Linear(48, 16, 16, "gate")
FLOAT8 = (Linear, FeedForward, Quantise)


@pytest.fixture
def small(monkeypatch):
    """Lets an operation count as small."""
    return lambda operation: monkeypatch.setattr(bench_layers, "SMALL", (operation,))


def test_the_shapes_of_the_models_are_there():
    assert len({*NAMES, *(operation.name for operation in SMALL)}) == len(OPERATIONS) + len(SMALL), "two of one name"
    linear = "4608x1536x4608 4608x1536x1536-quantise-gate 4608x1536x8960-gelu 4608x8960x1536-gate"
    expected = [f"linear-{name}" for name in linear.split()] + ["feed-forward-4608x1536x8960", "quantise-4608x1536"]
    plain = "4608x1536x4608-bf16 4608x1536x1536-bf16-gate 4608x1536x8960-bf16-gelu 4608x8960x1536-bf16-gate"
    expected += [f"linear-{name}" for name in plain.split()] + ["feed-forward-4608x1536x8960-bf16"]
    expected += [f"norm_modulate-4608x1536-{kind}" for kind in ("bf16", "fp8")]
    expected += [f"norm_rope-4608x1536{means}" for means in ("", "-means-64", "-means-128")]
    expected += ["conv-wan-12x512x768-96-96-norm", "conv-light-12x256x384-48-24-upsample", "conv-wan-12x512x768-96-3"]
    assert set(expected) <= set(NAMES)
    assert {type(operation) for operation in SMALL} == {type(operation) for operation in OPERATIONS}


def test_work_of_known_cases():
    assert Linear(2, 3, 5).work == 60 and FeedForward(2, 3, 5).work == 120
    assert Conv("", 2, 3, 5, 7, 11).work == 2 * 27 * 2 * 3 * 5 * 7 * 11
    assert Conv("", 2, 3, 5, 7, 11, upsample=True).work == 2 * 9 * 4 * 2 * 3 * 5 * 7 * 11
    assert [NormModulate(2, 8, quantise).work for quantise in (False, True)] == [64, 48] and Quantise(2, 8).work == 48
    assert NormRope(2, 8, 2).work == 64 + 2 * 2 * 2 * 4  # cosines and sines of two pairs for each token
    assert Linear(10**3, 10**3, 10**3).speed(2.0) == 1.0 and Quantise(10**3, 10**3).speed(3.0) == 1.0


@pytest.mark.parametrize("operation", SMALL, ids=lambda operation: operation.name)
def test_both_sides_are_right(operation):
    given = operations.arguments(operation, 0)
    for outputs, quantised in (
        (
            operation.ours(given, "xla"),
            isinstance(operation, FLOAT8) and not getattr(operation, "plain", False) or getattr(operation, "quantise", False),
        ),
        (operation.xla(given), "fp8" in operation.name or isinstance(operation, Quantise)),
    ):
        error = bench_layers.error(operation, given, outputs)
        assert (0.02 if quantised else 1e-4) < error < (0.07 if quantised else 0.01)


@pytest.mark.parametrize("operation", [GATED, FeedForward(48, 16, 16), Conv("", 3, 4, 8, 8, 8, "residual")], ids=str)
def test_a_residual_hides_no_error(operation):
    given = operations.arguments(operation, 0)
    outputs = given["x" if isinstance(operation, FeedForward) else "residual"]
    assert bench_layers.error(operation, given, outputs) == pytest.approx(1)


def test_an_error_is_that_of_the_worst_output():
    operation = NormRope(48, 16, 2, 16)
    given = operations.arguments(operation, 0)
    heads, means = operation.xla(given)
    assert bench_layers.error(operation, given, (heads, 1.25 * means)) == pytest.approx(0.25, rel=1e-3)


def test_layers_of_a_launch_differ():
    one, two = (operations.arguments(GATED, seed) for seed in range(2))
    assert all(jnp.any(one[name] != two[name]) for name in ("x", "w", "residual"))


def test_sides_are_timed_and_the_stand_in_is_named(small):
    small(GATED)
    ours, xla = bench_layers.measure(GATED, SIDES, repeats=2)
    assert len(ours.rounds) == len(xla.rounds) == 2 and min(ours.rounds + xla.rounds) > 0
    assert ours.note.startswith("XLA stands in: linear with implementation='hopper': needs") and xla.note == ""
    assert ours.error > 0.02 > xla.error


@pytest.mark.gpu
@pytest.mark.parametrize("operation", SMALL, ids=lambda operation: operation.name)
def test_kernels_are_timed_and_right(operation):
    ours, xla = bench_layers.measure(operation, SIDES, repeats=1)
    assert ours.ms > 0 and xla.ms > 0 and max(ours.error, xla.error) < 0.07


def test_full_sizes_refuse_on_a_cpu():
    sides = bench_layers.measure(OPERATIONS[0], SIDES, 1)
    assert bench_layers.row(OPERATIONS[0], sides) == Row(NAMES[0], "TFLOP/s", note=bench_layers.TOO_LARGE)


def broken(self, a, implementation):
    raise RuntimeError("first line\nsecond line")


def test_one_side_that_fails_does_not_stop_the_other(small, monkeypatch):
    small(GATED)
    monkeypatch.setattr(Linear, "ours", broken)
    ours, xla = bench_layers.measure(GATED, SIDES, repeats=1)
    assert (ours.ms, ours.note) == (None, "RuntimeError: first line second line") and xla.ms > 0


def test_a_dead_device_ends_the_process(small, monkeypatch):
    small(GATED)
    monkeypatch.setattr(Linear, "ours", broken)
    monkeypatch.setattr(timing, "device_is_well", lambda: False)
    with pytest.raises(RuntimeError, match="first line"):
        bench_layers.measure(GATED, SIDES, repeats=1)


DEADLY = """
import os

from pallas_kernels.bench_layers import Side
from pallas_kernels.worker import begin


def measure(operation, sides, repeats):
    if "ours" in sides:
        begin("ours")
        os.abort()
    return [Side(name, (3.0, 1.0, 2.0), 0.5) for name in sides]
"""


def test_what_kills_the_process_is_a_note_and_the_other_side_goes_on(tmp_path, monkeypatch):
    (tmp_path / "deadly_layers.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bench_layers, "measure", importlib.import_module("deadly_layers").measure)
    with Worker() as worker:
        row = bench_layers.row_of(worker, GATED, 1)
    assert (row.ours, row.xla, row.ratio, row.error, row.xla_error) == (None, 2.0, None, None, 0.5)
    assert row.note == "ours: the process died (exit code -6)"


def test_a_row_of_the_table():
    sides = [Side("ours", (2.0, 1.0, 4.0), 0.03), Side("XLA", (5.0, 5.0, 6.0), 0.002)]
    row = bench_layers.row(OPERATIONS[0], sides)
    assert (row.ours, row.xla, row.ratio) == (2.0, 5.0, 2.5) and row.speed == OPERATIONS[0].work / 2e9
    figures = "2.0000    5.0000   2.50    33 TFLOP/s  3.0e-02   2.0e-03"
    assert bench_layers.line(row).split() == ["linear-4608x1536x4608", *figures.split()]


def test_the_table_and_the_file_agree(tmp_path, capsys):
    file = tmp_path / "layers.json"
    bench_layers.main(["quantise*", "*-384x128-bf16", "--small", "--repeats", "1", "--json", str(file)])
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    assert [row["operation"] for row in report["rows"]] == ["norm_modulate-384x128-bf16", "quantise-384x128"]
    for row in report["rows"]:
        assert bench_layers.line(Row(**row)) in printed and row["ratio"] == row["xla"] / row["ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["layers.json"]
    assert {"device", "versions", "commit", "date", "timed"} == set(report["facts"])


BAD = {
    "operation": (["linaer*"], "no operation is called 'linaer*'; there are: linear-4608x1536x4608"),
    "repeats": (["--repeats", "0"], "--repeats 0 must be positive"),
    "folder": (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_layers.main(arguments)
    assert message in capsys.readouterr().err
