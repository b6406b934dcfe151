"""attention="auto": chunks that keep more than the measured break-even attend to everything, and selection is skipped."""

import dataclasses
import json

import pytest

from lf_jax import config, doctor, presets, sparsity
from lf_jax.tokens import Grid
from pallas_kernels import platform, tuned

GRID = Grid(rows=32, columns=48, block_q=64, block_k=64)  # 512x768: 24 key blocks a frame
SPARSE = config.Sparsity(policy="light_forcing", target=0.88, base=0.98)
AUTO = dataclasses.replace(SPARSE, attention="auto")
CHUNKS = (3,) * 7


def budgets(settings, monkeypatch, share):
    monkeypatch.setattr(tuned, "break_even", lambda block_q, block_k: {(64, 64): share}[block_q, block_k])
    return sparsity.chunk_budgets(CHUNKS, 0, GRID, settings, config.Cache())


def test_chunks_above_the_break_even_keep_everything(monkeypatch):
    """24 of 144 blocks are 17 %, 31 of 216 are 14.4 %, 36 of 288 are 12.5 %, then 11.7 %, 10.6 % and 10.1 %."""
    wanted = {0.15: [72, 144, 31, 36, 42, 46, 51], 0.125: [72, 144, 216, 288, 42, 46, 51], 0.2: [72, 24, 31, 36, 42, 46, 51]}
    for share, blocks in wanted.items():
        budget = budgets(AUTO, monkeypatch, share)
        assert budget.blocks.tolist() == blocks and budget.width == max(blocks)
        assert budgets(SPARSE, monkeypatch, share).blocks.tolist() == wanted[0.2]


def test_where_nobody_measured_it_only_what_keeps_everything_does(monkeypatch):
    assert budgets(AUTO, monkeypatch, None).blocks.tolist() == budgets(SPARSE, monkeypatch, None).blocks.tolist()


@pytest.mark.parametrize("policy", ["dense", "full", "window"])
def test_policies_that_do_not_select_by_budget_have_no_break_even(policy):
    with pytest.raises(ValueError, match=f"self.attention='auto' needs a policy that selects .*self.policy='{policy}'"):
        config.Sparsity(policy=policy, attention="auto")


def test_the_doctor_tells_what_was_measured(tmp_path, monkeypatch):
    settings = presets.load("light_forcing_1_3b")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    kind = platform.device().kind
    tuned.table.cache_clear()
    assert doctor.tuning(settings) == {
        "configurations": f"the defaults: there is no table for {kind} ({kind}.json)",
        "break-even of blocks 64x64": "not measured: taken as 100 % of the blocks",
    }
    measured = {"date": "2026-01-02 03:04", "commit": "abc1234"}
    call = dict(direction="forward", block_q=64, block_k=64, head_dim=128, fill=2, length=12)
    content = {
        "configs": [{"call": call, "config": {"parts": 2}, "measured": measured}],
        "break_even": [{"block_q": 64, "block_k": 64, "share": 0.62, "measured": measured}],
    }
    tuned.file(kind).write_text(json.dumps(content))
    tuned.table.cache_clear()
    assert doctor.tuning(settings) == {
        "configurations": f"{kind}.json, classes of calls: 1 (2026-01-02 03:04, commit abc1234)",
        "break-even of blocks 64x64": "62 % of the blocks",
    }
    tuned.file(kind).write_text("{}")
    tuned.table.cache_clear()
    with pytest.raises(ValueError, match=f"{kind}.json is not a table"):
        doctor.examine(settings)
    tuned.file(kind).unlink()
    tuned.table.cache_clear()
    assert list(doctor.tuning(presets.load("self_forcing_1_3b"))) == ["configurations"], "dense attention selects nothing"
