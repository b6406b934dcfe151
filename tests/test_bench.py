"""The benchmark measures what it says, in the order of the video, and writes a complete file or none."""

import json

from lf_jax import bench
from lf_jax.cli import main
from lf_jax.rollout import compiled_chunk


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


def test_bench_refuses_no_repeats(capsys):
    assert main(["bench", "--model", "tiny", "--repeats", "0"]) == 2
    assert "--repeats 0 must be positive" in capsys.readouterr().err


def test_rows_keep_compilation_apart():
    row = bench.row("decode", 3, [900.0, 4.0, 2.0, 3.0])
    assert (row.first, row.median, row.least, row.most) == (900.0, 3.0, 2.0, 4.0)
