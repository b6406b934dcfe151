"""What training changes, and one update of it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lf_jax.arrays import Array, Int, Leaf
from lf_jax.checkpoint import build, flatten
from lf_jax.config import Config, check
from lf_jax.train import lora, mesh, optimizer
from lf_jax.train.config import Train
from lf_jax.train.objectives.objective import Networks


@partial(jax.tree_util.register_dataclass, data_fields=["parameters", "moments", "average"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Trained:
    """One network in training."""

    parameters: Leaf  # {dotted name: float32 array}: all weights, or the adapters
    moments: Leaf  # of the optimizer
    average: Leaf  # like `parameters`; None without


Batch = dict[str, Array]
State = dict[str, Trained]  # by network
Assemble = Callable[[dict[str, Array], Any], Any]  # (parameters, base) -> the network


@partial(jax.tree_util.register_dataclass, data_fields=["frozen", "base"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What training reads only."""

    frozen: Leaf  # {name: network}
    base: Leaf  # {name: the weights that adapters are added to}; None where all weights are trained


def begin(train: Train, networks: Networks, devices: jax.sharding.Mesh) -> tuple[State, Fixed, dict[str, Assemble]]:
    """The state before the first step, on its devices; copies, so that it can be donated.

    Raises:
        ValueError: if `optimizers` and the networks have different names, there is nothing to adapt, or a network is quantised.
    """
    coarse = [name for name, leaf in flatten((networks.trained, networks.frozen)).items() if leaf.dtype.itemsize == 1]
    check(not coarse, f"{', '.join(coarse[:3])} are quantised: training needs model.linears='full'")
    names = sorted(networks.trained)
    check(
        names == sorted(train.optimizers),
        f"optimizers are for {', '.join(sorted(train.optimizers))}; the objective trains {', '.join(names)}",
    )
    key, parameters, base, assemble = jax.random.key(train.seed), {}, {}, {}
    for index, name in enumerate(names):
        network = networks.trained[name]
        if train.lora.rank:
            parameters[name] = lora.create(network, train.lora, jax.random.fold_in(key, index))
            base[name], assemble[name] = network, partial(_adapted, train.lora)
        else:
            parameters[name] = flatten(network)
            base[name], assemble[name] = None, partial(_whole, _shapes(network))
    create = partial(_create, train)
    out = mesh.shardings(devices, jax.eval_shape(create, parameters))
    state = jax.jit(create, out_shardings=out)(mesh.place(devices, parameters))
    frozen = jax.tree.map(lambda x: x.astype(train.compute_dtype), networks.frozen)
    return state, mesh.place(devices, Fixed(frozen, base)), assemble


def _adapted(settings: lora.Lora, parameters: dict[str, Array], base: Any) -> Any:
    return lora.merge(base, parameters, settings)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _whole(shapes: Any, parameters: dict[str, Array], base: None) -> Any:
    return build(shapes, parameters)


def _create(train: Train, parameters: dict[str, dict[str, Array]]) -> State:
    def copy(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), tree)

    return {
        name: Trained(
            copy(parameters[name]),
            optimizer.direction(settings).init(copy(parameters[name])),
            None if settings.ema is None else copy(parameters[name]),
        )
        for name, settings in train.optimizers.items()
    }


def update(
    train: Train,
    config: Config,
    devices: jax.sharding.Mesh,
    assemble: dict[str, Assemble],
    name: str,
    state: State,
    fixed: Fixed,
    batch: Batch,
    step: Int[Array, ""],
) -> tuple[State, dict[str, Array]]:
    """One update of the network `name`: gradients of all micro-batches, their mean, and the optimizer.

    Returns:
        The state, and scalar metrics, their names after the network's.
    """
    settings, trained = train.optimizers[name], state[name]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(train.seed), step), sorted(state).index(name))
    networks = {other: assemble[other](state[other].parameters, fixed.base[other]) for other in state}
    _, pull_back = jax.vjp(lambda parameters: assemble[name](parameters, fixed.base[name]), trained.parameters)

    def gradients(part: Batch, index: Int[Array, ""] | int) -> tuple[dict[str, Array], dict[str, Array]]:
        key_of_part = jax.random.fold_in(key, index)
        found, metrics = train.objective.gradients(name, networks, fixed.frozen, part, key_of_part, config)
        (found,) = pull_back(jax.tree.map(lambda gradient, weight: gradient.astype(weight.dtype), found, networks[name]))
        return found, {key: jnp.mean(value.astype(jnp.float32)) for key, value in metrics.items()}

    found, metrics = _mean(gradients, batch, train.accumulate, devices)
    metrics["grad_norm"] = optax.tree.norm(found)
    metrics["learning_rate"] = rate = optimizer.learning_rate(settings, step, train.steps)
    direction, moments = optimizer.direction(settings).update(found, trained.moments, trained.parameters)
    parameters = jax.tree.map(lambda weight, change: weight - rate * change, trained.parameters, direction)
    average = optimizer.averaged(settings, trained.average, parameters, step)
    return state | {name: Trained(parameters, moments, average)}, {f"{name}/{key}": value for key, value in metrics.items()}


def _mean(gradients: Callable, batch: Batch, parts: int, devices: jax.sharding.Mesh) -> Any:
    """The mean of `gradients` over micro-batches. Every device cuts up its own samples: none of them moves."""
    if parts == 1:
        return gradients(batch, 0)

    def cut(x: Array) -> Array:
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, mesh.samples(devices, axis=1))

    def add(total: Any, inputs: tuple[Batch, Int[Array, ""]]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(*inputs)), None

    inputs = jax.tree.map(cut, batch), jnp.arange(parts)
    sums = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    total, _ = jax.lax.scan(add, zeros, inputs)
    return jax.tree.map(lambda x: x / parts, total)


def compiled(
    train: Train, config: Config, devices: jax.sharding.Mesh, assemble: dict[str, Assemble], state: State
) -> dict[str, Callable[[State, Fixed, Batch, int], tuple[State, dict[str, Array]]]]:
    """`update` of every network as one program. The state is donated and stays where it lies."""
    places = mesh.shardings(devices, state)
    one = partial(update, train, config, devices, assemble)
    return {name: jax.jit(partial(one, name), donate_argnums=0, out_shardings=(places, None)) for name in state}
