"""Every policy spends the same budget on average."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax import cache as kv
from lf_jax import presets, sparsity
from lf_jax.attention import chunk_kv
from lf_jax.config import Cache, Model, Sparsity
from lf_jax.evaluate import policies
from lf_jax.tokens import Grid
from pallas_kernels import check_block_map

SHORT = presets.load("light_forcing_1_3b")
LONG = presets.load("light_forcing_long_1_3b")
COARSE = dataclasses.replace(SHORT, sparsity=Sparsity(policy="light_forcing", target=0.6, base=0.8, near_frames=1))


@pytest.mark.parametrize("base", [SHORT, LONG, COARSE], ids=["short", "long", "coarse"])
def test_the_average_density_is_that_of_the_target(base):
    budget = 1 - base.sparsity.target
    for name in policies.names():
        settings = policies.with_policy(base, name)
        found = policies.average(policies.densities(settings), settings)
        if name in ("dense", "full"):
            assert found == 1
        elif name == "window":
            fewer = dataclasses.replace(
                settings, sparsity=dataclasses.replace(settings.sparsity, near_frames=settings.sparsity.near_frames - 1)
            )
            assert found >= budget
            assert settings.sparsity.near_frames == 1 or policies.average(policies.densities(fewer), fewer) < budget
        else:
            assert found == pytest.approx(budget, abs=0.004)  # budgets are whole blocks


def test_growth_is_what_constant_lacks():
    grown, constant = (policies.densities(policies.with_policy(SHORT, name)) for name in ("light_forcing", "constant"))
    assert grown[0] == constant[0] == 1
    assert (np.diff(grown[1:]) < 0).all() and np.ptp(constant[1:]) < 0.01
    for name in ("topk", "oracle"):
        assert (policies.densities(policies.with_policy(SHORT, name)) == grown).all()


def test_a_policy_changes_sparsity_only():
    base = dataclasses.replace(SHORT, cache=Cache(window=12, sink=1), sparsity=Sparsity(policy="dense", block_k=32))
    for name in policies.DEFAULT:
        settings = policies.with_policy(base, name)
        assert dataclasses.replace(settings, sparsity=base.sparsity) == base
        assert name == "dense" or (settings.sparsity.block_k, settings.sparsity.target) == (32, 0.88)


def test_other_selectors_are_policies_too(monkeypatch):
    def diagonal(inputs):
        """Blocks on the diagonal.

        More words.
        """

    monkeypatch.setitem(sparsity.SELECTORS, "diagonal", diagonal)
    assert policies.with_policy(SHORT, "diagonal").sparsity.policy == "diagonal"
    assert policies.meaning("diagonal") == "Blocks on the diagonal."
    assert all(policies.meaning(name) for name in policies.names())
    with pytest.raises(ValueError, match="policy 'light' must be one of dense, full, .*diagonal"):
        policies.with_policy(SHORT, "light")


def test_a_video_of_one_chunk_has_nothing_to_leave_out():
    settings = policies.with_policy(dataclasses.replace(SHORT, video=dataclasses.replace(SHORT.video, num_frames=9)), "topk")
    assert policies.average(policies.densities(settings), settings) == 1


def drawn(layer: int, end: int, batch: int = 2) -> np.ndarray:
    """Which of the key blocks of 9 slots and a chunk of 3 frames "random" reads, [b, head, query block, key block]."""
    grid = Grid(rows=4, columns=6, block_q=8, block_k=8)
    cache = kv.empty(Model(dim=16, heads=2, layers=4, dtype="float32"), grid, Cache(window=9, sink=1), True, batch, 9)
    cache = dataclasses.replace(cache, end=jnp.int32(end))
    q = jnp.zeros((batch, 3 * grid.frame_tokens, 2, 8))
    budget, settings = sparsity.Budget(jnp.int32(7), 12), Sparsity(policy="random", block_q=8, block_k=8)
    time = sparsity.timeline(cache, 3, grid)
    inputs = sparsity.Inputs(q, chunk_kv(q, q, grid, pool=True), cache, jnp.int32(layer), time, budget, grid, settings)
    found = sparsity.select(inputs)
    check_block_map(found, time.blocks.size)
    assert (found.count == 7).all()
    read = np.zeros((*found.count.shape, time.blocks.size), bool)
    np.put_along_axis(read, np.asarray(found.index[..., :7]), True, axis=-1)
    return read


def test_random_reads_any_visible_block_as_often():
    read = drawn(layer=0, end=20)
    out_of_sight = hidden(20)
    assert read.sum(-1).min() == 7 and not read[..., out_of_sight].any()
    assert (read[0] == read[1]).all() and (drawn(0, 20, batch=1)[0] == read[0]).all() and (drawn(0, 20) == read).all()
    others = [drawn(1, 20), drawn(0, 23)]
    assert all((other[0] != read[0]).any() for other in others) and (read[0, 0] != read[0, 1]).any()
    share = np.mean([drawn(layer, 20)[0] for layer in range(6)], axis=(0, 1, 2))
    seen = share[~out_of_sight]
    assert seen.size == 27 and abs(seen.mean() - 7 / 27) < 1e-6 and seen.min() > 0.1 and seen.max() < 0.45


def hidden(end: int) -> np.ndarray:
    """The key blocks that a chunk of 3 frames after `end` frames does not see: those of the 3 slots that it will take."""
    slots = [1 + (frame - 1) % 8 for frame in range(end, end + 3)]
    return np.isin(np.arange(36) // 3, slots)
