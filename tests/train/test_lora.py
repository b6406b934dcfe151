"""Adapters: where they go, what they add, and that the converter reads the file back."""

import jax
import numpy as np
import pytest
import toy_training as toy

import convert
from lf_jax import checkpoint, loading
from lf_jax.checkpoint.tensorfile import TensorFile
from lf_jax.train import Lora, lora

NETWORK = {"dit": loading.random_module(toy.MODEL, 0)}


def adapters(settings: Lora) -> dict[str, jax.Array]:
    """Random ones; fresh ones change nothing."""
    fresh, key = lora.create(NETWORK, settings, jax.random.key(1)), jax.random.key(2)
    return {name: jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, (name, x) in enumerate(fresh.items())}


def pairs(factors: dict[str, jax.Array]):
    return [(name.removesuffix(".a"), a) for name, a in factors.items() if name.endswith(".a")]


def test_every_linear_layer_of_the_blocks_is_adapted():
    attentions = [f"dit.blocks.{a}_attention.{p}" for a in ("self", "cross") for p in "qkvo"]
    assert sorted(lora.adapted(NETWORK)) == sorted([*attentions, "dit.blocks.ffn.up", "dit.blocks.ffn.down"])


def test_fresh_adapters_change_nothing():
    settings = Lora(rank=3, alpha=6.0)
    fresh = lora.create(NETWORK, settings, jax.random.key(0))
    assert fresh["dit.blocks.ffn.up.a"].shape == (2, 16, 3) and fresh["dit.blocks.ffn.up.b"].shape == (2, 3, 32)
    assert 0.2 < np.abs(fresh["dit.blocks.ffn.up.a"]).max() <= 0.25  # up to 1 / sqrt(16)
    before, after = (checkpoint.flatten(network) for network in (NETWORK, lora.merge(NETWORK, fresh, settings)))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_converter_merges_what_was_saved(alpha, tmp_path):
    settings = Lora(rank=4, alpha=alpha)
    factors = adapters(settings)
    lora.save(tmp_path / "lora.safetensors", factors, settings)
    checkpoint.save_component(tmp_path / "model", "dit", toy.MODEL, NETWORK["dit"])
    checkpoint.save_settings(tmp_path / "model", toy.CONFIG)
    convert.convert("longlive", tmp_path / "lora.safetensors", tmp_path / "model")
    _, found = checkpoint.load_component(tmp_path / "model", "dit")
    found, ours = checkpoint.flatten(found), checkpoint.flatten(lora.merge(NETWORK, factors, settings)["dit"])
    base, scale = checkpoint.flatten(NETWORK["dit"]), 1.0 if alpha is None else alpha / 4
    updates = {layer: scale * np.asarray(a @ factors[layer + ".b"]) for layer, a in pairs(factors)}
    for name, array in found.items():
        layer = f"dit.{name.removesuffix('.kernel')}"
        update = updates.get(layer, 0) if name.endswith(".kernel") else 0
        if name == "blocks.self_attention.qkv.kernel":
            update = np.stack([updates[f"dit.blocks.self_attention.{p}"].swapaxes(1, 2) for p in "qkv"], axis=1)
        np.testing.assert_allclose(array, base[name] + update, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours[name], array, rtol=1e-5, atol=1e-5)


def test_files_have_the_names_of_longlive(tmp_path):
    lora.save(tmp_path / "a.safetensors", adapters(Lora(rank=4)), Lora(rank=4))
    entries = TensorFile(tmp_path / "a.safetensors").entries
    layers = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    assert set(entries) == {
        f"base_model.model.blocks.{i}.{layer}.lora_{f}.weight" for i in range(2) for layer in layers for f in "AB"
    }
    assert entries["base_model.model.blocks.1.ffn.0.lora_A.weight"].shape == (4, 16)
    assert entries["base_model.model.blocks.1.ffn.0.lora_B.weight"].shape == (32, 4)
