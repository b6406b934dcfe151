"""The transformer's conversion tables at full size, by shapes alone: the names and counts of the released checkpoints."""

import math

import pytest

from convert import rules
from convert.families import diffusers_wan, wan
from lf_jax import checkpoint, config

WAN_1_3B, WAN_14B = config.Model(), config.Model(dim=5120, ffn_dim=13824, heads=40, layers=40)


def released(d: int, f: int, layers: int, channels: int = 16) -> dict[str, tuple[int, ...]]:
    """Every tensor of `diffusion_pytorch_model.safetensors`."""
    weights = {
        "text_embedding.0": (d, 4096), "text_embedding.2": (d, d), "time_embedding.0": (d, 256), "time_embedding.2": (d, d),
        "time_projection.1": (6 * d, d), "patch_embedding": (d, channels, 1, 2, 2), "head.head": (64, d),
    }  # fmt: skip
    shapes = {"head.modulation": (1, 2, d)}
    for i in range(layers):
        shapes[f"blocks.{i}.modulation"] = (1, 6, d)
        weights |= {f"blocks.{i}.ffn.0": (f, d), f"blocks.{i}.ffn.2": (d, f), f"blocks.{i}.norm3": (d,)}
        for attention in ("self_attn", "cross_attn"):
            weights |= {f"blocks.{i}.{attention}.{p}": (d, d) for p in "qkvo"}
            shapes |= {f"blocks.{i}.{attention}.norm_{p}.weight": (d,) for p in "qk"}
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [(WAN_1_3B, 825, 1_418_996_800), (WAN_14B, 1095, 14_288_491_584)],
    ids=["1.3B", "14B"],
)
def test_every_released_tensor_has_its_place(model, tensors, parameters):
    shapes = released(model.dim, model.ffn_dim, model.layers)
    assert (len(shapes), sum(math.prod(shape) for shape in shapes.values())) == (tensors, parameters)
    part = wan.describe(shapes)
    assert part == model
    pieces = rules.plan(wan.rules(part), shapes, checkpoint.shapes(part))
    assert {piece.source for piece in pieces} == shapes.keys()
    written = {piece.source: piece.shape for piece in rules.pieces_of(wan.rules(part), checkpoint.shapes(part))}
    assert written == shapes


def test_diffusers_names_are_as_many_and_all_different():
    pieces = rules.pieces_of(diffusers_wan.rules(WAN_1_3B), checkpoint.shapes(WAN_1_3B))
    shapes = {piece.source: piece.shape for piece in pieces}
    assert len(pieces) == len(shapes) == 825
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_418_996_800
    assert diffusers_wan.describe(shapes) == WAN_1_3B


def test_the_sources_own_config_says_what_shapes_do_not():
    shapes = released(48, 56, 2)
    with pytest.raises(ValueError, match="48 is no multiple of 128.*config.json .*or a preset"):
        wan.describe(shapes)
    part = wan.describe(shapes, {"num_heads": 4, "eps": 1e-5, "text_len": 77, "model_type": "t2v"})
    assert (part.heads, part.eps, part.text_len, part.layers, part.dim) == (4, 1e-5, 77, 2, 48)


def test_other_models_are_refused_by_name():
    with pytest.raises(ValueError, match="36 channels.*not text-to-video"):
        wan.describe(released(1536, 8960, 1, channels=36))
    with pytest.raises(ValueError, match="missing patch_embedding.weight, blocks.0.ffn.net.0.proj.weight"):
        diffusers_wan.describe({"conv_in.weight": (320, 4, 3, 3)})
    with pytest.raises(ValueError, match="blocks.0.ffn.net.0.proj.weight"):
        diffusers_wan.describe(released(1536, 8960, 1))
