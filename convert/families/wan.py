"""Wan2.1 text-to-video transformer as Wan-AI ships it: `diffusion_pytorch_model*.safetensors` beside a `config.json`."""

import re
from collections.abc import Mapping
from typing import Any

from convert.rules import Rule, Shape
from convert.transforms import LINEAR, PATCH, SAME, Transform, ones
from lf_jax.config import Model, check

COMPONENT = "dit"
HEAD_DIM = 128  # of every released Wan model; where a config.json says otherwise, that holds
OPTIONS = {"heads": "num_heads", "eps": "eps", "text_len": "text_len"}  # our fields, config.json's


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Model:
    """The dimensions of a checkpoint.

    Args:
        shapes: of every tensor, by its name in the checkpoint.
        settings: the checkpoint's own config.json, for what shapes do not tell: `num_heads`, `eps`, `text_len`.

    Raises:
        ValueError: if the tensors that tell the dimensions are missing, or the model is not text-to-video.
    """
    settings = settings or {}
    names = ("blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight", "head.head.weight")
    given = {ours: settings[theirs] for ours, theirs in OPTIONS.items() if theirs in settings}
    return dimensions(shapes, names, linear_branch="blocks.0.self_attn.proj_l.weight" in shapes, **given)


def dimensions(shapes: Mapping[str, Shape], names: tuple[str, str, str, str], **given: Any) -> Model:
    """`Model` from the shapes of the patch embedding and of four linear layers.

    Args:
        names: of the first weights of the first feed-forward, the text and the time embedding, and of the head's.
        given: fields that shapes do not tell.
    """
    patch_embedding = "patch_embedding.weight"
    missing = [name for name in (patch_embedding, *names) if name not in shapes]
    check(not missing, f"not a Wan transformer of this layout: missing {', '.join(missing)}")
    check(len(shapes[patch_embedding]) == 5, f"{patch_embedding} has shape {list(shapes[patch_embedding])}, expected 5 axes")
    dim, channels, *patch = shapes[patch_embedding]
    ffn, text, time, head = (shapes[name] for name in names)
    patched = channels * patch[0] * patch[1] * patch[2]
    check(
        head[0] == patched,
        f"the model reads {channels} channels but writes {head[0]} numbers a patch, expected {patched}: not text-to-video",
    )
    check(
        "heads" in given or dim % HEAD_DIM == 0,
        f"a width of {dim} is no multiple of {HEAD_DIM}, the released models' head width: a config.json beside the weights, "
        "or a preset (--preset), must name the heads",
    )
    found = [re.match(r"blocks\.(\d+)\.", name) for name in shapes]
    return Model(
        dim=dim,
        ffn_dim=ffn[0],
        layers=1 + max(int(block[1]) for block in found if block),
        channels=channels,
        freq_dim=time[1],
        text_dim=text[1],
        patch=tuple(patch),
        **{"heads": dim // HEAD_DIM, **given},
    )


def linear(source: str, target: str, kernel: Transform = LINEAR) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer."""
    return Rule(f"{source}.weight", f"{target}.kernel", kernel), Rule(f"{source}.bias", f"{target}.bias")


# Source, target and transform of the weights of the linear layers in the blocks; what quantised files quantise.
LINEARS = (
    ("blocks.{layer}.self_attn.{part:q=0|k=1|v=2}", "blocks.self_attention.qkv", SAME),
    ("blocks.{layer}.self_attn.o", "blocks.self_attention.o", LINEAR),
    ("blocks.{layer}.cross_attn.{p:q|k|v|o}", "blocks.cross_attention.{p}", LINEAR),
    ("blocks.{layer}.ffn.{p:0=up|2=down}", "blocks.ffn.{p}", LINEAR),
)


def rules(part: Model) -> tuple[Rule, ...]:
    return (*rest(part), *(rule for layer in LINEARS for rule in linear(*layer)))


def rest(part: Model) -> tuple[Rule, ...]:
    """All but `LINEARS`."""
    attention = "blocks.{layer}.{a:self_attn=self_attention|cross_attn=cross_attention}"
    return (
        *linear("patch_embedding", "patch_embedding", PATCH(part.patch)),
        *linear("{e:text_embedding|time_embedding}.{p:0=up|2=down}", "{e}.{p}"),
        *linear("time_projection.1", "time_projection"),
        Rule("blocks.{layer}.modulation", "blocks.modulation", ones(1)),
        Rule(attention + ".{n:norm_q|norm_k}.weight", "blocks.{a}.{n}.scale"),
        Rule("blocks.{layer}.norm3.weight", "blocks.cross_norm.scale"),
        Rule("blocks.{layer}.norm3.bias", "blocks.cross_norm.bias"),
        *(linear("blocks.{layer}.self_attn.proj_l", "blocks.marginal") if part.linear_branch else ()),
        Rule("head.modulation", "head.modulation", ones(1)),
        *linear("head.head", "head.linear"),
    )
