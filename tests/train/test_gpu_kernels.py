"""On a GPU losses run through its kernels and yet have gradients. Traced as on an H200, for shapes: nothing is computed.

JAX refuses to differentiate the kernels: each has gradients of its own, gives way to XLA, or lies where no gradient flows.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_rollout import change

from lf_jax import attention, checkpoint, presets, train
from lf_jax.config import Vae
from lf_jax.train import mesh, state
from lf_jax.train.objectives import Autoencoder, Distillation, Flow, OdePairs, TeacherForcing
from pallas_kernels import conv, fused, linear, platform, selection
from pallas_kernels.block_sparse import api as block_sparse

CONFIG = change(
    model=dict(dim=128, ffn_dim=256, layers=1, channels=16, dtype="bfloat16"),
    vae=dataclasses.asdict(Vae(base=16, multipliers=(1, 2), res_blocks=1, temporal=(True,))),
    video=dict(height=32, width=64, num_frames=11),  # 6 latent frames of 128 tokens, two chunks
    sparsity=dict(policy="light_forcing", target=0.5, base=0.7),
)
ASKED = ("reason", "slow", "automatic")  # of an implementation: what is no computation
KERNELS = {  # by package: those of a GPU
    "attention": (block_sparse.IMPLEMENTATIONS, ("hopper", "triton")),
    "selection": (selection.api.IMPLEMENTATIONS, ("triton",)),
    "convolution": (conv.api.IMPLEMENTATIONS, ("hopper",)),
    "fused": (fused.api.IMPLEMENTATIONS, ("triton",)),
    "linear": (linear.api.IMPLEMENTATIONS, ("hopper",)),
}
SPARSE = {"attention", "selection", "fused"}  # of a causal transformer that is trained: its weights are float32
FROZEN = {"linear"}  # of a teacher, in bfloat16
Shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)


@pytest.fixture
def ran(monkeypatch):
    """The kernels of a GPU that were traced, by package. cuDNN asks the GPU itself, and is left out."""
    monkeypatch.setattr(platform, "device", lambda: platform.Device("gpu", "NVIDIA H200", (9, 0), 1, 1))
    monkeypatch.setitem(attention.DENSE, "cudnn", attention.DENSE["cudnn"]._replace(reason=lambda q: "left out"))
    found = set()

    def watch(package, run):
        def watched(*arguments, **options):
            found.add(package)
            return run(*arguments, **options)

        return watched

    for package, (table, names) in KERNELS.items():
        for name in names:
            parts = {field: watch(package, run) for field, run in table[name]._asdict().items() if field not in ASKED}
            monkeypatch.setitem(table, name, table[name]._replace(**parts))
    return found


def masters(part):
    """A component whose weights are float32, what it computes is not."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), checkpoint.abstract(part))


def trace(objective, names, component, part, batch):
    """The gradients of networks of one component, which are float32 too."""
    trained = {name: {component: masters(part)} for name in names}
    frozen = {"teacher": checkpoint.abstract(CONFIG.model), "vae": checkpoint.abstract(CONFIG.vae)}

    def gradients(trained, frozen, batch):
        key = jax.random.key(0)
        return {name: objective.gradients(name, trained, frozen, batch, key, CONFIG)[0] for name in names}

    found = jax.eval_shape(gradients, trained, frozen, batch)
    assert checkpoint.flatten(found) == checkpoint.flatten(trained)


@pytest.mark.parametrize(
    "objective, names, expected",
    [
        (Distillation(), ("generator", "critic"), SPARSE | FROZEN),
        (TeacherForcing(), ("model",), SPARSE),
        (OdePairs(), ("model",), SPARSE | FROZEN),
        (Flow(), ("model",), {"fused"}),  # attention of one chunk is dense
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else "",
)
def test_losses_of_transformers(ran, objective, names, expected):
    text = Shape((1, 6, 8))
    batch = {"latents": Shape((1, 6, 16, 32, 16)), "text": text, "negative": text}
    trace(objective, names, "dit", CONFIG.model, batch)
    assert ran == expected


@pytest.mark.parametrize("frozen", [False, True])
def test_convolutions_run_through_the_kernel_where_no_gradient_flows(ran, frozen):
    video = {"video": Shape((1, 11, 32, 64, 3)), "text": Shape((1, 6, 8))}
    if frozen:
        trace(Flow(caption_dropout=0.0), ("model",), "dit", CONFIG.model, video)
    else:
        trace(Autoencoder(), ("model",), "vae", CONFIG.vae, video)
    assert ran == ({"convolution", "fused"} if frozen else set())


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_an_update_at_full_size(ran, name):
    plan = train.load("light_forcing_1_3b_dmd")
    config, devices = plan.config, mesh.make(plan.mesh)
    network = {"dit": checkpoint.abstract(config.model)}
    before = jax.eval_shape(partial(state._create, plan), {role: checkpoint.flatten(network) for role in plan.optimizers})
    fixed = state.Fixed({"teacher": checkpoint.abstract(presets.load("wan_1_3b").model)}, dict.fromkeys(plan.optimizers))
    assemble = dict.fromkeys(plan.optimizers, partial(state._whole, network))
    text = Shape((1, config.text.length, config.text.dim))
    run = partial(state.update, plan, config, devices, assemble, name)
    after, metrics = jax.eval_shape(run, before, fixed, {"text": text, "negative": text}, jnp.int32(0))
    assert after == before
    assert {f"{name}/loss", f"{name}/exit"} <= metrics.keys()
    assert ran == (SPARSE | FROZEN if name == "generator" else SPARSE)
    size = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((before, fixed)))
    assert 39.5 < size / 2**30 < 39.8  # of the 61 GiB in docs/training.md
