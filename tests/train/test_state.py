"""One update: who changes, by how much, and how often it is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy

from lf_jax.train import Lora, Optimizer, folders, lora, mesh, state

TWO = toy.Sums(names=("generator", "critic"), every=5)


def started(train):
    devices, config = mesh.make(train.mesh), folders.configure(train)
    load = folders.Loader(train, config, frozenset(), print)
    now, fixed, assemble = state.begin(train, train.objective.build(config, load, jax.random.key(1)), devices)
    return now, fixed, state.compiled(train, config, devices, assemble, now), assemble


def batch(train, step):
    return {name: jnp.asarray(x) for name, x in train.data.batch(train.config, step, train.batch).items()}


def steps(train, count, start=0):
    """The state after each of `count` steps, the first before any, and what the last update of every network said."""
    now, fixed, update, _ = started(train)
    seen, said = [jax.device_get(now)], {}
    for step in range(start, start + count):
        for name in train.objective.updates(step):
            now, values = update[name](now, fixed, batch(train, step), np.int32(step))
            said |= values
        seen.append(jax.device_get(now))
    return seen, {name: float(value) for name, value in said.items()}


def distance(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_micro_batches_make_the_big_batch():
    whole = toy.training(batch=8, objective=toy.Sums(noise=0.0))
    (_, a), said = steps(whole, 1)
    (before, b), cut = steps(dataclasses.replace(whole, accumulate=4), 1)
    assert said.keys() == cut.keys() == {"model/loss", "model/grad_norm", "model/learning_rate"}
    for name in said:
        assert cut[name] == pytest.approx(said[name], rel=1e-5)
    assert distance(before, b) > 1e-3
    for name, moment in a["model"].moments[1].nu.items():  # nearly linear in the gradients; the weights see their signs only
        np.testing.assert_allclose(b["model"].moments[1].nu[name], moment, rtol=1e-4, atol=1e-6 * moment.max())


def test_every_update_and_micro_batch_has_a_key_of_its_own():
    plan = toy.training(objective=toy.Blocks(), accumulate=2, seed=3)
    now, fixed, update, _ = started(plan)
    for step in (0, 1):
        now, said = update["model"](now, fixed, batch(plan, step), np.int32(step))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), step), 0)
        parts = [float(jax.random.uniform(jax.random.fold_in(key, part))) for part in range(2)]
        assert float(said["model/drawn"]) == pytest.approx(sum(parts) / 2)


def test_networks_are_updated_in_turn_at_their_own_rates():
    rates = {"generator": 1e-3, "critic": 1e-2}
    optimizers = {name: Optimizer(learning_rate=rate, weight_decay=0.0, ema=0.5) for name, rate in rates.items()}
    toy.traced.clear()
    (start, first, *_, fifth, sixth), said = steps(toy.training(objective=TWO, optimizers=optimizers), 6)
    assert sorted(toy.traced) == ["critic", "generator"]  # each compiled once
    for name, rate in rates.items():  # the first step of Adam moves every weight that has a gradient by the rate
        assert distance(start[name].parameters, first[name].parameters) == pytest.approx(rate, rel=1e-2)
        assert said[f"{name}/learning_rate"] == pytest.approx(rate)
    assert distance(first["generator"], fifth["generator"]) == 0  # weights, moments and average
    assert distance(first["critic"], fifth["critic"]) > 0
    assert distance(fifth["generator"].parameters, sixth["generator"].parameters) > 0
    for name in start["critic"].parameters:
        np.testing.assert_allclose(
            first["critic"].average[name], (start["critic"].parameters[name] + first["critic"].parameters[name]) / 2, rtol=1e-6
        )


def test_gradients_are_clipped_and_their_norm_told():
    optimizers = {"model": Optimizer(clip=0.5, betas=(0.0, 0.0), eps=1e3, learning_rate=1.0, weight_decay=0.0)}
    (before, after), said = steps(toy.training(optimizers=optimizers), 1)
    moved = jax.tree.map(lambda x, y: (x - y) * 1e3, before["model"].parameters, after["model"].parameters)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(moved)))
    assert said["model/grad_norm"] > 5
    assert norm == pytest.approx(0.5, rel=1e-2)  # with such an eps Adam is gradient descent


def test_bfloat16_is_computed_with_and_float32_kept():
    plan = toy.training(compute_dtype="bfloat16", optimizers={"model": Optimizer(learning_rate=1e-5, ema=0.9)})
    now, fixed, *_ = started(plan)
    assert {str(x.dtype) for x in jax.tree.leaves(now)} == {"float32", "int32"}  # int32: Adam's count
    assert {x.dtype for x in jax.tree.leaves(fixed)} == {jnp.bfloat16.dtype}
    toy.traced.clear()
    (before, after, _), _ = steps(plan, 2)
    assert toy.traced == ["model"]  # what comes out goes in again as it is
    assert 0 < distance(before["model"].parameters, after["model"].parameters) < 1e-4  # lost if it were rounded to bfloat16


def test_only_adapters_are_trained_along_their_own_gradient():
    descent = {"model": Optimizer(clip=None, betas=(0.0, 0.0), eps=1e6, learning_rate=1e6, weight_decay=0.0)}
    plan = toy.training(objective=toy.Blocks(), lora=Lora(rank=2, alpha=4.0), optimizers=descent)
    now, fixed, update, _ = started(plan)
    now = jax.tree.map(lambda x: x + 0.1, now)  # at zero, half of the gradients are zero
    before, base = jax.device_get(now["model"].parameters), fixed.base["model"]
    now, _ = update["model"](now, fixed, batch(plan, 0), np.int32(0))
    gradients = jax.grad(lambda adapters: toy.Blocks.loss(lora.merge(base, adapters, plan.lora)))(before)
    assert len(before) == 20 and set(before) == set(now["model"].parameters)  # two for each of ten linear layers
    assert sum(bool(gradient.any()) for gradient in gradients.values()) == 4
    for name, gradient in gradients.items():
        np.testing.assert_allclose(before[name] - now["model"].parameters[name], gradient, rtol=1e-3, atol=1e-6)


def test_optimizers_must_be_those_of_the_networks():
    plan = dataclasses.replace(toy.training(), objective=TWO, optimizers={"generator": Optimizer()})
    with pytest.raises(ValueError, match="optimizers are for generator; the objective trains critic, generator"):
        started(plan)


def test_adapters_need_a_transformer():
    with pytest.raises(ValueError, match="lora needs the blocks of a diffusion transformer; the network has only text"):
        started(toy.training(lora=Lora(rank=2)))
