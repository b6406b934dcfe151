"""Where arrays lie: a mesh of devices with the axes `data` and `fsdp`."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lf_jax.config import check
from lf_jax.train import config

AXES = ("data", "fsdp")


def make(settings: config.Mesh) -> jax.sharding.Mesh:
    """The first `settings.size` devices.

    Raises:
        ValueError: if there are fewer.
    """
    devices = jax.devices()
    check(
        len(devices) >= settings.size,
        f"mesh of {settings.data} x {settings.fsdp} needs {settings.size} devices, found {len(devices)}",
    )
    return jax.sharding.Mesh(np.array(devices[: settings.size]).reshape(settings.data, settings.fsdp), AXES)


def weights(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Cut along the largest axis that `fsdp` divides; whole on every device where there is none."""
    parts = mesh.shape["fsdp"]
    fits = [axis for axis, size in enumerate(shape) if parts > 1 and size >= parts and size % parts == 0]
    spec = [None] * len(shape)
    if fits:
        spec[max(fits, key=lambda axis: shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def samples(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """Cut along `axis` over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """`weights` of every leaf, an array or a shape."""
    return jax.tree.map(lambda leaf: weights(mesh, leaf.shape), tree)


def place(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Weights on the mesh."""
    return jax.device_put(tree, shardings(mesh, tree))
