"""Teacher forcing and the probe against the same numbers computed layer by layer, outside any compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_rollout import change, draw, make_keys, make_model, make_text

from lf_jax import flow, solvers, sparsity
from lf_jax.chunk import commit_chunk
from lf_jax.dit.model import embed_time, patchify, turns
from lf_jax.evaluate import forcing
from lf_jax.evaluate.policies import with_policy
from lf_jax.inputs import video_chunks
from lf_jax.rollout import initial_state, stream
from lf_jax.tokens import Grid

BASE = change(
    sparsity=dict(policy="light_forcing", target=0.5, base=0.7, keep_frames=4, near_frames=1, block_q=4, block_k=4),
    video=dict(num_frames=33),
)  # fmt: skip
DENSE = with_policy(BASE, "dense")
POLICIES = {name: with_policy(BASE, name) for name in ("full", "light_forcing", "window", "oracle")}
LENGTHS = video_chunks(BASE)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def text(model):
    return make_text(model, 1)


@pytest.fixture(scope="module")
def latents(model, text):
    state = initial_state(DENSE, 1, sum(LENGTHS), make_keys(1))
    return np.concatenate([np.asarray(part[0]) for part, _ in stream(model, text, None, state, DENSE, sum(LENGTHS))])


@pytest.fixture(scope="module")
def found(model, text, latents):
    return forcing.measure(model, text, make_keys(1), latents, DENSE, POLICIES)


def test_the_same_attention_by_other_means_is_the_noise_floor(found):
    full = found["full"]
    assert np.shape(full["velocity"]) == (3, 2) and np.shape(full["recall"]) == np.shape(full["worst"]) == (3, 2, 2)
    assert np.max(full["velocity"]) < 1e-5
    np.testing.assert_allclose([full["recall"], full["worst"]], 1, rtol=1e-5)
    assert full["density"] == [1, 1, 1]


def test_the_first_chunk_reads_everything(found):
    for notes in found.values():
        assert np.max(notes["velocity"][0]) < 1e-5 and notes["density"][0] == 1


def test_what_is_left_out_shows(found):
    for name in ("light_forcing", "window"):
        assert np.min(found[name]["velocity"][1:]) > 1e-3
        assert np.max(found[name]["recall"][2]) < 0.999
        assert (np.asarray(found[name]["worst"]) <= np.asarray(found[name]["recall"]) + 1e-6).all()


def test_no_choice_of_as_many_blocks_holds_more_than_the_oracles(found):
    oracle, ours = (np.asarray(found[name]["recall"]) for name in ("oracle", "light_forcing"))
    assert found["oracle"]["density"] == found["light_forcing"]["density"]
    assert (oracle >= ours - 1e-6).all() and (oracle[1:] > ours[1:]).any()


def test_the_density_is_that_of_the_budget(found):
    for name, settings in POLICIES.items():
        blocks = sparsity.chunk_budgets(LENGTHS, 0, Grid.of(settings), settings.sparsity, settings.cache).blocks
        visible = np.cumsum(LENGTHS) * Grid.of(settings).frame_blocks
        np.testing.assert_allclose(found[name]["density"], blocks / visible, rtol=1e-5)


def test_what_a_window_reads(found):
    reads, blocks = found["window"]["reads"][2], Grid.of(BASE).frame_blocks
    assert reads["frames"] == list(range(9))
    frames = np.asarray(reads["share"]).reshape(9, blocks)
    assert (frames == np.array([1, 0, 0, 0, 0, 1, 1, 1, 1])[:, None]).all()


def test_the_trajectory_ends_in_the_dense_video(model, text, latents):
    past = initial_state(DENSE, 1, sum(LENGTHS), make_keys(1)).cache
    noisy, velocities = forcing.trajectory(model, text, past, make_keys(1), np.int32(0), DENSE, latents[:3].shape)
    end = flow.velocity_to_x0(noisy[-1], velocities[-1], solvers.schedule(DENSE.rollout).sigma[-1])
    np.testing.assert_allclose(end[0], latents[:3], atol=1e-5)


def test_recall_is_the_share_of_the_softmax_in_the_chosen_blocks(model, text, latents):
    """Layer by layer in numpy: every query's softmax over all visible keys, added up where its block's list has them."""
    full, sparse, grid = POLICIES["full"], POLICIES["light_forcing"], Grid.of(BASE)
    everything, budget = (
        sparsity.chunk_budgets(LENGTHS, 0, grid, settings.sparsity, settings.cache) for settings in (full, sparse)
    )
    cache = initial_state(full, 1, sum(LENGTHS), make_keys(1)).cache
    for chunk in range(2):
        part = jnp.asarray(latents[None, 3 * chunk : 3 * chunk + 3])
        allowed = dataclasses.replace(everything, blocks=everything.blocks[chunk])
        cache = commit_chunk(model, text, part, cache, allowed, full, 0.0)
    allowed, few = (dataclasses.replace(budgets, blocks=budgets.blocks[2]) for budgets in (everything, budget))
    noisy, times = draw(1, 1, 3, 4, 6, 4), solvers.schedule(BASE.rollout).timestep[:1]
    readings = forcing.choices(model, text, noisy, cache, allowed, (few,), change(full, rollout=dict(timesteps=(1000.0,))),
                               (sparse.sparsity,))  # fmt: skip

    _, modulation = embed_time(model, jnp.broadcast_to(times, (1, 3)))
    tokens, time = patchify(model, noisy[0]), sparsity.timeline(cache, 3, grid)
    live = np.tile(np.arange(grid.padded_frame) < grid.frame_tokens, 9)
    for layer in range(2):
        seen = {}

        def attend(own, qkv, layer=layer, seen=seen):
            q, _, new = own.queries_keys(qkv, turns(model, cache, 3, grid), grid, pool=True)
            keys = np.concatenate([cache.k[layer, :, : 6 * grid.padded_frame], new.k], axis=1)[0]
            values = np.concatenate([cache.v[layer, :, : 6 * grid.padded_frame], new.v], axis=1)[0]
            logits = np.einsum("the,she->hts", q[0], keys) / np.sqrt(q.shape[-1])
            weights = np.where(live, np.exp(logits - logits.max(-1, keepdims=True)), 0)
            weights /= weights.sum(-1, keepdims=True)
            seen["mass"] = weights.reshape(*weights.shape[:2], -1, grid.block_k).sum(-1)  # [head, token, block]
            inputs = sparsity.Inputs(q, new, cache, jnp.int32(layer), time, few, grid, sparse.sparsity)
            seen["chosen"] = sparsity.select(inputs)
            return jnp.einsum("hts,she->the", weights, values)[None].astype(q.dtype), new

        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)
        tokens, _ = block(tokens, modulation, text.k[layer], text.v[layer], attend)
        cached, chosen = cache.frames * grid.frame_blocks, seen["chosen"]
        for head in range(2):
            for row in range(grid.query_blocks(3)):
                listed = np.asarray(chosen.index[0, head, row, : int(chosen.count[0, head, row])])
                past = 6 * grid.frame_blocks  # of the cache's 9 frames, 6 are filled, in order
                columns = np.where(listed < cached, listed, listed - cached + past)
                mass = seen["mass"][head, row * grid.block_q : (row + 1) * grid.block_q]
                ours = float(readings[0].recall[0, layer, head, row])
                assert ours == pytest.approx(mass[:, columns].sum(-1).mean(), abs=1e-5)


def test_policies_of_two_grids_are_refused(model, text, latents):
    other = dataclasses.replace(BASE, sparsity=dataclasses.replace(BASE.sparsity, block_k=2))
    with pytest.raises(ValueError, match="policies have 2 token grids, expected one"):
        forcing.measure(model, text, make_keys(1), latents, DENSE, {"full": POLICIES["full"], "other": other})


def test_guidance_and_a_window(model):
    """Two branches of the network, a ring that turns: what is read is named by its frame in the video."""
    base = change(BASE, cache=dict(window=6, sink=1), video=dict(num_frames=45),
                  rollout=dict(sampler="euler", num_inference_steps=2, guidance_scale=2.0))  # fmt: skip
    dense, text = with_policy(base, "dense"), make_text(model, 2)
    latents = np.asarray(draw(12, *kv_shape(base)))
    found = forcing.measure(model, text, make_keys(1), latents, dense, {"full": with_policy(base, "full")})["full"]
    assert np.max(found["velocity"]) < 1e-5
    np.testing.assert_allclose(found["recall"], 1, rtol=1e-5)
    assert [reads["frames"] for reads in found["reads"]] == [[0, 1, 2], [*range(6)], [0, *range(4, 9)], [0, *range(7, 12)]]


def kv_shape(settings):
    _, down, across = settings.model.patch
    grid = Grid.of(settings)
    return grid.rows * down, grid.columns * across, settings.model.channels
