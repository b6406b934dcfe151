"""The diffusion transformer."""

from lf_jax.dit.model import TextCache, WanDiT, forward, text_cache

__all__ = ["TextCache", "WanDiT", "forward", "text_cache"]
