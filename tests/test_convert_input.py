"""What a converter is given besides good checkpoints: LoRAs, float8, wrong and broken files, too much for the memory."""

import os
import pathlib
import re
import subprocess
import sys

import fake_checkpoints as fake
import ml_dtypes
import numpy as np
import pytest

import convert
from convert.families.lightx2v_fp8 import quantise
from convert.rules import ConversionError, pieces_of
from lf_jax import checkpoint, config

BASE = {f"model.{name}": tensor for name, tensor in fake.tensors("wan", fake.MODEL).items()}
UPDATED = ("blocks.0.self_attn.q", "blocks.2.cross_attn.o", "blocks.1.ffn.0")


def lora(style: str = "peft", rank: int = 4, alpha: float | None = None) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(1), {}
    for layer in UPDATED:
        out, inputs = BASE[f"model.{layer}.weight"].shape
        a, b = random.standard_normal((rank, inputs), np.float32), random.standard_normal((out, rank), np.float32)
        name, down, up = {
            "peft": (f"base_model.model.{layer}", "lora_A", "lora_B"),
            "peft_default": (f"base_model.model.{layer}", "lora_A.default", "lora_B.default"),
            "kohya": (f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up"),
            "comfy": (f"diffusion_model.{layer}", "lora_A", "lora_B"),
        }[style]
        found |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
        if alpha is not None:
            found[f"{name}.alpha"] = np.array(alpha, np.float32)
    return found


def merged(scale: float) -> dict[str, np.ndarray]:
    """The base with `lora()` added, in float64."""
    factors, found = lora(), dict(BASE)
    for layer in UPDATED:
        a, b = (factors[f"base_model.model.{layer}.lora_{f}.weight"].astype(np.float64) for f in "AB")
        found[f"model.{layer}.weight"] = BASE[f"model.{layer}.weight"] + scale * b @ a
    return found


def base(folder: pathlib.Path, dtype=np.float32) -> pathlib.Path:
    tensors = {name: tensor.astype(dtype) for name, tensor in BASE.items()}
    return fake.write(folder / "base.safetensors", tensors, fake.WAN_SETTINGS)


def exported(folder: pathlib.Path, family: str = "longlive") -> dict[str, np.ndarray]:
    return fake.read(convert.export(folder, "dit", family, folder / "out.safetensors", overwrite=True))


# ---- LoRA ----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["peft", "peft_default", "kohya", "comfy"])
def test_lora_is_merged_at_conversion(style, tmp_path):
    fake.write(tmp_path / "lora.safetensors", lora(style, alpha=8.0))
    convert.convert("longlive", base(tmp_path / "s"), tmp_path / "dir", lora=tmp_path / "lora.safetensors", lora_scale=0.5)
    found, expected = exported(tmp_path / "dir"), merged(scale=0.5 * 8.0 / 4)
    for name in expected:
        if name.removeprefix("model.").removesuffix(".weight") in UPDATED:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-6)
            assert np.abs(found[name] - BASE[name]).max() > 1
        else:
            np.testing.assert_array_equal(found[name], BASE[name])


