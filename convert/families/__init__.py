"""The checkpoint families: which table reads which component, and where it lies in a folder.

A table is a module of this package with

    COMPONENT                      "dit", "vae" or "text"
    describe(shapes, settings)     the component's part of the config, from the shapes and the source's own config.json
    rules(part)                    the names, both ways (`convert.rules`)

and perhaps with

    BRANCH                         the dictionary that export puts the tensors in, in a file of torch
    prepare(tensors)               what comes before the names
    restore(tensors)               its inverse
    FORMS                          of a transformer's linear layers (`Model.linears`) that `rules` knows; else "full" alone
"""

import dataclasses
import importlib
import types
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Part:
    """One component of a family."""

    table: str  # module of this package
    inside: tuple[str, ...] = ()  # where it lies in a folder that holds more: patterns, by preference
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the config, that no shape tells

    @property
    def module(self) -> types.ModuleType:
        return importlib.import_module(f"{__name__}.{self.table}")


@dataclasses.dataclass(frozen=True)
class Family:
    about: str
    parts: tuple[Part, ...]
    preset: str | None = None  # how its transformer is used: cache, sparsity, rollout, video
    lora: str | None = None  # a file of a folder source that is merged into the transformer


_SHIPPED = ("*.safetensors.index.json", "diffusion_pytorch_model.safetensors", "*.safetensors")

FAMILIES: dict[str, Family] = {
    "wan": Family(
        "Wan2.1-T2V as Wan-AI ships it: a folder with transformer, VAE and text encoder, or the transformer alone",
        (Part("wan", _SHIPPED), Part("wan_vae", ("Wan2.1_VAE.pth",)), Part("umt5", ("models_t5_umt5*.pth",))),
        preset="wan_1_3b",
    ),
    "self_forcing": Family("Self-Forcing, .pt", (Part("self_forcing"),), preset="self_forcing_1_3b"),
    "light_forcing": Family("Light Forcing, .pt", (Part("self_forcing"),), preset="light_forcing_1_3b"),
    "longlive": Family(
        "LongLive 1.0: base .pt and LoRA, a folder with both, or a LoRA alone onto a converted base",
        (Part("self_forcing", ("longlive_base.pt",)),),
        preset="longlive_1_3b",
        lora="lora.pt",
    ),
    "diffusers": Family(
        "a folder of diffusers' WanPipeline: transformer, vae, text_encoder, or one of them",
        (Part("diffusers_wan", ("transformer",)), Part("diffusers_vae", ("vae",)), Part("hf_umt5", ("text_encoder",))),
        preset="wan_1_3b",
    ),
    "lightx2v_fp8": Family(
        "LightX2V's float8 transformer, bit by bit",
        (Part("lightx2v_fp8", fields={"linears": "fp8"}),),
        preset="self_forcing_1_3b",
    ),
    "wan_vae": Family("Wan2.1_VAE.pth", (Part("wan_vae", ("Wan2.1_VAE.pth",)),)),
    "light_vae": Family("LightVAE: the Wan VAE at a quarter of its width", (Part("wan_vae"),)),
    "taehv": Family("TAEHV, taew2_1", (Part("taehv"),)),
    "light_tae": Family("LightTAE: TAEHV on latents that are not normalised", (Part("taehv", fields={"scaled": True}),)),
    "umt5": Family("UMT5 encoder as Wan-AI ships it, .pth", (Part("umt5", ("models_t5_umt5*.pth",)),)),
    "hf_umt5": Family("UMT5 encoder of transformers, a folder or a file", (Part("hf_umt5"),)),
}
