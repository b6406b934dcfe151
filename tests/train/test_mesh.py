"""Sharding, on eight devices that XLA is made to find on the CPU: in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from lf_jax.train import Mesh, mesh

# a shape, and the axis that is cut over four devices
CUT = [((30, 8, 12), 2), ((30, 8, 9), 1), ((30, 9, 9), None), ((8,), 0), ((), None), ((3,), None), ((16, 16), 0)]
PROGRAM = """
import dataclasses, json, pathlib, sys
import jax, numpy as np
import toy_training as toy
from lf_jax.train import Mesh, folders, mesh, state
from lf_jax.train.checkpoints import Checkpoints

def started(settings, accumulate):
    plan = toy.training(mesh=settings, batch=16, accumulate=accumulate)
    devices, config = mesh.make(settings), folders.configure(plan)
    load = folders.Loader(plan, config, frozenset(), print)
    now, fixed, assemble = state.begin(plan, plan.objective.build(config, load, jax.random.key(1)), devices)
    return plan, devices, now, fixed, state.compiled(plan, config, devices, assemble, now)["model"]

def trained(settings, steps, accumulate=1):
    plan, devices, now, fixed, update = started(settings, accumulate)
    for step in range(steps):
        batch = jax.device_put(plan.data.batch(plan.config, step, plan.batch), mesh.samples(devices))
        now, values = update(now, fixed, batch, np.int32(step))
    return now, values["model/loss"], update._cache_size(), batch

def difference(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

one, loss, _, _ = trained(Mesh(), 2)
sharded, sharded_loss, programs, batch = trained(Mesh(data=2, fsdp=4), 2)
found = {
    "difference": difference(jax.device_get(one), jax.device_get(sharded)),
    "losses": [float(loss), float(sharded_loss)],
    "programs": programs,
    "bytes": [sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) for tree in (one, sharded)],
    "specs": {
        part: sorted({str(x.sharding.spec) for x in jax.tree.leaves(getattr(sharded["model"], part)) if x.ndim})
        for part in ("parameters", "moments", "average")
    },
    "batch": batch["ids"].sharding.shard_shape(batch["ids"].shape),
}
shapes = json.loads(sys.argv[2])
found["axes"] = [list(mesh.weights(mesh.make(Mesh(data=2, fsdp=4)), tuple(shape)).spec) for shape in shapes]
cut, cut_loss, _, _ = trained(Mesh(data=2, fsdp=4), 1, accumulate=2)
first, first_loss, _, _ = trained(Mesh(), 1, accumulate=2)
found["accumulated"] = [difference(jax.device_get(first), jax.device_get(cut)), float(first_loss), float(cut_loss)]
with Checkpoints(pathlib.Path(sys.argv[1]), 2, print) as checkpoints:
    checkpoints.save(2, sharded)
    checkpoints.wait()
    step, elsewhere = checkpoints.restore(started(Mesh(fsdp=8), 1)[2])
    devices = jax.tree.leaves(elsewhere)[0].sharding.device_set
found["restored"] = [step, difference(jax.device_get(sharded), jax.device_get(elsewhere)), len(devices)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    flags = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
    paths = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths}
    words = [
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path_factory.mktemp("mesh")),
        json.dumps([shape for shape, _ in CUT]),
    ]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_compute_what_one_does(found):
    assert found["difference"] < 1e-4
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5)
    assert found["programs"] == 1


def test_micro_batches_do_too(found):
    difference, first, cut = found["accumulated"]
    assert difference < 1e-4
    assert cut == pytest.approx(first, rel=1e-5)


def test_weights_moments_and_averages_are_cut_up(found):
    whole, part = found["bytes"]
    assert whole / 4 <= part < 1.1 * whole / 4
    for specs in found["specs"].values():
        assert all("'fsdp'" in spec and "data" not in spec for spec in specs)
    assert found["batch"] == [2, 4]  # of [16, 4]


def test_a_checkpoint_goes_onto_another_mesh(found):
    assert found["restored"] == [2, 0.0, 8]


def test_the_largest_axis_that_divides_is_cut(found):
    assert found["axes"] == [["fsdp" if i == axis else None for i in range(len(shape))] for shape, axis in CUT]


def test_too_few_devices_are_named():
    with pytest.raises(ValueError, match="mesh of 2 x 99 needs 198 devices, found"):
        mesh.make(Mesh(data=2, fsdp=99))


def test_one_device_is_a_mesh_as_well():
    placed = mesh.place(mesh.make(Mesh()), {"w": jnp.ones((4, 4))})
    assert placed["w"].sharding.is_fully_replicated
