"""The two values that a block-sparse attention call is made of, beside its arrays."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """Which key blocks every query block attends to: the whole interface between selection and kernels.

    Key block `j` of a call with a cache of `n` blocks is block `j` of the cache where `j < n`, in whatever order its
    slots happen to be filled, and block `j - n` of the current chunk's own keys otherwise.
    """

    index: jax.Array  # [b, head, q_block, width] int32: key blocks, distinct within the first `count` entries
    count: jax.Array  # [b, head, q_block] int32: how many entries are real, 0..width; the rest is ignored
    block_q: int = dataclasses.field(metadata={"static": True})  # tokens of a query block; the last one may be short
    block_k: int = dataclasses.field(metadata={"static": True})  # tokens of a key block
    # [b, head, q_block] int32: so many entries come first that name blocks without dead tokens; those behind may have
    # some. None: any order. Who makes lists in such an order saves a kernel from putting them into it.
    whole: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
    """The keys and values that came before, of all layers, and the layer to read: no kernel needs a slice or a copy."""

    k: jax.Array  # [layer, b, s, head, head_dim]
    v: jax.Array  # [layer, b, s, head, head_dim]
    layer: jax.Array  # [] int32
