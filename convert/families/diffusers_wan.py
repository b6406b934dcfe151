"""Wan2.1 text-to-video transformer in diffusers' naming: the `transformer` folder of a Wan pipeline."""

from collections.abc import Mapping
from typing import Any

from convert.families.wan import dimensions, linear
from convert.rules import Rule, Shape
from convert.transforms import PATCH, SAME, ones
from lf_jax.config import Model

COMPONENT = "dit"
OPTIONS = {"heads": "num_attention_heads", "eps": "eps"}  # our fields, config.json's


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Model:
    """The dimensions of a checkpoint.

    Args:
        shapes: of every tensor, by its name in the checkpoint.
        settings: the folder's config.json, for what shapes do not tell: `num_attention_heads`, `eps`. The number of
            text rows stands in neither; diffusers' pipeline pads prompts to 512 rows, our default.

    Raises:
        ValueError: if the tensors that tell the dimensions are missing, or the model is not text-to-video.
    """
    settings = settings or {}
    embedder = "condition_embedder.{}_embedder.linear_1.weight"
    names = ("blocks.0.ffn.net.0.proj.weight", embedder.format("text"), embedder.format("time"), "proj_out.weight")
    given = {ours: settings[theirs] for ours, theirs in OPTIONS.items() if theirs in settings}
    return dimensions(shapes, names, **given)


def rules(part: Model) -> tuple[Rule, ...]:
    attention = "blocks.{layer}.{a:attn1=self_attention|attn2=cross_attention}"
    embedder = "condition_embedder.{e:text_embedder=text_embedding|time_embedder=time_embedding}"
    return (
        *linear("patch_embedding", "patch_embedding", PATCH(part.patch)),
        *linear(embedder + ".{p:linear_1=up|linear_2=down}", "{e}.{p}"),
        *linear("condition_embedder.time_proj", "time_projection"),
        Rule("blocks.{layer}.scale_shift_table", "blocks.modulation", ones(1)),
        *linear("blocks.{layer}.attn1.{part:to_q=0|to_k=1|to_v=2}", "blocks.self_attention.qkv", SAME),
        *linear("blocks.{layer}.attn1.to_out.0", "blocks.self_attention.o"),
        *linear("blocks.{layer}.attn2.{p:to_q=q|to_k=k|to_v=v|to_out.0=o}", "blocks.cross_attention.{p}"),
        Rule(attention + ".{n:norm_q|norm_k}.weight", "blocks.{a}.{n}.scale"),
        Rule("blocks.{layer}.norm2.weight", "blocks.cross_norm.scale"),
        Rule("blocks.{layer}.norm2.bias", "blocks.cross_norm.bias"),
        *linear("blocks.{layer}.ffn.net.{p:0.proj=up|2=down}", "blocks.ffn.{p}"),
        Rule("scale_shift_table", "head.modulation", ones(1)),
        *linear("proj_out", "head.linear"),
    )
