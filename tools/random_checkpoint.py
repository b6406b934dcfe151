"""Writes random PyTorch checkpoints of a preset in the layouts that the originals ship in.

    python tools/random_checkpoint.py PRESET FOLDER [--components dit vae text] [--seed 0]

FOLDER gets self_forcing_dmd.pt, Wan2.1_VAE.pth and models_t5_umt5-xxl-enc-bf16.pth: what `lf-jax convert` reads, at the
sizes of the preset, for checks and measurements where no trained weights can be had. Every weight is scaled so that
activations keep their size from layer to layer.
"""

import argparse
import math
import pathlib

import torch

from convert.families import FAMILIES
from convert.rules import pieces_of
from lf_jax import checkpoint, presets
from lf_jax.text.tokenizer import tiny_model

FILES = {
    "dit": ("self_forcing", "self_forcing_dmd.pt"),
    "vae": ("wan_vae", "Wan2.1_VAE.pth"),
    "text": ("umt5", "models_t5_umt5-xxl-enc-bf16.pth"),
}


def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    spread = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    if name.endswith("bias"):
        spread *= 0.02
    elif name.endswith("modulation"):
        spread *= shape[-1] ** -0.5
    elif name.endswith(("norm.weight", "gamma")) or len(shape) == 1:  # the scale of a norm
        spread = spread * 0.1 + 1
    elif "embedding" not in name or "patch" in name:
        spread *= math.prod(shape[1:]) ** -0.5
    return spread.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help=f"one of {', '.join(presets.names())}, or a config file")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--components", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config = presets.load(given.preset)
    given.folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(given.seed)
    for component in given.components:
        family, file = FILES[component]
        part = {"dit": config.model, "vae": config.vae, "text": config.text}[component]
        table = FAMILIES[family].parts[0].module
        pieces = pieces_of(table.rules(part), checkpoint.shapes(part))
        tensors = {piece.source: tensor(piece.source, piece.shape, getattr(torch, part.dtype), generator) for piece in pieces}
        tensors = getattr(table, "restore", lambda same: same)(tensors)
        branch = getattr(table, "BRANCH", None)
        torch.save(tensors if branch is None else {branch: tensors}, given.folder / file)
        count = sum(t.numel() for t in tensors.values())
        print(f"{given.folder / file}: {len(tensors)} tensors, {count:,} parameters, {part.dtype}")
    if "text" in given.components:  # the real tokenizer is not ours to ship; a small one reads prompts too
        (given.folder / "spiece.model").write_bytes(tiny_model())


if __name__ == "__main__":
    main()
