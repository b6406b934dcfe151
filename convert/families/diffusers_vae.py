"""The Wan2.1 autoencoder in diffusers' naming (`AutoencoderKLWan`): the `vae` folder of a Wan pipeline."""

from collections.abc import Mapping
from typing import Any

from convert.families.wan import linear
from convert.families.wan_vae import SIDES, choice, dimensions, places
from convert.rules import Rule, Shape
from convert.transforms import CONV2D, CONV3D, POINTWISE2D, POINTWISE3D, ones
from lf_jax.config import Vae, check

COMPONENT = "vae"
OPTIONS = {"mean": "latents_mean", "std": "latents_std"}  # our fields, config.json's


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Vae:
    """The dimensions of a checkpoint.

    Args:
        shapes: of every tensor, by its name in the checkpoint.
        settings: the folder's config.json, for what shapes do not tell: `latents_mean`, `latents_std`.

    Raises:
        ValueError: if the tensors that tell the dimensions are missing, or the autoencoder is not Wan2.1's.
    """
    settings = settings or {}
    missing = [name for name in ("encoder.conv_in.weight", "post_quant_conv.weight") if name not in shapes]
    check(not missing, f"not a Wan autoencoder of this layout: missing {', '.join(missing)}")
    check(
        not settings.get("is_residual", False) and shapes["encoder.conv_in.weight"][1] == 3,
        "an autoencoder with residual samplers or pixel patches: expected Wan2.1's, received Wan2.2's",
    )
    base, channels = shapes["encoder.conv_in.weight"][0], shapes["post_quant_conv.weight"][0]
    given = {ours: tuple(settings[theirs]) for ours, theirs in OPTIONS.items() if theirs in settings}
    return dimensions(shapes, "encoder.down_blocks", "conv1", base=base, channels=channels, **given)


def rules(part: Vae) -> tuple[Rule, ...]:
    blocks = {
        f"{side}.mid_block.resnets.{i}": f"{side}.middle.{name}" for side in SIDES for i, name in ((0, "first"), (1, "last"))
    }
    samplers = {}
    for i, (level, block) in enumerate(places(part, "encoder")):
        if block is None:
            samplers[f"encoder.down_blocks.{i}"] = f"encoder.levels.{level}.down"
        else:
            blocks[f"encoder.down_blocks.{i}"] = f"encoder.levels.{level}.blocks.{block}"
    for level, block in places(part, "decoder"):
        if block is None:
            samplers[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.levels.{level}.up"
        else:
            blocks[f"decoder.up_blocks.{level}.resnets.{block}"] = f"decoder.levels.{level}.blocks.{block}"
    block, sampler = choice("block", blocks), choice("sampler", samplers)
    side, attention = "{side:encoder|decoder}", "{side:encoder|decoder}.mid_block.attentions.0"
    return (
        *linear("{c:quant_conv=quant|post_quant_conv=post_quant}", "{c}", POINTWISE3D),
        *linear(side + ".conv_in", "{side}.conv", CONV3D),
        Rule(block + ".{n:norm1|norm2}.gamma", "{block}.{n}.scale", ones(after=3)),
        *linear(block + ".{n:conv1|conv2}", "{block}.{n}", CONV3D),
        *linear(block + ".conv_shortcut", "{block}.shortcut", POINTWISE3D),
        *linear(sampler + ".resample.1", "{sampler}.conv", CONV2D),
        *linear(sampler + ".time_conv", "{sampler}.time", CONV3D),
        Rule(attention + ".norm.gamma", "{side}.middle.attention.norm.scale", ones(after=2)),
        *linear(attention + ".{p:to_qkv=qkv|proj=out}", "{side}.middle.attention.{p}", POINTWISE2D),
        Rule(side + ".norm_out.gamma", "{side}.head.norm.scale", ones(after=3)),
        *linear(side + ".conv_out", "{side}.head.conv", CONV3D),
    )
