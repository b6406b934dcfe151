"""The tiny autoencoder as madebyollin/taehv ships it for Wan2.1: `taew2_1.pth`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families.wan import linear
from convert.families.wan_vae import choice
from convert.rules import Rule, Shape
from convert.tensors import Tensor, Tensors
from convert.transforms import CONV2D, POINTWISE2D
from lf_jax.config import Vae, check

COMPONENT = "vae"
# Places in the reference's two lists of layers. Encoder: convolution, ReLU, then levels of merging, halving and three
# memory blocks, then a convolution. Decoder: clamp, convolution, ReLU, then levels of three memory blocks, doubling,
# growing and a convolution, then ReLU and a convolution.
ENCODER_START, ENCODER_LEVEL, DECODER_START, DECODER_LEVEL = 2, 5, 3, 6


def prepare(tensors: Tensors) -> Tensors:
    """The same, with the growing maps cut to the frames that they make here.

    A checkpoint may hold maps that make more frames than this network uses; as in the reference, the last ones count.
    """
    part = describe({name: tensor.shape for name, tensor in tensors.items()})
    cut = {}
    for level, (width, time) in enumerate(zip(part.widths, reversed(part.temporal), strict=False)):
        name = f"decoder.{DECODER_START + DECODER_LEVEL * level + 4}.conv.weight"
        rows = width * (1 + time)
        if name in tensors and tensors[name].shape[0] > rows:
            cut[name] = _last(tensors[name], rows)
    return {**tensors, **cut}


def _last(tensor: Tensor, rows: int) -> Tensor:
    return dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]), read=lambda: tensor.read()[-rows:])


def describe(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None = None) -> Vae:
    """The dimensions of a checkpoint.

    Args:
        shapes: of every tensor, by its name in the checkpoint.
        settings: not used; the file comes alone.

    Raises:
        ValueError: if the tensors that tell the dimensions are missing, or the network is of another shape than
            Wan2.1's: another encoder, pixel patches, or the "super" decoder.
    """
    levels = 0
    while f"encoder.{ENCODER_START + ENCODER_LEVEL * levels}.conv.weight" in shapes:
        levels += 1
    ends = [f"decoder.{DECODER_START + DECODER_LEVEL * level - 1}.weight" for level in range(1, levels + 1)]
    names = ["encoder.0.weight", "decoder.1.weight", *ends]
    missing = [name for name in names if name not in shapes]
    check(levels > 0 and not missing, f"not a tiny autoencoder of this layout: missing {', '.join(missing) or 'levels'}")
    width, pixels = shapes["encoder.0.weight"][:2]
    check(pixels == 3, f"encoder.0.weight reads {pixels} channels, expected 3: not Wan2.1's")
    pools = [shapes[f"encoder.{ENCODER_START + ENCODER_LEVEL * level}.conv.weight"] for level in range(levels)]
    widths = tuple(shapes[name][0] for name in names[1:])
    check(widths[-1] == width, f"the decoder ends {widths[-1]} wide, the encoder is {width} wide; expected the same")
    return Vae(
        kind="tiny",
        channels=shapes["decoder.1.weight"][1],
        temporal=tuple(pool[1] == 2 * pool[0] for pool in pools),
        widths=widths,
    )


def rules(part: Vae) -> tuple[Rule, ...]:
    levels = range(len(part.temporal))
    encoder = {level: ENCODER_START + ENCODER_LEVEL * level for level in levels}
    decoder = {level: DECODER_START + DECODER_LEVEL * level for level in levels}
    ends = {"encoder.0": "encoder.conv", f"encoder.{ENCODER_START + ENCODER_LEVEL * len(levels)}": "encoder.out"}
    ends |= {"decoder.1": "decoder.conv", f"decoder.{DECODER_START + DECODER_LEVEL * len(levels) + 1}": "decoder.out"}
    blocks = {f"encoder.{at + 2 + i}": f"encoder.levels.{level}.blocks.{i}" for level, at in encoder.items() for i in range(3)}
    blocks |= {f"decoder.{at + i}": f"decoder.levels.{level}.blocks.{i}" for level, at in decoder.items() for i in range(3)}
    halvings = {f"encoder.{at + 1}": f"encoder.levels.{level}.conv" for level, at in encoder.items()}
    doublings = {f"decoder.{at + 5}": f"decoder.levels.{level}.conv" for level, at in decoder.items()}
    pools = {f"encoder.{at}": f"encoder.levels.{level}.pool" for level, at in encoder.items()}
    grows = {f"decoder.{at + 4}": f"decoder.levels.{level}.grow" for level, at in decoder.items()}
    return (
        *linear(choice("end", ends), "{end}", CONV2D),
        *linear(choice("block", blocks) + ".conv.{n:0=conv1|2=conv2|4=conv3}", "{block}.{n}", CONV2D),
        Rule(choice("sampler", halvings | doublings) + ".weight", "{sampler}.kernel", CONV2D),
        Rule(choice("mix", pools | grows) + ".conv.weight", "{mix}.kernel", POINTWISE2D),
    )
