"""Conversion of files that torch wrote, and of the numbers that torch computes with them."""

import os
import pathlib

import fake_checkpoints as fake
import numpy as np
import pytest

import convert
from convert.rules import ConversionError
from lf_jax import checkpoint
from lf_jax.config import Config

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

PRESET = Config(model=fake.MODEL, vae=fake.VAE, text=fake.TEXT)


def state_dict(seed: int, dtype=torch.float32, table: str = "wan", part=fake.MODEL) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x).to(dtype) for name, x in fake.tensors(table, part, seed).items()}


def wrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As FSDP, activation checkpointing and torch.compile leave the names of an averaged model."""
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.")
        name = name.replace("blocks.2.", "blocks.2._orig_mod.")
        found[f"model._fsdp_wrapped_module.{name}"] = tensor
    return found


def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_generator_and_its_average_come_back_bit_by_bit(dtype, zipped, tmp_path):
    plain, averaged = state_dict(0, dtype), state_dict(1)
    file = {"generator": prefixed(plain), "critic": {"w": torch.zeros(2)}, "generator_ema": wrapped(averaged), "step": 7}
    torch.save(file, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    for ema, tensors in ((False, plain), (True, averaged)):
        target = tmp_path / f"dir{ema}"
        convert.convert("self_forcing", tmp_path / "model.pt", target, ema=ema, preset=PRESET)
        convert.export(target, "dit", "self_forcing", tmp_path / f"{ema}.pt")
        found = torch.load(tmp_path / f"{ema}.pt", weights_only=True)
        assert list(found) == ["generator"]
        assert_identical(found["generator"], prefixed(tensors))


def test_half_a_generator_is_refused(tmp_path):
    torch.save({"generator_ema": wrapped(state_dict(0))}, tmp_path / "ema.pt")
    with pytest.raises(
        ValueError, match=r"has no generator or model .*; the averaged weights are taken when asked for \(ema\)"
    ):
        convert.convert("self_forcing", tmp_path / "ema.pt", tmp_path / "dir", preset=PRESET)
    torch.save({"generator": prefixed(state_dict(0))}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="has no generator_ema, only generator"):
        convert.convert("self_forcing", tmp_path / "plain.pt", tmp_path / "dir", preset=PRESET, ema=True)


def test_transposed_storage_and_parameters(tmp_path):
    tensors = state_dict(0, torch.bfloat16)
    stored = {name: torch.nn.Parameter(t.T.contiguous().T if t.ndim == 2 else t) for name, t in tensors.items()}
    torch.save(stored, tmp_path / "m.pt")
    convert.convert("self_forcing", tmp_path / "m.pt", tmp_path / "dir", preset=PRESET)
    convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "o.pth")
    assert_identical(torch.load(tmp_path / "o.pth", weights_only=True), tensors)


@pytest.mark.parametrize(
    "content", [b"hi\n", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 64]
)
def test_a_file_that_is_something_else(content, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="m.pt is (truncated|no checkpoint)"):
        convert.convert("self_forcing", path, tmp_path / "dir", preset=PRESET)


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_file(keep, zipped, tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"generator": prefixed(state_dict(0))}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
    with pytest.raises(ValueError, match="m.pt is (truncated|no checkpoint)"):
        convert.convert("self_forcing", path, tmp_path / "dir", preset=PRESET)
    assert not (tmp_path / "dir").exists()


class Attack:
    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_executed(tmp_path):
    torch.save({"generator": prefixed(state_dict(0)), "extra": Attack(tmp_path / "executed")}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="holds more than tensors, which is never executed here"):
        convert.convert("self_forcing", tmp_path / "m.pt", tmp_path / "dir", preset=PRESET)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "dir").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list, expected a dictionary"),
        ({"generator": {}}, "holds no tensors"),
        ({"generator": {"a": torch.zeros(1), "step": 3}}, "values that are no tensors: step"),
        ({"epoch": 1, "optimizer": {"a": 1}}, "has no generator or model .*only epoch, optimizer"),
    ],
)
def test_files_that_are_no_checkpoint(content, message, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        convert.convert("self_forcing", tmp_path / "m.pt", tmp_path / "dir", preset=PRESET)


def test_names_that_meet_without_their_prefixes(tmp_path):
    tensors = state_dict(0)
    both = prefixed(tensors) | {"head.head.bias": tensors["head.head.bias"]}
    torch.save({"generator": both}, tmp_path / "m.pt")
    with pytest.raises(ConversionError, match="head.head.bias: model.head.head.bias, head.head.bias"):
        convert.convert("self_forcing", tmp_path / "m.pt", tmp_path / "dir", preset=PRESET)


def test_longlive_folder_is_merged_as_peft_does(tmp_path):
    tensors, random = state_dict(0), torch.Generator().manual_seed(0)
    update, expected = {}, dict(tensors)
    for layer in ("blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.2.ffn.2"):
        weight = tensors[f"{layer}.weight"]
        a = torch.randn(4, weight.shape[1], generator=random)
        b = torch.randn(weight.shape[0], 4, generator=random)
        update |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
        expected[f"{layer}.weight"] = weight + b @ a
    (tmp_path / "s").mkdir()
    torch.save({"generator": prefixed(tensors)}, tmp_path / "s/longlive_base.pt")
    torch.save({"generator_lora": update, "critic_lora": {}, "step": 3}, tmp_path / "s/lora.pt")
    convert.convert("longlive", tmp_path / "s", tmp_path / "dir", preset=PRESET)
    convert.export(tmp_path / "dir", "dit", "longlive", tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)["generator"]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], tensor, rtol=0, atol=2e-6)
    convert.convert("longlive", tmp_path / "s/longlive_base.pt", tmp_path / "two", preset=PRESET)
    convert.convert("longlive", tmp_path / "s/lora.pt", tmp_path / "two", preset=PRESET)
    convert.export(tmp_path / "two", "dit", "longlive", tmp_path / "two.pt")
    assert_identical(torch.load(tmp_path / "two.pt", weights_only=True)["generator"], found)


def test_float8_file_of_torch(tmp_path):
    tensors, file, expected = state_dict(0), {}, {}
    for name, tensor in tensors.items():
        file[name] = expected[name] = tensor
        if name.startswith("blocks.") and tensor.ndim == 2:
            scale = tensor.abs().amax(1, keepdim=True).clamp(min=1e-5) / 448
            file[name] = (tensor / scale).to(torch.float8_e4m3fn)
            file[f"{name}_scale"] = scale
            expected[name] = file[name].float() * scale
    torch.save(prefixed(file), tmp_path / "fp8.pt")
    convert.convert("lightx2v_fp8", tmp_path / "fp8.pt", tmp_path / "dir", preset=PRESET)
    convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "plain.pt")
    assert_identical(torch.load(tmp_path / "plain.pt", weights_only=True), expected)
    convert.export(tmp_path / "dir", "dit", "lightx2v_fp8", tmp_path / "back.pt")
    assert_identical(torch.load(tmp_path / "back.pt", weights_only=True), prefixed(file))


def test_the_folder_that_wan_ships(tmp_path):
    source = tmp_path / "Wan2.1-T2V-1.3B"
    fake.write(source / "diffusion_pytorch_model.safetensors", fake.tensors("wan", fake.MODEL), fake.WAN_SETTINGS)
    components = {
        "vae": ("wan_vae", fake.VAE, "Wan2.1_VAE.pth"),
        "text": ("umt5", fake.TEXT, "models_t5_umt5-xxl-enc-bf16.pth"),
    }
    for table, part, name in components.values():
        torch.save(state_dict(0, torch.bfloat16, table, part), source / name)
    (source / "google/umt5-xxl").mkdir(parents=True)
    (source / "google/umt5-xxl/spiece.model").write_bytes(b"vocabulary")
    convert.convert("wan", source, tmp_path / "dir", preset=PRESET)
    assert checkpoint.components(tmp_path / "dir") == ("dit", "vae", "text")
    assert (tmp_path / "dir/text/spiece.model").read_bytes() == b"vocabulary"
    for component, (family, part, _) in components.items():
        convert.export(tmp_path / "dir", component, family, tmp_path / f"{component}.pth")
        found = torch.load(tmp_path / f"{component}.pth", weights_only=True)
        assert_identical(found, state_dict(0, torch.bfloat16, family, part))


def test_torch_rounds_as_we_do(tmp_path):
    tensors = state_dict(0)
    torch.save({"generator": prefixed(tensors)}, tmp_path / "m.pt")
    convert.convert("self_forcing", tmp_path / "m.pt", tmp_path / "dir", preset=PRESET, dtype="bfloat16")
    convert.export(tmp_path / "dir", "dit", "wan", tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert_identical(found, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    kernel = checkpoint.load_component(tmp_path / "dir", "dit")[1].head.linear.kernel[...]
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), tensors["head.head.weight"].T.to(torch.bfloat16).float())
