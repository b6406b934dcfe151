"""The Wan2.1 autoencoder as Wan-AI ships it, `Wan2.1_VAE.pth`; LightVAE has the same names and a quarter of the widths."""

from collections.abc import Iterator, Mapping
from typing import Any

from convert.families.wan import linear
from convert.rules import Rule, Shape
from convert.transforms import CONV2D, CONV3D, POINTWISE2D, POINTWISE3D, ones
from lf_jax.config import Vae, check

COMPONENT = "vae"


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Vae:
    """The dimensions of a checkpoint.

    Args:
        shapes: of every tensor, by its name in the checkpoint.
        settings: not used; the file comes alone.

    Raises:
        ValueError: if the tensors that tell the dimensions are missing.
    """
    missing = [name for name in ("encoder.conv1.weight", "conv2.weight") if name not in shapes]
    check(not missing, f"not a Wan autoencoder of this layout: missing {', '.join(missing)}")
    base, channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    return dimensions(shapes, "encoder.downsamples", "residual.2", base=base, channels=channels)


def dimensions(shapes: Mapping[str, Shape], stages: str, convolution: str, *, base: int, **given: Any) -> Vae:
    """`Vae` from the encoder's flat list of residual blocks and halvings.

    Args:
        stages: name of the list.
        convolution: name of a residual block's first convolution.
        given: fields that the list does not tell.
    """
    levels, temporal = [[]], []
    while True:
        name = f"{stages}.{sum(map(len, levels)) + len(temporal)}"
        if (block := f"{name}.{convolution}.weight") in shapes:
            levels[-1].append(shapes[block][0])
        elif f"{name}.resample.1.weight" in shapes:
            temporal.append(f"{name}.time_conv.weight" in shapes)
            levels.append([])
        else:
            break
    sizes = {len(level) for level in levels}
    check(len(sizes) == 1 and sizes != {0}, f"{stages} has levels of {[len(level) for level in levels]} residual blocks")
    multipliers, rests = zip(*(divmod(level[-1], base) for level in levels), strict=True)
    check(not any(rests), f"widths {[level[-1] for level in levels]} are no multiples of the first, {base}")
    return Vae(kind="wan", base=base, multipliers=multipliers, res_blocks=sizes.pop(), temporal=tuple(temporal), **given)


def rules(part: Vae) -> tuple[Rule, ...]:
    blocks = {f"{side}.middle.{i}": f"{side}.middle.{name}" for side in SIDES for i, name in ((0, "first"), (2, "last"))}
    samplers = {}
    for side, stages, sampler in (("encoder", "downsamples", "down"), ("decoder", "upsamples", "up")):
        for i, (level, block) in enumerate(places(part, side)):
            target = f"{side}.levels.{level}"
            if block is None:
                samplers[f"{side}.{stages}.{i}"] = f"{target}.{sampler}"
            else:
                blocks[f"{side}.{stages}.{i}"] = f"{target}.blocks.{block}"
    block, sampler = choice("block", blocks), choice("sampler", samplers)
    return (
        *linear("{c:conv1=quant|conv2=post_quant}", "{c}", POINTWISE3D),
        *linear("{side:encoder|decoder}.conv1", "{side}.conv", CONV3D),
        Rule(block + ".residual.{n:0=norm1|3=norm2}.gamma", "{block}.{n}.scale", ones(after=3)),
        *linear(block + ".residual.{n:2=conv1|6=conv2}", "{block}.{n}", CONV3D),
        *linear(block + ".shortcut", "{block}.shortcut", POINTWISE3D),
        *linear(sampler + ".resample.1", "{sampler}.conv", CONV2D),
        *linear(sampler + ".time_conv", "{sampler}.time", CONV3D),
        Rule("{side:encoder|decoder}.middle.1.norm.gamma", "{side}.middle.attention.norm.scale", ones(after=2)),
        *linear("{side:encoder|decoder}.middle.1.{p:to_qkv=qkv|proj=out}", "{side}.middle.attention.{p}", POINTWISE2D),
        Rule("{side:encoder|decoder}.head.0.gamma", "{side}.head.norm.scale", ones(after=3)),
        *linear("{side:encoder|decoder}.head.2", "{side}.head.conv", CONV3D),
    )


SIDES = ("encoder", "decoder")


def places(part: Vae, side: str) -> Iterator[tuple[int, int | None]]:
    """Level and number of every residual block of one side, in order; number None for the sampler after them."""
    for level in range(len(part.multipliers)):
        yield from ((level, block) for block in range(part.res_blocks + (side == "decoder")))
        if level < len(part.temporal):
            yield level, None


def choice(name: str, spellings: Mapping[str, str]) -> str:
    """A placeholder for any of the source spellings, each with its target's."""
    return "{" + name + ":" + "|".join(f"{theirs}={ours}" for theirs, ours in spellings.items()) + "}"