def test_lora_is_added_in_float32_and_rounded_once(tmp_path):
    fake.write(tmp_path / "lora.safetensors", lora())
    source = base(tmp_path / "s", ml_dtypes.bfloat16)
    convert.convert("longlive", source, tmp_path / "dir", lora=tmp_path / "lora.safetensors")
    found, factors = exported(tmp_path / "dir"), lora()
    for layer in UPDATED:
        a, b = (factors[f"base_model.model.{layer}.lora_{f}.weight"] for f in "AB")
        rounded = BASE[f"model.{layer}.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[f"model.{layer}.weight"], (b @ a + rounded).astype(ml_dtypes.bfloat16))


def test_lora_alone_goes_onto_a_converted_base_once(tmp_path):
    update = fake.write(tmp_path / "lora.safetensors", lora())
    with pytest.raises(ValueError, match="has no transformer to add it to: convert the base first"):
        convert.convert("longlive", update, tmp_path / "dir")
    convert.convert("longlive", base(tmp_path / "s"), tmp_path / "dir")
    convert.convert("longlive", update, tmp_path / "dir")
    once = exported(tmp_path / "dir")
    convert.convert("longlive", base(tmp_path / "s"), tmp_path / "both", lora=update)
    fake.assert_identical(once, exported(tmp_path / "both"))
    for folder in ("dir", "both"):
        assert [note["file"] for note in checkpoint.load_notes(tmp_path / folder, "dit")["lora"]] == ["lora.safetensors"]
        with pytest.raises(ValueError, match=r"lora.safetensors is merged into .* already"):
            convert.convert("longlive", update, tmp_path / folder)


def test_lora_faults_are_reported_together(tmp_path):
    update = lora()
    update["base_model.model.blocks.9.self_attn.q.lora_A.weight"] = np.zeros((4, 32), np.float32)
    update["diffusion_model.blocks.0.self_attn.k.diff_b"] = np.zeros(32, np.float32)
    del update["base_model.model.blocks.1.ffn.0.lora_B.weight"]
    update["base_model.model.blocks.0.self_attn.q.lora_A.weight"] = np.zeros((4, 31), np.float32)
    fake.write(tmp_path / "lora.safetensors", update)
    with pytest.raises(ConversionError) as caught:
        convert.convert("longlive", base(tmp_path / "s"), tmp_path / "dir", lora=tmp_path / "lora.safetensors")
    faults = caught.value.faults
    assert [fault.split()[0] for fault in faults["unknown or without a layer"]] == [
        "base_model.model.blocks.9.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.0.self_attn.k.diff_b",
    ]
    assert faults["incomplete"] == ["blocks.1.ffn.0.weight: no B"]
    assert faults["wrong shape"] == ["blocks.0.self_attn.q.weight [32, 32]: A [4, 31], B [32, 4]"]
    assert not (tmp_path / "dir").exists()


# ---- float8 --------------------------------------------------------------------------------


def test_float8_is_multiplied_out_in_float32_for_other_families(tmp_path):
    stored = fake.float8(fake.tensors("wan", fake.MODEL))
    fake.write(tmp_path / "s/fp8.safetensors", stored, fake.WAN_SETTINGS)
    convert.convert("lightx2v_fp8", tmp_path / "s", tmp_path / "dir")
    found = exported(tmp_path / "dir", "self_forcing")
    scaled = [name for name in found if f"{name}_scale" in stored]
    assert len(scaled) == fake.MODEL.layers * 10
    for name in scaled:
        np.testing.assert_array_equal(found[name], stored[name].astype(np.float32) * stored[f"{name}_scale"])


@pytest.mark.parametrize("preset", [None, fake.CONFIG])
def test_float8_numbers_and_scales_stay_whatever_the_dtype_of_the_rest(preset, tmp_path):
    stored = fake.float8(fake.tensors("wan", fake.MODEL))
    fake.write(tmp_path / "s/fp8.safetensors", stored, fake.WAN_SETTINGS)
    convert.convert("lightx2v_fp8", tmp_path / "s", tmp_path / "dir", dtype="bfloat16", preset=preset)
    part, model = checkpoint.load_component(tmp_path / "dir", "dit")
    assert (part.linears, part.dtype) == ("fp8", "bfloat16")
    up, bias = model.blocks.ffn.up, stored["model.blocks.2.ffn.0.bias"]
    np.testing.assert_array_equal(up.values[2], stored["model.blocks.2.ffn.0.weight"])
    rows = up.values[2].astype(np.float32) * up.scale[2][:, None]
    bound = [448 * np.abs(rows).sum(-1).max(), np.abs(bias).max()]
    np.testing.assert_allclose(up.reach[2], bound, rtol=1e-6)
    found = exported(tmp_path / "dir", "lightx2v_fp8")
    assert sorted(found) == sorted(stored)
    for name, tensor in stored.items():
        if name.endswith("weight_scale") or tensor.dtype == ml_dtypes.float8_e4m3fn:
            assert found[name].tobytes() == tensor.tobytes()


def test_no_lora_goes_into_float8(tmp_path):
    stored = fake.float8(fake.tensors("wan", fake.MODEL))
    path = fake.write(tmp_path / "s/fp8.safetensors", stored, fake.WAN_SETTINGS)
    update = fake.write(tmp_path / "l/lora.safetensors", lora())
    with pytest.raises(ConversionError, match="too coarse to add to"):
        convert.convert("lightx2v_fp8", path, tmp_path / "dir", lora=update)
    convert.convert("lightx2v_fp8", path, tmp_path / "dir")
    with pytest.raises(ValueError, match="is quantised: a LoRA needs the full weights"):
        convert.convert("longlive", update, tmp_path / "dir")


def test_every_scale_comes_back():
    random = np.random.default_rng(0)
    weight = random.standard_normal((4096, 8), np.float32) * np.exp(random.uniform(-8, 8, (4096, 1))).astype(np.float32)
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(448)
    number = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    found_number, found_scale = quantise(number.astype(np.float32) * scale)
    assert found_number.tobytes() == number.tobytes()
    np.testing.assert_array_equal(found_number.astype(np.float32) * found_scale, number.astype(np.float32) * scale)
    zeros, smallest = quantise(np.zeros((2, 8), np.float32))
    assert not zeros.astype(np.float32).any() and (smallest == np.float32(1e-5) / np.float32(448)).all()


def test_float8_faults(tmp_path):
    stored = fake.float8(fake.tensors("wan", fake.MODEL))
    del stored["model.blocks.0.ffn.0.weight_scale"], stored["model.blocks.1.ffn.0.weight"]
    stored["model.blocks.2.ffn.0.weight_scale"] = np.ones((1, 1), np.float32)
    path = fake.write(tmp_path / "s/fp8.safetensors", stored, fake.WAN_SETTINGS)
    with pytest.raises(ConversionError) as caught:
        convert.convert("lightx2v_fp8", path, tmp_path / "dir")
    kinds = {kind: [fault.split()[0] for fault in found] for kind, found in caught.value.faults.items()}
    assert kinds == {
        "without its partner": ["blocks.1.ffn.0.weight_scale", "blocks.0.ffn.0.weight"],
        "no float8 e4m3 [out, in] with a scale [out, 1]": ["blocks.2.ffn.0.weight"],
    }
    fake.write(path, stored | {"model.blocks.0.ffn.0.weight_global_scale": np.ones(1, np.float32)})
    with pytest.raises(NotImplementedError, match="NVFP4"):
        convert.convert("lightx2v_fp8", path, tmp_path / "dir")


# ---- wrong input ---------------------------------------------------------------------------


def test_wrong_size_for_the_preset_names_every_tensor(tmp_path):
    with pytest.raises(ConversionError) as caught:
        preset = config.Config(model=config.Model(**{**vars(fake.MODEL), "dim": 64, "layers": 2}), text=fake.TEXT)
        convert.convert("self_forcing", base(tmp_path / "s"), tmp_path / "dir", preset=preset)
    faults = caught.value.faults
    assert "the source does not fit the preset (dim=64, not 32, layers=2, not 3)" in str(caught.value)
    wrong = "patch_embedding.weight: expected [64, 16, 1, 2, 2], received [32, 16, 1, 2, 2] (for patch_embedding.kernel)"
    assert wrong in faults["wrong shape"]
    surplus = {fault.split()[0] for fault in faults["unknown names in the source"]}
    assert surplus == {name.removeprefix("model.") for name in BASE if ".blocks.2." in name}
    assert not (tmp_path / "dir").exists()


def test_wrong_size_for_a_named_preset(tmp_path):
    with pytest.raises(ConversionError, match=r"preset \(dim=1536, not 32, [\s\S]*expected \[1536\], received \[32\]"):
        convert.convert("self_forcing", base(tmp_path / "s"), tmp_path / "dir", preset="self_forcing_1_3b")


def test_wrong_family(tmp_path):
    fake.write(tmp_path / "vae.safetensors", fake.tensors("wan_vae", fake.VAE))
    with pytest.raises(ValueError, match="not a Wan transformer of this layout: missing patch_embedding.weight"):
        convert.convert("self_forcing", tmp_path / "vae.safetensors", tmp_path / "dir")
    with pytest.raises(ValueError, match="family='sora' is none of wan, self_forcing"):
        convert.convert("sora", tmp_path / "vae.safetensors", tmp_path / "dir")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_source(keep, tmp_path):
    path = base(tmp_path / "s")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is (truncated|not a safetensors file)"):
        convert.convert("self_forcing", path, tmp_path / "dir")
    assert not (tmp_path / "dir").exists()


def test_wrong_source_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        convert.convert("wan", tmp_path / "absent", tmp_path / "dir")
    with pytest.raises(ValueError, match="holds nothing of this family; looked for .*Wan2.1_VAE.pth"):
        convert.convert("wan", tmp_path, tmp_path / "dir")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        convert.convert("self_forcing", tmp_path, tmp_path / "dir")
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="several checkpoints: a.safetensors, b.safetensors; name one"):
        convert.convert("self_forcing", tmp_path, tmp_path / "dir")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="notes.txt is none of .safetensors"):
        convert.convert("self_forcing", tmp_path / "notes.txt", tmp_path / "dir")


