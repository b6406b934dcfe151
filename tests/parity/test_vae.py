"""The Wan autoencoder against diffusers' `AutoencoderKLWan`: random weights, through its own folder and our converter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.conversion import convert
from convert.exporting import export
from convert.families import wan_vae
from convert.rules import pieces_of, plan
from lf_jax import checkpoint, vae
from lf_jax.config import Vae

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

TOLERANCE = 1e-4  # relative distance; seen: 2e-6


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(base_dim=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
            if name.endswith("gamma"):
                parameter.mul_(0.3).add_(1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    place = tmp_path_factory.mktemp("wan") / "vae"
    original.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted")
    convert("diffusers", folder, target)
    return target


@pytest.fixture(scope="module")
def ours(converted):
    part, module = checkpoint.load_component(converted, "vae")
    assert part == Vae(base=8, dtype="float32")
    return module


def compiled(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def distance(x, want):
    return np.linalg.norm(np.asarray(x) - want) / np.linalg.norm(want)


def last(x):
    """[b, c, f, h, w] of torch to ours."""
    return x.permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode(original, ours, frames):
    video = np.random.default_rng(1).uniform(-1, 1, (2, frames, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        mode = last(original.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist.mode())
    want = (mode - np.float32(original.config.latents_mean)) / np.float32(original.config.latents_std)
    assert want.std() > 0.1
    assert distance(compiled(vae.encode)(ours, jnp.asarray(video)), want) < TOLERANCE


@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_decode(original, ours, latent_frames):
    latents = np.random.default_rng(2).normal(size=(2, latent_frames, 2, 3, 16)).astype(np.float32)
    raw = latents * np.float32(original.config.latents_std) + np.float32(original.config.latents_mean)
    with torch.no_grad():
        want = last(original.decode(torch.from_numpy(raw).permute(0, 4, 1, 2, 3)).sample)
    assert want.shape[1] == 4 * latent_frames - 3 and want.std() > 0.1 and np.mean(np.abs(want) < 1) > 0.5
    chunk, _ = compiled(vae.decode_chunk)(ours, jnp.asarray(latents))
    assert distance(chunk, want) < TOLERANCE
    if latent_frames == 3:
        assert distance(compiled(vae.decode)(ours, jnp.asarray(latents)), want) < TOLERANCE


def test_export_gives_the_original_back(folder, converted, tmp_path):
    export(converted, "vae", "diffusers", tmp_path / "back.safetensors")
    (file,) = folder.glob("*.safetensors")
    want, back = load_file(file), load_file(tmp_path / "back.safetensors")
    assert set(want) == set(back)
    for name, tensor in want.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize(
    "part, parameters, spots",
    [
        (
            Vae(),
            126_892_531,
            {
                "encoder.conv1.weight": (96, 3, 3, 3, 3),
                "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
                "encoder.downsamples.5.time_conv.weight": (192, 192, 3, 1, 1),
                "encoder.downsamples.8.resample.1.weight": (384, 384, 3, 3),
                "encoder.middle.1.norm.gamma": (384, 1, 1),
                "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
                "encoder.head.2.weight": (32, 384, 3, 3, 3),
                "conv1.weight": (32, 32, 1, 1, 1),
                "decoder.conv1.weight": (384, 16, 3, 3, 3),
                "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
                "decoder.upsamples.4.residual.2.weight": (384, 192, 3, 3, 3),
                "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
                "decoder.head.0.gamma": (96, 1, 1, 1),
                "decoder.head.2.bias": (3,),
            },
        ),
        (
            Vae(base=24),
            8_035_003,
            {
                "encoder.conv1.weight": (24, 3, 3, 3, 3),
                "encoder.middle.1.to_qkv.weight": (288, 96, 1, 1),
                "encoder.head.2.weight": (32, 96, 3, 3, 3),
                "conv2.weight": (16, 16, 1, 1, 1),
                "decoder.upsamples.7.resample.1.weight": (48, 96, 3, 3),
                "decoder.upsamples.4.residual.2.weight": (96, 48, 3, 3, 3),
                "decoder.head.2.weight": (3, 24, 3, 3, 3),
            },
        ),
    ],
    ids=["wan", "light"],
)
def test_original_names_at_full_size(part, parameters, spots):
    """Wan's own names fill every parameter once, both ways, and tell the config."""
    targets, rules = checkpoint.shapes(part), wan_vae.rules(part)
    shapes = {piece.source: piece.shape for piece in pieces_of(rules, targets)}
    assert len(shapes) == 194 and sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    assert {name: shapes.get(name) for name in spots} == spots
    assert wan_vae.describe(shapes) == part
    assert sorted(piece.target for piece in plan(rules, shapes, targets)) == sorted(targets)


def test_both_namings_lead_to_the_same_weights(converted, ours, tmp_path):
    """Written under Wan's own names and read again."""
    export(converted, "vae", "wan_vae", tmp_path / "vae.safetensors")
    convert("wan_vae", tmp_path / "vae.safetensors", tmp_path / "again")
    part, again = checkpoint.load_component(tmp_path / "again", "vae")
    assert part == ours.config
    for x, want in zip(jax.tree.leaves(again), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(x, want)


def test_a_folder_of_another_autoencoder_is_refused(folder):
    (file,) = folder.glob("*.safetensors")
    shapes = {name: tensor.shape for name, tensor in load_file(file).items()}
    with pytest.raises(ValueError, match="missing encoder.conv1.weight, conv2.weight"):
        wan_vae.describe(shapes)
