"""The transformer against diffusers' `WanTransformer3DModel`: random weights, through its own folder and our converter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.conversion import convert
from convert.exporting import export
from lf_jax import cache, checkpoint, config
from lf_jax.dit import forward, text_cache
from lf_jax.tokens import Grid

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.torch

BATCH, FRAMES, ROWS, COLUMNS, CHANNELS, TEXT_DIM = 2, 3, 3, 4, 4, 20
GRID = Grid(ROWS, COLUMNS, block_q=64, block_k=1)
DENSE = config.Sparsity()


def moved(model):
    """Away from initial zeros and ones, at sizes that keep attention and activations in their curved range."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(gain + 0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def original():
    sizes = {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 56}
    return moved(diffusers.WanTransformer3DModel(num_attention_heads=3, attention_head_dim=16, num_layers=3, **sizes))


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    place = tmp_path_factory.mktemp("wan") / "transformer"
    original.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted")
    convert("diffusers", folder, target)
    return target


@pytest.fixture(scope="module")
def dit(converted):
    part, model = checkpoint.load_component(converted, "dit")
    assert part == config.Model(
        dim=48, ffn_dim=56, heads=3, layers=3, channels=CHANNELS, freq_dim=32, text_dim=TEXT_DIM, dtype="float32"
    )
    return model


def latents() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, FRAMES, 2 * ROWS, 2 * COLUMNS, CHANNELS)).astype(np.float32)


def prompts(rows: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(BATCH, rows, TEXT_DIM)).astype(np.float32)


def ours(dit, x, timestep, embeddings) -> np.ndarray:
    """All frames as one chunk with nothing before it: the bidirectional model."""
    state = cache.empty(dit.config, GRID, config.Cache(), sparse=False, batch=BATCH, frames=FRAMES)
    return np.asarray(velocity(dit, *map(jnp.asarray, (x, timestep, embeddings)), state))


@jax.jit
def velocity(dit, x, timestep, embeddings, state):
    return forward(dit, x, timestep, text_cache(dit, embeddings), state, None, GRID, DENSE)[0]


def theirs(original, x, timestep, embeddings) -> np.ndarray:
    """diffusers attends to the rows it is given, so it is given the rows after the prompt as the pipeline does: zeros."""
    rows = np.zeros((BATCH, 512, TEXT_DIM), np.float32)
    rows[:, : embeddings.shape[1]] = embeddings
    with torch.no_grad():
        out = original(torch.from_numpy(x.transpose(0, 4, 1, 2, 3)), torch.from_numpy(timestep), torch.from_numpy(rows)).sample
    return out.numpy().transpose(0, 2, 3, 4, 1)


def distance(got, want) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("rows", [7, 512])
def test_one_timestep_a_sample(original, dit, rows):
    x, embeddings, timestep = latents(), prompts(rows), np.array([937.5, 20.25], np.float32)
    want = theirs(original, x, timestep, embeddings)
    error = distance(ours(dit, x, np.repeat(timestep[:, None], FRAMES, 1), embeddings), want)
    print("relative error", error)
    assert error <= 1e-5


def test_a_timestep_for_every_frame(original, dit):
    x, embeddings = latents(), prompts(7)
    timestep = np.array([[0.0, 625.0, 833.3333], [1000.0, 3.0, 250.0]], np.float32)
    want = theirs(original, x, np.repeat(timestep, GRID.frame_tokens, axis=1), embeddings)  # theirs: one a token
    error = distance(ours(dit, x, timestep, embeddings), want)
    print("relative error", error)
    assert error <= 1e-5
    assert distance(ours(dit, x, timestep[:, ::-1], embeddings), want) > 1e-2


def test_export_gives_diffusers_its_own_file_back(folder, converted, tmp_path):
    export(converted, "dit", "diffusers", tmp_path / "back.safetensors")
    want, got = (load_file(path) for path in (folder / "diffusion_pytorch_model.safetensors", tmp_path / "back.safetensors"))
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[name], got[name]) for name in want)


# In this order: a later entry sees what an earlier one made.
RENAMED = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "o"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
    ("norm2", "norm3"), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"), ("proj_out", "head.head"),
    ("scale_shift_table", "modulation"),
)  # fmt: skip


def wan_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights as Wan-AI's own file names them."""
    renamed = {}
    for name, value in state.items():
        for theirs, wans in RENAMED:
            name = name.replace(theirs, wans)
        renamed[name] = value
    return renamed


def test_wans_own_names_lead_to_the_same_parameters(folder, converted, tmp_path):
    state = wan_names(load_file(folder / "diffusion_pytorch_model.safetensors"))
    state["head.modulation"] = state.pop("modulation")
    assert "blocks.2.cross_attn.norm_k.weight" in state and "blocks.0.modulation" in state
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    settings = {"model_type": "t2v", "dim": 48, "eps": 1e-6, "num_heads": 3, "text_len": 512}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    convert("wan", tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "ours")
    (part, got), (other, want) = (checkpoint.load_component(place, "dit") for place in (tmp_path / "ours", converted))
    assert part == other
    jax.tree.map(np.testing.assert_array_equal, got, want)