def test_files_of_torch_need_torch(tmp_path, monkeypatch):
    (tmp_path / "m.pt").write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"m.pt is a file of torch, which is not installed: pip install 'lf-jax\[convert\]'"):
        convert.convert("self_forcing", tmp_path / "m.pt", tmp_path / "dir")


def test_nothing_is_replaced_unasked(tmp_path):
    source = base(tmp_path / "s")
    convert.convert("self_forcing", source, tmp_path / "dir")
    with pytest.raises(ValueError, match=r"dit is there already; overwrite=True \(--overwrite\) replaces it"):
        convert.convert("self_forcing", source, tmp_path / "dir")
    convert.convert("self_forcing", source, tmp_path / "dir", overwrite=True)
    convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"out.safetensors is there already; overwrite=True \(--overwrite\)"):
        convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "out.safetensors")


def test_unwritable_target(tmp_path, monkeypatch):
    source = base(tmp_path / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/dir/dit cannot be written"):
        convert.convert("self_forcing", source, tmp_path / "file" / "dir")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="0.0 GB left, the result needs"):
        convert.convert("self_forcing", source, tmp_path / "dir")
    assert list((tmp_path / "dir").iterdir()) == []


def test_averaged_weights_must_be_there_when_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no averaged weights"):
        convert.convert("self_forcing", base(tmp_path / "s"), tmp_path / "dir", ema=True)


