"""SLA's linear branch: against sums over the tokens that are left out, where it is nothing, and from training to export."""

import dataclasses
from functools import partial

import fake_checkpoints as fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rollout as tiny
import toy_training as toy
from flax import nnx
from test_sparsity import SMALL, VIDEOS, Video

import convert
from lf_jax import attention, checkpoint, config, sparsity
from lf_jax import cache as kv
from lf_jax.dit.model import WanDiT, forward, text_cache
from lf_jax.tokens import Grid
from lf_jax.train import folders

MODEL = dataclasses.replace(tiny.MODEL, linear_branch=True)
NAMES = {"blocks.marginal.kernel", "blocks.marginal.bias"}
SLA = dataclasses.replace(tiny.SPARSE, policy="sla")
GRID = Grid.of(tiny.change(sparsity=SLA))
BUDGET = sparsity.Budget(jnp.int32(4), 6)  # of 12 key blocks with a past, of 6 without


@tiny.quick
def make_model(seed=0):
    return WanDiT(MODEL, rngs=nnx.Rngs(seed))


@partial(jax.jit, static_argnames="settings")
def run(model, cache, settings=SLA):
    """A chunk that follows the cached ones: velocity, and what the chunk adds to the cache."""
    budget, grid = (None, dataclasses.replace(GRID, block_k=1)) if settings.dense else (BUDGET, GRID)
    text = text_cache(model, tiny.draw(1, 4, MODEL.text_dim, seed=1))
    return forward(model, tiny.draw(1, 3, *tiny.FRAME), jnp.full((1, 3), 500.0), text, cache, budget, grid, settings)


def empty(settings=SLA):
    grid = dataclasses.replace(GRID, block_k=1) if settings.dense else GRID
    return kv.empty(MODEL, grid, config.Cache(), not settings.dense, 1, 6)


@jax.jit
def attend(inputs, k, v):
    """Without the branch, with one that doubles, and the lists."""
    new = attention.chunk_kv(k, v, SMALL, pool=True)
    given = inputs.q, new, inputs.cache, inputs.layer, inputs.time, inputs.budget, SMALL, inputs.settings
    plain, both = (attention.self_attention(*given, marginal=marginal) for marginal in (None, lambda read: 2 * read))
    return plain, both, sparsity.select(inputs)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "policy"), [("no past", "sla"), ("two stages", "sla"), ("ring, sink 3", "window"), ("chunks of two", "sla")]
)
def test_what_is_left_out_is_read_by_linear_attention(name, policy):
    video, settings = Video(SMALL, **VIDEOS[name]), config.Sparsity(policy=policy, block_q=8, block_k=8)
    inputs = video.inputs(settings, 9, (video.cache.frames + video.chunk) * SMALL.frame_blocks)
    v = jnp.asarray(video.draw.normal(size=video.k.shape), jnp.float32)
    plain, both, blocks = attend(inputs, video.k, v)

    frames = [*video.visible(), *(len(video.keys) + i for i in range(video.chunk))]
    keys = np.concatenate([(video.keys + video.current)[f] for f in frames])  # [token, head, e]
    values = [*video.keys, *np.asarray(v).reshape(video.chunk, 30, 2, 8)]  # the cache of a `Video` has its keys as values
    values = np.concatenate([values[f] for f in frames])
    place = np.asarray([video.number(f, i // 8) for f in frames for i in range(30)])
    queries, expected = softmax(np.asarray(video.q[0])), np.zeros(video.q.shape[1:])
    for t, head in np.ndindex(expected.shape[:2]):
        listed = blocks.index[0, head, t // 8][: blocks.count[0, head, t // 8]]
        left = ~np.isin(place, listed)
        if left.any():
            weights = softmax(keys[left, head]) @ queries[t, head]
            expected[t, head] = weights @ values[left, head] / weights.sum()
    assert bool(expected.any()) == (name != "no past")
    np.testing.assert_allclose((both - plain)[0], 2 * expected, atol=1e-5)


def test_a_branch_that_has_not_learned_changes_nothing():
    model, without = make_model(), tiny.make_model()
    arrays, fewer = checkpoint.flatten(model), checkpoint.flatten(without)
    assert set(arrays) - set(fewer) == NAMES and arrays["blocks.marginal.kernel"].shape == (2, 12, 12)
    assert not any(arrays[name].any() for name in NAMES)
    assert all((arrays[name] == fewer[name]).all() for name in fewer)
    learned = checkpoint.build(model, arrays | {"blocks.marginal.kernel": arrays["blocks.marginal.kernel"] + 0.1})

    first, new = run(without, empty())
    cache = kv.append(empty(), new, 3, 3)
    second = run(without, cache)[0]
    assert (run(model, empty())[0] == first).all() and (run(model, cache)[0] == second).all()
    assert (run(learned, empty())[0] == first).all()  # the first chunk leaves nothing out
    assert jnp.abs(run(learned, cache)[0] - second).max() > 1e-3
    dense = config.Sparsity(policy="dense")
    assert (run(learned, empty(dense), dense)[0] == run(model, empty(dense), dense)[0]).all()


def test_gradients_reach_it():
    model = make_model()
    cache = kv.append(empty(), run(model, empty())[1], 3, 3)
    gradient = jax.jit(jax.grad(lambda model: jnp.square(run(model, cache)[0]).mean()))(model)
    branch = gradient.blocks.marginal
    assert (jnp.abs(branch.kernel[...]).max((1, 2)) > 0).all() and (jnp.abs(branch.bias[...]).max(1) > 0).all()


def test_it_is_converted_there_and_back(tmp_path):
    arrays = checkpoint.flatten(make_model())
    arrays["blocks.marginal.kernel"] = tiny.draw(*arrays["blocks.marginal.kernel"].shape)
    checkpoint.save_component(tmp_path / "dir", "dit", MODEL, arrays)
    tensors = fake.read(convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "out.safetensors"))
    np.testing.assert_array_equal(tensors["blocks.1.self_attn.proj_l.weight"].T, arrays["blocks.marginal.kernel"][1])
    fake.write(tmp_path / "source" / "model.safetensors", tensors, {"num_heads": 2, "text_len": MODEL.text_len})
    convert.convert("wan", tmp_path / "source", tmp_path / "again")
    part, module = checkpoint.load_component(tmp_path / "again", "dit")
    assert part == MODEL
    assert all((array == arrays[name]).all() for name, array in checkpoint.flatten(module).items())


def test_training_adds_it_to_a_model_without_it(tmp_path):
    checkpoint.save_component(tmp_path, "dit", tiny.MODEL, tiny.make_model())
    settings = tiny.change(model=dict(linear_branch=True))
    train = toy.training(config=settings, init={"model": str(tmp_path), "teacher": str(tmp_path)}, compute_dtype="float32")
    load = folders.Loader(train, folders.configure(train), frozenset(), print)
    found, teacher = (load(role, "dit") for role in ("model", "teacher"))
    assert found.config == MODEL and teacher.config == tiny.MODEL
    before, after = checkpoint.flatten(tiny.make_model()), checkpoint.flatten(found)
    assert all((after.pop(name) == before[name]).all() for name in before)
    assert set(after) == NAMES and not any(array.any() for array in after.values())
