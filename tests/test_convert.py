"""Conversion without torch: tables, faults, every family there and back, interruption, memory."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import fake_checkpoints as fake
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert
from convert.families import FAMILIES
from convert.rules import ConversionError, Rule, pieces_of, plan
from convert.transforms import CONV2D, CONV3D, LINEAR, PATCH, POINTWISE2D, POINTWISE3D, SAME, chain, ones, transpose
from lf_jax import checkpoint, presets

# ---- transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform, source, target",
    [
        (SAME, (3, 4), (3, 4)),
        (LINEAR, (3, 4), (4, 3)),
        (CONV2D, (2, 3, 4, 5), (4, 5, 3, 2)),
        (CONV3D, (2, 3, 4, 5, 6), (4, 5, 6, 3, 2)),
        (POINTWISE2D, (2, 3, 1, 1), (3, 2)),
        (POINTWISE3D, (2, 3, 1, 1, 1), (3, 2)),
        (PATCH((1, 2, 3)), (5, 4, 1, 2, 3), (24, 5)),
        (ones(1, 2), (1, 4, 1, 1), (4,)),
        (chain(transpose(2, 0, 1), ones(1)), (2, 3, 1), (2, 3)),
    ],
)
def test_transform_and_inverse(transform, source, target):
    x = np.arange(np.prod(source)).reshape(source)
    y = transform.forward(x)
    assert y.shape == target
    np.testing.assert_array_equal(transform.inverse(y), x)


def test_patch_rows_are_pixels_with_channels_innermost():
    patch, channels, out = (1, 2, 3), 4, 5
    x = np.arange(out * channels * 6).reshape(out, channels, *patch)
    y = PATCH(patch).forward(x)
    for h in range(2):
        for w in range(3):
            for c in range(channels):
                np.testing.assert_array_equal(y[(h * 3 + w) * channels + c], x[:, c, 0, h, w])


# ---- rules ---------------------------------------------------------------------------------

RULES = (
    Rule("blocks.{layer}.attn.{p:q|k}.weight", "blocks.attention.{p}.kernel", LINEAR),
    Rule("blocks.{layer}.{m:ffn.0=up|ffn.2=down}.bias", "blocks.{m}.bias"),
    Rule("blocks.{layer}.joined.{part:g=0|h=1}", "blocks.joined", LINEAR),
    Rule("stages.{i}.scale", "list.{i}.gain", ones(after=1)),
    Rule("freqs", None),
)
TARGETS = {
    "blocks.attention.q.kernel": (2, 4, 3),
    "blocks.attention.k.kernel": (2, 4, 3),
    "blocks.joined": (2, 2, 6, 4),
    "blocks.up.bias": (2, 5),
    "blocks.down.bias": (2, 5),
    "list.0.gain": (7,),
    "list.10.gain": (7,),
}
SOURCES = {
    **{f"blocks.{i}.attn.{p}.weight": (3, 4) for i in range(2) for p in "qk"},
    **{f"blocks.{i}.joined.{p}": (4, 6) for i in range(2) for p in "gh"},
    **{f"blocks.{i}.ffn.{n}.bias": (5,) for i in range(2) for n in (0, 2)},
    "stages.0.scale": (7, 1),
    "stages.10.scale": (7, 1),
    "freqs": (9,),
}


def test_plan_pairs_every_tensor_with_its_place():
    places = {piece.source: (piece.target, piece.index) for piece in plan(RULES, SOURCES, TARGETS)}
    assert places == {
        "blocks.0.attn.q.weight": ("blocks.attention.q.kernel", (0,)),
        "blocks.1.attn.q.weight": ("blocks.attention.q.kernel", (1,)),
        "blocks.0.attn.k.weight": ("blocks.attention.k.kernel", (0,)),
        "blocks.1.attn.k.weight": ("blocks.attention.k.kernel", (1,)),
        "blocks.0.joined.g": ("blocks.joined", (0, 0)),
        "blocks.0.joined.h": ("blocks.joined", (0, 1)),
        "blocks.1.joined.g": ("blocks.joined", (1, 0)),
        "blocks.1.joined.h": ("blocks.joined", (1, 1)),
        "blocks.0.ffn.0.bias": ("blocks.up.bias", (0,)),
        "blocks.1.ffn.0.bias": ("blocks.up.bias", (1,)),
        "blocks.0.ffn.2.bias": ("blocks.down.bias", (0,)),
        "blocks.1.ffn.2.bias": ("blocks.down.bias", (1,)),
        "stages.0.scale": ("list.0.gain", ()),
        "stages.10.scale": ("list.10.gain", ()),
    }


def test_pieces_of_is_the_inverse_of_plan():
    assert sorted(pieces_of(RULES, TARGETS), key=str) == sorted(plan(RULES, SOURCES, TARGETS), key=str)


def test_every_fault_is_reported_together():
    sources = SOURCES | {"blocks.2.attn.q.weight": (3, 4), "junk": (1,), "stages.0.scale": (6, 1), "other.0": (7, 1)}
    del sources["blocks.1.attn.k.weight"], sources["blocks.0.ffn.2.bias"]
    rules = (*RULES, Rule("other.{i}", "list.{i}.gain", ones(after=1)))
    with pytest.raises(ConversionError) as caught:
        plan(rules, sources, TARGETS | {"head.kernel": (2, 2)})
    faults, text = caught.value.faults, str(caught.value)
    assert [fault.split()[0] for fault in faults["unknown names in the source"]] == ["blocks.2.attn.q.weight", "junk"]
    missing = [fault.split()[0] for fault in faults["missing from the source"]]
    assert missing == ["blocks.1.attn.k.weight", "blocks.0.ffn.2.bias"]
    assert faults["wrong shape"] == ["stages.0.scale: expected [7, 1], received [6, 1] (for list.0.gain)"]
    assert faults["doubled: several source tensors for one parameter"] == ["list.0.gain: stages.0.scale, other.0"]
    assert faults["parameters of the model that no rule fills"] == ["head.kernel [2, 2]"]
    for found in faults.values():
        assert all(fault in text for fault in found)


def test_one_source_tensor_cannot_fill_two_parameters():
    rules = (Rule("w", "a"), Rule("w", "b"))
    with pytest.raises(ConversionError, match="w: a; b"):
        plan(rules, {"w": (2,)}, {"a": (2,), "b": (2,)})


def test_second_spelling_may_stand_beside_the_first_where_the_table_says_so():
    rules = (Rule("shared", "a"), Rule("tied", "a"), Rule("tied", None))
    for source in ({"shared": (2,)}, {"tied": (2,)}, {"shared": (2,), "tied": (2,)}):
        assert [piece.source for piece in plan(rules, source, {"a": (2,)})] == [next(iter(source))]


def test_a_14b_checkpoint_in_a_1_3b_model():
    small, large = (presets.load(name).model for name in ("wan_1_3b", "wan_14b"))
    rules = fake.table("wan").rules(small)
    source = {piece.source: piece.shape for piece in pieces_of(rules, checkpoint.shapes(large))}
    assert len(source) == 1095 and len(plan(rules, source, checkpoint.shapes(large))) == 1095
    with pytest.raises(ConversionError) as caught:
        plan(rules, source, checkpoint.shapes(small))
    faults = {kind: len(found) for kind, found in caught.value.faults.items()}
    assert faults == {"unknown names in the source": 10 * 27, "wrong shape": 825 - 1}  # all but the head's bias of 64


def test_long_reports_are_cut_but_counted():
    with pytest.raises(ConversionError, match=r"unknown names in the source \(50\):[\s\S]*and 38 more") as caught:
        plan((Rule("w", "a"),), {"w": (1,)} | {f"x{i}": (1,) for i in range(50)}, {"a": (1,)})
    assert len(caught.value.faults["unknown names in the source"]) == 50


@pytest.mark.parametrize("source, target", [("a.{i}", "b"), ("a", "b.{i}"), ("a.{i}.{i}", "b.{i}"), ("{layer}", "{layer}")])
def test_templates_are_checked_where_they_are_written(source, target):
    with pytest.raises(ValueError, match=r"\{"):
        Rule(source, target)


# ---- families ------------------------------------------------------------------------------

CASES = {  # family -> (table, part, file or folder inside the source, settings beside it)
    "wan": [("wan", fake.MODEL, "diffusion_pytorch_model.safetensors", fake.WAN_SETTINGS)],
    "self_forcing": [("self_forcing", fake.MODEL, "sf.safetensors", fake.WAN_SETTINGS)],
    "light_forcing": [("self_forcing", fake.MODEL, "lf.safetensors", fake.WAN_SETTINGS)],
    "longlive": [("self_forcing", fake.MODEL, "ll.safetensors", fake.WAN_SETTINGS)],
    "lightx2v_fp8": [("lightx2v_fp8", fake.MODEL, "fp8.safetensors", fake.WAN_SETTINGS)],
    "diffusers": [
        ("diffusers_wan", fake.MODEL, "transformer/diffusion_pytorch_model.safetensors", fake.DIFFUSERS_SETTINGS),
        ("diffusers_vae", fake.VAE, "vae/diffusion_pytorch_model.safetensors", None),
        ("hf_umt5", fake.TEXT, "text_encoder/model.safetensors", {}),
    ],
    "wan_vae": [("wan_vae", fake.VAE, "vae.safetensors", None)],
    "light_vae": [("wan_vae", fake.VAE, "lightvae.safetensors", None)],
    "taehv": [("taehv", fake.TINY_VAE, "taew2_1.safetensors", None)],
    "light_tae": [("taehv", fake.TINY_VAE, "lighttae.safetensors", None)],
    "umt5": [("umt5", fake.TEXT, "umt5.safetensors", None)],
    "hf_umt5": [("hf_umt5", fake.TEXT, "model.safetensors", {})],
}


def written(folder: pathlib.Path, family: str, dtype=np.float32) -> dict[str, dict[str, np.ndarray]]:
    """Writes a source of `family` and returns its tensors as stored, by component."""
    found = {}
    for table, part, file, settings in CASES[family]:
        tensors = fake.tensors(table, part, dtype=dtype)
        if table == "self_forcing":
            tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        if table == "lightx2v_fp8":
            tensors = fake.float8(tensors)
        fake.write(folder / file, tensors, settings)
        found[fake.table(table).COMPONENT] = tensors
    return found


def test_every_family_has_a_case():
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_identical(family, dtype, tmp_path):
    sources = written(tmp_path / "source", family, dtype)
    folders = convert.convert(family, tmp_path / "source", tmp_path / "dir")
    assert {name: path.name for name, path in folders.items()} == {name: name for name in sources}
    for name, tensors in sources.items():
        file = convert.export(tmp_path / "dir", name, family, tmp_path / f"{name}.safetensors")
        fake.assert_identical(fake.read(file), tensors)
        part, module = checkpoint.load_component(tmp_path / "dir", name)
        assert part.dtype == np.dtype(dtype).name
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in checkpoint.flatten(module).values())


def test_dimensions_are_read_off_the_source(tmp_path):
    written(tmp_path / "source", "diffusers")
    convert.convert("diffusers", tmp_path / "source", tmp_path / "dir")
    config = checkpoint.load_config(tmp_path / "dir")
    assert (config.model.dim, config.model.layers, config.model.heads) == (32, 3, 2)
    assert (config.vae.base, config.vae.channels) == (8, 16)
    assert (config.text.vocab, config.text.heads, config.text.layers) == (40, 2, 3)


def test_light_tae_says_that_its_latents_are_scaled(tmp_path):
    for family in ("taehv", "light_tae"):
        written(tmp_path / family, family)
        convert.convert(family, tmp_path / family, tmp_path / f"to_{family}")
        assert checkpoint.load_part(tmp_path / f"to_{family}", "vae").scaled == (family == "light_tae")


def test_several_components_share_a_folder_and_the_transformer_brings_the_settings(tmp_path):
    target = tmp_path / "dir"
    for family in ("wan_vae", "longlive", "umt5"):
        written(tmp_path / family, family)
        convert.convert(family, tmp_path / family, target)
    assert checkpoint.components(target) == ("dit", "vae", "text")
    assert checkpoint.load_part(target, "text") == dataclasses.replace(fake.TEXT, length=512)
    assert json.loads((target / "config.json").read_text())["cache"]["window"] == presets.load("longlive_1_3b").cache.window
    assert checkpoint.load_notes(target, "dit")["family"] == "longlive"


@pytest.mark.parametrize("place", ["spiece.model", "google/umt5-xxl/spiece.model", "tokenizer/spiece.model"])
def test_the_vocabulary_comes_along(place, tmp_path):
    (tmp_path / "source" / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "source" / place).write_bytes(b"vocabulary")
    written(tmp_path / "source", "umt5")
    convert.convert("umt5", tmp_path / "source/umt5.safetensors", tmp_path / "dir")
    assert (tmp_path / "dir/text/spiece.model").read_bytes() == b"vocabulary"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "keep"])
def test_dtype(dtype, tmp_path):
    tensors = written(tmp_path, "self_forcing")["dit"]
    tensors["model.head.head.bias"] = tensors["model.head.head.bias"].astype(ml_dtypes.bfloat16)
    fake.write(tmp_path / "sf.safetensors", tensors)
    convert.convert("self_forcing", tmp_path, tmp_path / "dir", dtype=dtype)
    stored = fake.read(tmp_path / "dir/dit/model.safetensors")
    wanted = "float32" if dtype == "keep" else dtype
    assert {name: x.dtype.name for name, x in stored.items()} == {
        name: "bfloat16" if (dtype, name) == ("keep", "head.linear.bias") else wanted for name in stored
    }
    part, module = checkpoint.load_component(tmp_path / "dir", "dit")
    assert part.dtype == wanted and module.head.linear.bias.dtype == jnp.dtype(wanted)
    expected = tensors["model.head.head.weight"].T.astype(jnp.dtype(wanted))
    np.testing.assert_array_equal(stored["head.linear.kernel"], expected)


def test_sharded_source(tmp_path):
    tensors = fake.tensors("wan", fake.MODEL)
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        fake.write(tmp_path / "s" / file, {n: tensors[n] for n in names if where[n] == file}, fake.WAN_SETTINGS)
    (tmp_path / "s/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    convert.convert("wan", tmp_path / "s", tmp_path / "dir")
    file = convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "out.safetensors")
    fake.assert_identical(fake.read(file), tensors)
    (tmp_path / "s" / where[names[0]]).unlink()
    with pytest.raises(ValueError, match="files that are not there: model-00001"):
        convert.convert("wan", tmp_path / "s", tmp_path / "dir2")


def test_wrapper_prefixes_go_and_names_that_meet_are_reported(tmp_path):
    tensors = fake.tensors("wan", fake.MODEL)
    wrapped = {
        "model._fsdp_wrapped_module."
        + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.").replace(
            "ffn.", "_orig_mod.ffn."
        ): x
        for name, x in tensors.items()
    }
    fake.write(tmp_path / "s/m.safetensors", wrapped, fake.WAN_SETTINGS)
    convert.convert("self_forcing", tmp_path / "s", tmp_path / "dir")
    exported = fake.read(convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "out.safetensors"))
    fake.assert_identical(exported, tensors)
    for name in ("head.head.weight", "blocks.0.ffn.0.bias"):
        wrapped[name] = tensors[name]
    fake.write(tmp_path / "s/m.safetensors", wrapped)
    with pytest.raises(ConversionError) as caught:
        convert.convert("self_forcing", tmp_path / "s", tmp_path / "dir2")
    assert [fault.split(":")[0] for fault in caught.value.faults["doubled names"]] == [
        "blocks.0.ffn.0.bias",
        "head.head.weight",
    ]
    assert not (tmp_path / "dir2").exists()


def test_orbax_target(tmp_path):
    tensors = written(tmp_path, "wan", ml_dtypes.bfloat16)["dit"]
    convert.convert("wan", tmp_path, tmp_path / "dir", format="orbax")
    assert not (tmp_path / "dir/dit/model.safetensors").exists()
    exported = convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "out.safetensors")
    fake.assert_identical(fake.read(exported), tensors)


# ---- killed, and large ---------------------------------------------------------------------


def test_failed_conversion_leaves_nothing_and_an_old_result_stays(tmp_path):
    tensors = written(tmp_path / "source", "wan")["dit"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert("wan", tmp_path / "source", tmp_path / "dir", progress=interrupt)
    assert list((tmp_path / "dir").iterdir()) == []
    convert.convert("wan", tmp_path / "source", tmp_path / "dir")
    with pytest.raises(KeyboardInterrupt):
        convert.convert("wan", tmp_path / "source", tmp_path / "dir", overwrite=True, progress=interrupt)
    exported = convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "out.safetensors")
    fake.assert_identical(fake.read(exported), tensors)


def test_killed_conversion_leaves_no_component_and_can_be_run_again(tmp_path):
    written(tmp_path / "source", "wan")
    script = (
        "import os, signal, sys, convert\n"
        "kill = lambda text, done, total: done * 2 > total and os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.convert('wan', sys.argv[1], sys.argv[2], progress=kill)\n"
    )
    root = pathlib.Path(convert.__file__).parents[1]
    arguments = [sys.executable, "-c", script, tmp_path / "source", tmp_path / "dir"]
    killed = subprocess.run(arguments, env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "dir").iterdir()) == [".dit.partial"]
    with pytest.raises(ValueError, match="not a converted folder"):
        checkpoint.load_component(tmp_path / "dir", "dit")
    convert.convert("wan", tmp_path / "source", tmp_path / "dir")
    assert sorted(path.name for path in (tmp_path / "dir").iterdir()) == ["config.json", "dit"]
    checkpoint.load_component(tmp_path / "dir", "dit")
