"""The benchmark measures what it says, in the order of the video, and writes a complete file or none."""

import dataclasses
import json

import numpy as np
import pytest
from small import CONFIG

from lf_jax import bench, bench_attention
from lf_jax.cli import main
from lf_jax.rollout import compiled_chunk
from lf_jax.tokens import Grid


def test_bench_times_every_stage_of_every_chunk(tmp_path, capsys):
    file = tmp_path / "bench.json"
    compiled = compiled_chunk._cache_size()
    assert main(["bench", "--model", "tiny", "--num-frames", "21", "--repeats", "2", "--text", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    stages = [(row["stage"], row["chunk"]) for row in report["rows"]]
    chunks = [(stage, chunk) for chunk in range(2) for stage in bench.STAGES]
    assert stages == [("text", None), *chunks, ("video", None)]
    for row in report["rows"]:
        assert 0 < row["least"] <= row["median"] <= row["most"]
    assert compiled_chunk._cache_size() <= compiled + 1  # at most one more, for all chunks and all repeats
    assert {"device", "versions", "commit", "date", "timed"} <= set(report["facts"])
    assert "denoise" in capsys.readouterr().out


def test_bench_of_the_attention_of_a_layer(tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = ["bench", "--attention", "--model", "tiny", "--num-frames", "33", "--repeats", "2", "--json", str(file)]
    assert main(words) == 0
    report = json.loads(file.read_text())
    stages = [row["stage"] for row in report["rows"]]
    assert stages == ["selection, xla", "attention", "selection + attention", "dense, xla"]
    assert {row["chunk"] for row in report["rows"]} == {2}
    for row in report["rows"]:
        assert 0 < row["least"] <= row["median"] <= row["most"]
    ms, facts = {row["stage"]: row["median"] for row in report["rows"]}, report["facts"]
    assert facts["selection / attention"] == pytest.approx(ms["selection, xla"] / ms["attention"], abs=1e-3)
    assert facts["dense / (selection + attention)"] == pytest.approx(ms["dense, xla"] / ms["selection + attention"], abs=1e-2)
    assert "2 layers a launch; 72 queries, 216 keys" in facts["layer"] and "selection / attention" in capsys.readouterr().out


def test_the_timed_pieces_compute_the_same():
    sparsity = dataclasses.replace(CONFIG.sparsity, keep_frames=99)  # with the budget of everything: dense attention
    config = dataclasses.replace(CONFIG, sparsity=dataclasses.replace(sparsity, target=0.0, base=0.0))
    scene, grid = bench_attention.scene(config), Grid.of(config)
    assert len(scene.lists) == 2 and (scene.lists[0].index != scene.lists[1].index).any()
    pieces = (bench_attention._attend, bench_attention._both, bench_attention._dense)
    alone, both, dense = (bench_attention._layers(piece, scene, grid, config) for piece in pieces)
    for layer in range(2):
        np.testing.assert_allclose(alone[layer], both[layer], atol=1e-6)
    np.testing.assert_allclose(both[0], dense[0], atol=1e-5)  # the dense keys are those of layer 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "--repeats 0 must be positive"),
        (["--attention", "--text"], "--attention has no --text"),
        (["--attention", "--sparsity.policy", "dense"], "config.sparsity.policy='dense' has no block lists to time"),
    ],
)
def test_bench_refuses(words, message, capsys):
    assert main(["bench", "--model", "tiny", *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_keep_compilation_apart():
    row = bench.row("decode", 3, [900.0, 4.0, 2.0, 3.0])
    assert (row.first, row.median, row.least, row.most) == (900.0, 3.0, 2.0, 4.0)
