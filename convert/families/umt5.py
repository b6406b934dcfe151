"""The UMT5-XXL encoder as Wan-AI ships it: `models_t5_umt5-xxl-enc-bf16.pth`, a plain state dict of 242 tensors."""

import re
from collections.abc import Mapping
from typing import Any

from convert.rules import Rule, Shape
from convert.transforms import LINEAR
from lf_jax.config import Text, check

COMPONENT = "text"


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Text:
    """The dimensions of a checkpoint.

    Args:
        shapes: of every tensor, by its name in the checkpoint.
        settings: not read: the config.json beside such a file is the transformer's.

    Raises:
        ValueError: if the tensors that tell the dimensions are missing or contradict each other.
    """
    names = ("token_embedding.weight", "attn.q.weight", "pos_embedding.embedding.weight", "ffn.gate.0.weight")
    return dimensions(shapes, "blocks.", *names)


def dimensions(shapes: Mapping[str, Shape], blocks: str, embedding: str, q: str, bias: str, gate: str, **given: Any) -> Text:
    """`Text` from the shapes of four tensors.

    Args:
        blocks: what the names of a layer's tensors begin with, before its number.
        q, bias, gate: names within a layer: query projection, table of position biases, gate of the feed-forward.
        given: fields that shapes do not tell.
    """
    names = [embedding, *(f"{blocks}0.{name}" for name in (q, bias, gate))]
    missing = [name for name in names if name not in shapes]
    check(not missing, f"not a UMT5 encoder of this layout: missing {', '.join(missing)}")
    (vocab, dim), (inner, _), (buckets, heads), (ffn, _) = (shapes[name] for name in names)
    check(inner % heads == 0, f"{names[1]} makes {inner} numbers, which {heads} heads ({names[2]}) cannot share")
    found = [re.match(re.escape(blocks) + r"(\d+)\.", name) for name in shapes]
    layers = 1 + max(int(block[1]) for block in found if block)
    return Text(
        vocab=vocab, dim=dim, ffn_dim=ffn, heads=heads, head_dim=inner // heads, layers=layers, buckets=buckets, **given
    )


def rules(part: Text) -> tuple[Rule, ...]:
    return (
        Rule("token_embedding.weight", "token_embedding"),
        Rule("blocks.{layer}.norm1.weight", "blocks.attention_norm.scale"),
        Rule("blocks.{layer}.attn.{p:q|k|v|o}.weight", "blocks.{p}.kernel", LINEAR),
        Rule("blocks.{layer}.pos_embedding.embedding.weight", "blocks.position_bias"),
        Rule("blocks.{layer}.norm2.weight", "blocks.ffn_norm.scale"),
        Rule("blocks.{layer}.ffn.{p:gate.0=gate|fc1=up|fc2=down}.weight", "blocks.{p}.kernel", LINEAR),
        Rule("norm.weight", "norm.scale"),
    )
