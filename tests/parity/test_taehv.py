"""The tiny autoencoder against an independent one in PyTorch, in TAEHV's names, through our converter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.conversion import convert
from convert.exporting import export
from convert.families import taehv
from convert.rules import pieces_of, plan
from lf_jax import checkpoint, vae
from lf_jax.config import Vae

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

FULL = Vae(kind="tiny", temporal=(True, True, False))
SMALL = Vae(kind="tiny", temporal=(True, True, False), widths=(12, 10, 8, 8), dtype="float32")
GROW = "decoder.13.conv.weight"  # two frames of 10 channels


class Network:
    """The published network as a function of a state dictionary, one frame after another, [b, c, h, w] each."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **options):
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return torch.nn.functional.conv2d(x, weight, self.state.get(f"{name}.bias"), padding=padding, **options)

    def memory(self, name, frames):
        made, before = [], torch.zeros_like(frames[0])
        for frame in frames:
            y = self.conv(f"{name}.conv.0", torch.cat([frame, before], dim=1)).relu()
            y = self.conv(f"{name}.conv.4", self.conv(f"{name}.conv.2", y).relu())
            made.append((y + frame).relu())
            before = frame
        return made

    def memories(self, side, first, frames):
        for i in range(first, first + 3):
            frames = self.memory(f"{side}.{i}", frames)
        return frames

    def decode(self, latents):
        frames = [self.conv("decoder.1", 3 * torch.tanh(z / 3)).relu() for z in latents]
        for first, times in ((3, 1), (9, 2), (15, 2)):
            grown = []
            for frame in self.memories("decoder", first, frames):
                large = frame.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                grown += self.conv(f"decoder.{first + 4}.conv", large).chunk(times, dim=1)
            frames = [self.conv(f"decoder.{first + 5}", frame) for frame in grown]
        return [self.conv("decoder.22", frame.relu()).clamp(0, 1) for frame in frames][3:]

    def encode(self, video):
        frames = [self.conv("encoder.0", frame).relu() for frame in video + [video[-1]] * (-len(video) % 4)]
        for first, times in ((2, 2), (7, 2), (12, 1)):
            groups = [torch.cat(frames[i : i + times], dim=1) for i in range(0, len(frames), times)]
            frames = [self.conv(f"encoder.{first + 1}", self.conv(f"encoder.{first}.conv", g), stride=2) for g in groups]
            frames = self.memories("encoder", first + 2, frames)
        return [self.conv("encoder.17", frame) for frame in frames]


def names(part):
    return {piece.source: piece.shape for piece in pieces_of(taehv.rules(part), checkpoint.shapes(part))}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    state = {name: torch.randn(shape) / max(1, np.prod(shape[1:])) ** 0.5 for name, shape in names(SMALL).items()}
    # Most pixels within [0, 1], so that clipping hides nothing.
    return {**state, "decoder.22.weight": 0.1 * state["decoder.22.weight"], "decoder.22.bias": torch.tensor([0.4, 0.5, 0.6])}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    """Saved by torch, with a map that grows three frames, of which the last two count."""
    path = tmp_path_factory.mktemp("source") / "taew2_1.pth"
    more = torch.cat([torch.full((10, 10, 1, 1), 9.0), state[GROW]])
    torch.save({**state, GROW: more}, path)
    return path


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted")
    convert("taehv", file, target)
    return target


def compiled(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def distance(x, want):
    return np.linalg.norm(np.asarray(x) - want) / np.linalg.norm(want)


def frames_of(x):
    return list(torch.from_numpy(x).permute(1, 0, 4, 2, 3))


def stacked(frames):
    return torch.stack(frames, dim=1).permute(0, 1, 3, 4, 2).numpy()


def test_decode(state, converted):
    part, ours = checkpoint.load_component(converted, "vae")
    assert part == SMALL
    latents = np.random.default_rng(1).normal(size=(2, 3, 2, 3, 16)).astype(np.float32)
    want = 2 * stacked(Network(state).decode(frames_of(latents))) - 1
    assert want.shape == (2, 9, 16, 24, 3) and want.std() > 0.1 and np.mean(np.abs(want) < 1) > 0.5
    assert distance(compiled(vae.decode)(ours, jnp.asarray(latents)), want) < 1e-4


@pytest.mark.parametrize("frames", [1, 9])
def test_encode(state, converted, frames):
    _, ours = checkpoint.load_component(converted, "vae")
    video = np.random.default_rng(2).uniform(-1, 1, (2, frames, 16, 24, 3)).astype(np.float32)
    want = stacked(Network(state).encode(frames_of((video + 1) / 2)))
    assert want.shape == (2, 1 + frames // 4, 2, 3, 16) and want.std() > 0.02
    assert distance(compiled(vae.encode)(ours, jnp.asarray(video)), want) < 1e-4


def test_light_tae_takes_raw_latents(file, tmp_path):
    convert("light_tae", file, tmp_path)
    part, _ = checkpoint.load_component(tmp_path, "vae")
    assert part.scaled


def test_export_gives_the_maps_in_use_back(state, converted, tmp_path):
    export(converted, "vae", "taehv", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_names_at_full_size():
    targets, rules, shapes = checkpoint.shapes(FULL), taehv.rules(FULL), names(FULL)
    assert len(shapes) == 128 and sum(int(np.prod(shape)) for shape in shapes.values()) == 11_315_539
    spots = {
        "encoder.2.conv.weight": (64, 128, 1, 1),
        "encoder.3.weight": (64, 64, 3, 3),
        "encoder.12.conv.weight": (64, 64, 1, 1),
        "encoder.17.bias": (16,),
        "decoder.3.conv.0.weight": (256, 512, 3, 3),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.22.weight": (3, 64, 3, 3),
    }
    assert {name: shapes.get(name) for name in spots} == spots
    assert taehv.describe(shapes) == FULL
    assert sorted(piece.target for piece in plan(rules, shapes, targets)) == sorted(targets)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"encoder.0.weight": (64, 12, 3, 3)}, "12 channels, expected 3"),
        ({"decoder.1.weight": None}, "missing decoder.1.weight"),
        ({"decoder.20.weight": (32, 64, 3, 3)}, "32 wide, the encoder is 64 wide"),
    ],
)
def test_relatives_for_other_models_are_refused(change, text):
    shapes = {name: shape for name, shape in {**names(FULL), **change}.items() if shape is not None}
    with pytest.raises(ValueError, match=text):
        taehv.describe(shapes)
