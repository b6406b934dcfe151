"""attention="auto": chunks that keep more than the measured break-even attend to everything, and selection is skipped."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparsity import SMALL, Video, as_sets, key_blocks
from tiny_rollout import FRAME, SPARSE, change, draw, make_keys, make_model, make_text, quick

from lf_jax import config, doctor, presets, sparsity
from lf_jax.rollout import initial_state, rollout
from lf_jax.tokens import Grid
from pallas_kernels import platform, tuned
from pallas_kernels.block_sparse import lists

GRID = Grid(rows=32, columns=48, block_q=64, block_k=64)  # 512x768: 24 key blocks a frame
SHORT = config.Sparsity(policy="light_forcing", target=0.88, base=0.98)
AUTO = dataclasses.replace(SHORT, attention="auto")
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
        assert budgets(SHORT, monkeypatch, share).blocks.tolist() == wanted[0.2]


def test_where_nobody_measured_it_only_what_keeps_everything_does(monkeypatch):
    assert budgets(AUTO, monkeypatch, None).blocks.tolist() == budgets(SHORT, monkeypatch, None).blocks.tolist()


_select = jax.jit(sparsity.select)


def counted():
    """A selector, and the list that grows with every time it is computed."""
    calls = []

    def selector(inputs):
        jax.debug.callback(lambda _: calls.append(1), inputs.budget.blocks)
        return sparsity.SELECTORS["topk"](inputs)

    return selector, calls


def everything(video: Video) -> set[int]:
    frames = [*video.visible(), *(len(video.keys) + i for i in range(video.chunk))]
    return {video.number(frame, block) for frame in frames for block in range(video.grid.frame_blocks)}


@pytest.mark.parametrize("frames", [0, 3, 12], ids=["no past", "all past in sight", "ring"])
def test_a_budget_of_everything_selects_nothing(frames):
    video = Video(SMALL, window=10, sink=1, frames=frames)
    policy, calls = counted()
    settings = config.Sparsity(policy=policy, attention="auto")
    seen = everything(video)
    for budget, skipped in ((len(seen) - 1, not frames), (len(seen), True), (999, True)):
        calls.clear()
        found = _select(video.inputs(settings, budget, key_blocks(video)))
        jax.effects_barrier()
        plain = _select(
            video.inputs(dataclasses.replace(settings, policy="topk", attention="sparse"), budget, key_blocks(video))
        )
        assert as_sets(found, key_blocks(video)) == as_sets(plain, key_blocks(video))
        assert len(calls) == (0 if skipped else 1)
        if skipped:
            assert all(kept == seen for kept in as_sets(found, key_blocks(video)).values())


def test_it_is_everything_for_a_selector_with_fewer_candidates_too():
    video = Video(SMALL, window=None, sink=0, frames=12)
    settings = config.Sparsity(policy="light_forcing", keep_frames=4, sink_frames=1, near_frames=1, attention="auto")
    seen = everything(video)
    found = as_sets(_select(video.inputs(settings, len(seen), key_blocks(video))), key_blocks(video))
    assert all(kept == seen for kept in found.values())
    fewer = as_sets(_select(video.inputs(settings, len(seen) - 1, key_blocks(video))), key_blocks(video))
    assert {len(kept) for kept in fewer.values()} == {(4 + 3) * SMALL.frame_blocks}


def test_lists_too_narrow_for_everything_are_selected():
    video = Video(SMALL, window=None, sink=0, frames=6)
    policy, calls = counted()
    width = key_blocks(video) // 2
    found = _select(video.inputs(config.Sparsity(policy=policy, attention="auto"), 999, width))
    jax.effects_barrier()
    assert (found.count == width).all() and calls


def test_blocks_with_dead_tokens_go_where_the_selector_puts_them():
    def ordered(inputs):
        blocks = sparsity.SELECTORS["topk"](inputs)
        index, whole = lists.live_first(dataclasses.replace(blocks, whole=None), inputs.grid.frame_tokens)
        return dataclasses.replace(blocks, index=index, whole=whole)

    video = Video(SMALL, window=10, sink=1, frames=12)
    assert SMALL.frame_tokens % SMALL.block_k, "frames with dead tokens"
    seen, last = everything(video), SMALL.frame_blocks - 1
    found = _select(video.inputs(config.Sparsity(policy=ordered, attention="auto"), 999, key_blocks(video)))
    short = np.asarray(found.index)[..., : len(seen)] % SMALL.frame_blocks == last
    assert (found.whole == len(seen) * last // SMALL.frame_blocks).all()
    assert (short == (jnp.arange(len(seen)) >= found.whole[..., None])).all()
    assert all(kept == seen for kept in as_sets(found, key_blocks(video)).values())


def test_a_rollout_above_the_break_even_is_dense(monkeypatch):
    model, text, keys, noise = make_model(), make_text(make_model(), 1), make_keys(1), draw(1, 9, *FRAME)

    def video(settings, share):
        monkeypatch.setattr(tuned, "break_even", lambda *_: share)
        whole = change(sparsity=settings)
        return quick(rollout, static_argnames="config")(model, text, noise, initial_state(whole, 1, 9, keys), whole)[0]

    sparse = dataclasses.replace(SPARSE, attention="auto")
    dense, above, below = video(config.Sparsity(), None), video(sparse, 0.01), video(sparse, 0.99)
    np.testing.assert_allclose(above, dense, atol=1e-5)
    assert float(jnp.abs(below - dense).max()) > 1e-3, "below it blocks are left out"


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
        "configs": [{"call": call, "config": {"stages": 3}, "measured": measured}],
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


def test_the_doctor_knows_who_chooses_blocks():
    settings = presets.load("light_forcing_1_3b")

    def operations(**fields):
        sparse = dataclasses.replace(settings.sparsity, **fields)
        return {op.name: op.choice for op in doctor.operations(dataclasses.replace(settings, sparsity=sparse))}

    assert operations()["choice of blocks"] == operations(selection="xla")["choice of blocks"] == "xla"
    assert "choice of blocks" not in operations(policy="dense")
    with pytest.raises(ValueError, match="sparsity.selection='quantum' must be one of triton, xla, or None"):
        operations(selection="quantum")
    with pytest.raises(NotImplementedError, match="sparsity.selection='triton': needs an NVIDIA GPU"):
        operations(selection="triton")
