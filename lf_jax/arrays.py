"""The letters that shapes are written in, everywhere in this library.

    b   batch                         l   layer
    f   latent frames                 t   tokens of one chunk, frames in order, each frame row by row
    h w height, width (latent         s   token slots of the key-value cache (frames padded to the key block)
        pixels, or pixels)            n   text rows
    c   channels                      head, e   attention heads, head_dim
    d   model width                   q, k      query blocks, key blocks

Shapes stand in the signatures as jaxtyping annotations. They cost nothing in use; the tests turn on their checking
(`tests/conftest.py`).
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key, UInt8

# A field of a pytree dataclass: an array in use; a shape, a sharding or a sentinel inside tree functions.
Leaf = Any

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Leaf", "UInt8"]
