"""The benchmark measures what it says, in the order of the video, and writes a complete file or none."""

import dataclasses
import json

import numpy as np
import pytest
import small
from small import CONFIG

from lf_jax import bench, bench_attention
from lf_jax.bench import stages, video
from lf_jax.chunk import compiled_chunk
from lf_jax.cli import main
from lf_jax.tokens import Grid


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(small.save(tmp_path_factory.mktemp("model")))


def test_bench_times_every_stage_of_every_chunk(model, tmp_path, capsys):
    file = tmp_path / "bench.json"
    compiled = compiled_chunk._cache_size()
    words = ["--num-frames", "21", "--repeats", "2", "--text", "--json", str(file), "--trace", str(tmp_path / "trace")]
    assert main(["bench", "--model", model, *words]) == 0
    report = bench.load(file)
    inside = [f"denoise: {part}" for part in stages.STAGES]
    chunks = [(stage, chunk) for chunk in range(2) for stage in ("denoise", *inside, "decode", "copy")]
    assert [(row.stage, row.chunk) for row in report.rows] == [("text", None), *chunks, ("first chunk", None), ("video", None)]
    for row in report.rows:
        assert 0 <= row.least <= row.median <= row.most
        assert row.floor is not None or row.stage == "denoise: other"
        assert (row.first is None) == row.stage.startswith("denoise:")
    for part in stages.SCOPES:
        assert report.seconds(f"denoise: {part}") > 0
    assert sum(report.seconds(stage) for stage in video.STAGES) > 0
    assert compiled_chunk._cache_size() <= compiled + 1  # at most one more, for all chunks and all repeats
    known = {"device", "versions", "commit", "date", "timed", "peak GiB", "compilation", "product ceiling", "copy ceiling"}
    assert known <= set(report.facts) and report.facts["eight_bits ceiling"] is None
    shown = capsys.readouterr().out
    assert "denoise" in shown and "  cross-attention" in shown
    assert len(list((tmp_path / "trace").rglob("*.xplane.pb"))) == 1


def test_bench_without_the_stages_inside(model, tmp_path):
    file = tmp_path / "bench.json"
    words = ["--num-frames", "9", "--repeats", "1", "--no-stages", "--json", str(file)]
    assert main(["bench", "--model", model, *words]) == 0
    assert [row.stage for row in bench.load(file).rows] == [*video.STAGES, "first chunk", "video"]


def test_two_reports_side_by_side(tmp_path, capsys):
    before = bench.Report(
        {"device": "A", "commit": "1"}, (bench.Row("denoise", 0, 9.0, 6.0, 5.0, 7.0), bench.row("video", None, [9.0, 8.0]))
    )
    after = bench.Report({"device": "B", "commit": "1"}, (bench.Row("denoise", 0, 9.0, 2.0, 2.0, 2.0, 1.0),))
    pairs, differing = bench.compare(before, after)
    assert [(pair.stage, pair.medians, pair.ratio) for pair in pairs] == [
        ("denoise", (6.0, 2.0), 3.0),
        ("video", (8.0, None), None),
    ]
    assert differing == {"device": ("A", "B")}
    files = [tmp_path / name for name in ("before.json", "after.json")]
    for file, report in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(dataclasses.asdict(report)))
        assert bench.load(file) == report
    assert main(["bench", "--compare", *map(str, files)]) == 0
    shown = capsys.readouterr().out
    assert "other device: A | B" in shown and "3.00" in shown and "commit" not in shown
    files[1].write_text('{"rows": []}')
    assert main(["bench", "--compare", *map(str, files)]) == 2
    assert f"{files[1]} is no report" in capsys.readouterr().err


def test_bench_of_the_attention_of_a_layer(tmp_path, capsys):
    file = tmp_path / "bench.json"
    words = ["bench", "--attention", "--model", "tiny", "--num-frames", "33", "--repeats", "2", "--json", str(file)]
    assert main(words) == 0
    report = json.loads(file.read_text())
    names = [row["stage"] for row in report["rows"]]
    chosen = ["selection, xla", "attention", "selection + attention", "dense, xla"]
    assert names == ["norms, rotation", "norms, rotation, means", *chosen]
    assert {row["chunk"] for row in report["rows"]} == {2}
    for row in report["rows"]:
        assert 0 < row["least"] <= row["median"] <= row["most"]
    ms, facts = {row["stage"]: row["median"] for row in report["rows"]}, report["facts"]
    means = ms["norms, rotation, means"] - ms["norms, rotation"]
    share, sum_of_both = (means + ms["selection, xla"]) / ms["attention"], means + ms["selection + attention"]
    assert facts["(means + selection) / attention"] == pytest.approx(share, abs=1e-3)
    assert facts["the same from both together"] == pytest.approx(sum_of_both / ms["attention"] - 1, abs=1e-3)
    assert facts["dense / (means + selection + attention)"] == pytest.approx(ms["dense, xla"] / sum_of_both, abs=1e-2)
    assert "2 layers a launch; 72 queries, 216 keys" in facts["layer"] and "(means + selection)" in capsys.readouterr().out


def test_the_timed_pieces_compute_the_same():
    sparsity = dataclasses.replace(CONFIG.sparsity, keep_frames=99)  # with the budget of everything: dense attention
    config = dataclasses.replace(CONFIG, sparsity=dataclasses.replace(sparsity, target=0.0, base=0.0))
    scene, grid = bench_attention.scene(config), Grid.of(config)
    assert len(scene.lists) == 2 and (scene.lists[0].index != scene.lists[1].index).any()
    pieces = (bench_attention._attend, bench_attention._both, bench_attention._dense)
    alone, both, dense = (bench_attention._launch(piece, scene, grid, config)() for piece in pieces)
    for layer in range(2):
        np.testing.assert_allclose(alone[layer], both[layer], atol=1e-6)
    np.testing.assert_allclose(both[0], dense[0], atol=1e-5)  # the dense keys are those of layer 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tiny", "--repeats", "0"], "--repeats 0 must be positive"),
        (["--model", "tiny", "--attention", "--text"], "--attention has no --text"),
        (["--model", "tiny", "--attention", "--trace", "folder"], "--attention has no --text and no --trace"),
        (
            ["--model", "tiny", "--attention", "--sparsity.policy", "dense"],
            "config.sparsity.policy='dense' has no block lists to time",
        ),
        (
            ["--model", "tiny", "--vae", "large"],
            "vae='large' must be a converted folder, or with a preset one of",
        ),
        ([], "--model is needed, or --compare"),
        (["--compare", "no-a.json", "no-b.json"], "no such report: no-a.json"),
    ],
)
def test_bench_refuses(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_rows_keep_compilation_apart():
    row = bench.row("decode", 3, [900.0, 4.0, 2.0, 3.0])
    assert (row.first, row.median, row.least, row.most) == (900.0, 3.0, 2.0, 4.0)
