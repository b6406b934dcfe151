"""What the attention's Hopper kernels share: their tiles, how they are laid out, the block arithmetic."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.block_sparse.types import Past

ROWS = 64  # of a warpgroup: queries, or in the gradient of the keys, keys
QUERIES = 2 * ROWS  # of a thread block
LOG2E = math.log2(math.e)
SWIZZLED = mosaic.swizzled(64, jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mosaic.Config):
    """How the kernels are laid out. The defaults are for an H100 or H200."""

    stages: int = 2  # key and value tiles in flight, per stream
    parts: int | None = None  # into which the lists of the last wave are cut; 1 leaves it, None takes what should be fastest
    key_stages: int = 2  # of the gradient of the keys: query tiles in flight for each warpgroup

    def __post_init__(self):
        super().__post_init__()
        self.at_least(stages=1, parts=1, key_stages=1)


def stacked(past: Past | None, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """The past as [layer * b, s, head, e], the layer to read [1], and its tokens; the chunk stands in for none."""
    if past is None:
        return k, v, jnp.zeros(1, jnp.int32), 0
    flat = (-1, *past.k.shape[2:])
    return past.k.reshape(flat), past.v.reshape(flat), past.layer.astype(jnp.int32).reshape(1), past.k.shape[2]


def aligned(tokens: int) -> int:
    """The size of an axis with a number for each query. A store of one row of numbers is not cut off where the row ends, as a
    store of a matrix is: it would run into the next row."""
    return -(-tokens // QUERIES) * QUERIES


def live(block, block_k: int, frame_tokens: int | None):
    """Live tokens of a key block; a number where every block is whole."""
    if frame_tokens is None or frame_tokens % block_k == 0:
        return block_k
    frame_blocks = -(-frame_tokens // block_k)
    return lax.select(lax.rem(block, frame_blocks) == frame_blocks - 1, frame_tokens % block_k, block_k)
