"""The UMT5 encoder as transformers names it (`UMT5EncoderModel`), which is the `text_encoder` folder of diffusers."""

from collections.abc import Mapping
from typing import Any

from convert.families.umt5 import dimensions
from convert.rules import Rule, Shape
from convert.transforms import LINEAR
from lf_jax.config import Text, check

COMPONENT = "text"
OPTIONS = {"max_distance": "relative_attention_max_distance", "eps": "layer_norm_epsilon"}  # our fields, config.json's
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor; files hold it under either name, or both


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Text:
    """The dimensions of a checkpoint.

    Args:
        shapes: of every tensor, by its name in the checkpoint.
        settings: the checkpoint's own config.json, for what shapes do not tell.

    Raises:
        ValueError: if the tensors that tell the dimensions are missing or contradict each other, or the feed-forward is
            not gated by a GELU.
    """
    settings = settings or {}
    activation = settings.get("feed_forward_proj", "gated-gelu")
    check(activation == "gated-gelu", f"feed_forward_proj={activation!r} must be 'gated-gelu', as in UMT5")
    embedding = next((name for name in EMBEDDINGS if name in shapes), EMBEDDINGS[0])
    attention, ffn = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    names = (embedding, f"{attention}.q.weight", f"{attention}.relative_attention_bias.weight", f"{ffn}.wi_0.weight")
    given = {ours: settings[theirs] for ours, theirs in OPTIONS.items() if theirs in settings}
    return dimensions(shapes, "encoder.block.", *names, **given)


def rules(part: Text) -> tuple[Rule, ...]:
    layer = "encoder.block.{layer}.layer."
    return (
        *(Rule(name, "token_embedding") for name in EMBEDDINGS),
        Rule(EMBEDDINGS[1], None),  # beside `shared.weight`
        Rule(layer + "0.layer_norm.weight", "blocks.attention_norm.scale"),
        Rule(layer + "0.SelfAttention.{p:q|k|v|o}.weight", "blocks.{p}.kernel", LINEAR),
        Rule(layer + "0.SelfAttention.relative_attention_bias.weight", "blocks.position_bias"),
        Rule(layer + "1.layer_norm.weight", "blocks.ffn_norm.scale"),
        Rule(layer + "1.DenseReluDense.{p:wi_0=gate|wi_1=up|wo=down}.weight", "blocks.{p}.kernel", LINEAR),
        Rule("encoder.final_layer_norm.weight", "norm.scale"),
    )