def test_lora_needs_a_transformer(tmp_path):
    fake.write(tmp_path / "vae.safetensors", fake.tensors("wan_vae", fake.VAE))
    with pytest.raises(ValueError, match="holds no transformer that lora="):
        convert.convert("wan_vae", tmp_path / "vae.safetensors", tmp_path / "dir", lora=tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    "component, family, target, message",
    [
        ("vae", "wan_vae", "o.safetensors", "has no vae, only dit"),
        ("dit", "wan_vae", "o.safetensors", "wan_vae has no dit, only vae"),
        ("dit", "wan", "o.npz", "must end in .safetensors, .pt or .pth"),
        ("dit", "sora", "o.safetensors", "family='sora' is none of"),
    ],
)
def test_wrong_export(component, family, target, message, tmp_path):
    convert.convert("self_forcing", base(tmp_path / "s"), tmp_path / "dir")
    with pytest.raises(ValueError, match=message):
        convert.export(tmp_path / "dir", component, family, tmp_path / target)
    assert not (tmp_path / target).exists()


# ---- memory --------------------------------------------------------------------------------

MEASURE = """
import pathlib, sys
import convert

def rss(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

small, large, out = map(pathlib.Path, sys.argv[1:])
convert.convert("wan", small, out / "small")
convert.export(out / "small", "dit", "wan", out / "small.safetensors")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = rss("VmRSS")
convert.convert("wan", large, out / "large", dtype=None)
print(rss("VmHWM") - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="measures by Linux' /proc")
def test_memory_stays_near_the_largest_tensor(tmp_path):
    part = config.Model(dim=512, ffn_dim=4096, heads=4, layers=8, freq_dim=8, text_dim=16, text_len=12, dtype="float32")
    pieces = pieces_of(fake.table("wan").rules(part), checkpoint.shapes(part))
    large = {piece.source: np.ones(piece.shape, np.float32) for piece in pieces}
    total, largest = sum(x.nbytes for x in large.values()), max(x.nbytes for x in large.values())
    assert total > 200e6 and largest < 9e6
    fake.write(tmp_path / "large/m.safetensors", large, {"num_heads": 4})
    fake.write(tmp_path / "small/m.safetensors", fake.tensors("wan", fake.MODEL), fake.WAN_SETTINGS)
    arguments = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(convert.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    measured = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=True)
    print(f"peak {int(measured.stdout) / 1e6:.1f} MB for {total / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB")
    assert int(measured.stdout) < 2 * largest + 15e6  # of which one is the source file's pages
