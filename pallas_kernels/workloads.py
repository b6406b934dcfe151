"""The shapes at which the kernels matter: attention of one chunk of video over its past, batch 1, bfloat16.

Frames of 1536 tokens are those of 512x768 pixels, frames of 1560 tokens those of 480x832; a chunk has three.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import command
from pallas_kernels.block_sparse.types import BlockMap, Past

LISTS = ("topk", "random", "full")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of attention.

    `lists` says where the block lists come from: "topk", the best blocks by products of mean queries and mean keys, as
    selection makes them; "random", every block as likely as any other; "full", every block.
    """

    keep: float  # share of the key blocks that a list names
    block_q: int
    block_k: int
    lists: str = "topk"
    frame_tokens: int = 1536
    past_frames: int = 18
    chunk_frames: int = 3
    batch: int = 1
    heads: int = 12
    head_dim: int = 128
    dtype: str = "bfloat16"
    backward: bool = False  # the gradients of queries, keys and values, in place of the output

    def __post_init__(self):
        if self.lists not in LISTS:
            raise ValueError(f"{self.lists=} must be one of {', '.join(LISTS)}")
        if not 0 < self.keep <= 1 or (self.lists == "full") != (self.keep == 1):
            raise ValueError(f"{self.keep=} must be in (0, 1], and 1 exactly where {self.lists=} is 'full'")

    @property
    def name(self) -> str:
        kept = "dense" if self.full else f"keep{100 * self.keep:.0f}"
        lists = () if self.full else (self.lists,)
        head = ("backward",) if self.backward else ()
        return "-".join((*head, str(self.keys), kept, f"{self.block_q}x{self.block_k}", *lists))

    @property
    def queries(self) -> int:
        return self.chunk_frames * self.frame_tokens

    @property
    def keys(self) -> int:
        """Live keys, of the past and of the chunk."""
        return (self.past_frames + self.chunk_frames) * self.frame_tokens

    @property
    def frame_blocks(self) -> int:
        return -(-self.frame_tokens // self.block_k)

    @property
    def padded_frame(self) -> int:
        return self.frame_blocks * self.block_k

    @property
    def padded(self) -> bool:
        """Whether frames end in dead tokens."""
        return self.padded_frame > self.frame_tokens

    @property
    def full(self) -> bool:
        return self.lists == "full"

    @property
    def key_blocks(self) -> int:
        return (self.past_frames + self.chunk_frames) * self.frame_blocks

    @property
    def width(self) -> int:
        return max(1, round(self.keep * self.key_blocks))

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """The arrays of a workload. Where gradients are asked for all keys are the chunk's own, so that all have one."""

    workload: Workload
    q: jax.Array  # [b, tq, head, e]
    k: jax.Array  # [b, tk, head, e]
    v: jax.Array  # [b, tk, head, e]
    past: Past | None  # two layers, of which the second is read
    blocks: BlockMap
    dout: jax.Array  # [b, tq, head, e], the gradient of the output

    def all_keys(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values in one array each, as those take them who know no stacked cache: [b, past + chunk, head, e]."""
        if self.past is None:
            return self.k, self.v
        layer = self.past.layer
        return jnp.concatenate([self.past.k[layer], self.k], 1), jnp.concatenate([self.past.v[layer], self.v], 1)

    def flops(self) -> int:
        """Operations over the live tokens of listed blocks: two products of 2 e for every pair, with gradients five."""
        work = self.workload
        index, count = np.asarray(self.blocks.index), np.asarray(self.blocks.count)
        tokens = np.minimum(work.block_k, work.frame_tokens - index % work.frame_blocks * work.block_k)
        keys = (tokens * (np.arange(index.shape[-1]) < count[..., None])).sum(-1)
        rows = np.minimum(work.block_q, work.queries - np.arange(index.shape[2]) * work.block_q)
        return int((keys * rows).sum()) * 2 * work.head_dim * (5 if work.backward else 2)


def case(workload: Workload, seed: int = 0) -> Case:
    """Normal queries, keys and values with the lists that the workload asks for."""
    work = workload
    keys = jax.random.split(jax.random.key(seed), 5)
    old, new = (frames * work.padded_frame for frames in (work.past_frames, work.chunk_frames))

    def normal(key: jax.Array, *leading: int) -> jax.Array:
        return jax.random.normal(key, (*leading, work.heads, work.head_dim), jnp.dtype(work.dtype))

    q, dout = (normal(key, work.batch, work.queries) for key in keys[:2])
    k, v = (normal(key, work.batch, old + new) for key in keys[2:4])
    index, count, whole = _lists(work, q, k, keys[4])
    blocks = BlockMap(index, count, work.block_q, work.block_k, whole)
    if work.backward or not old:
        return Case(work, q, k, v, None, blocks, dout)
    past = Past(*(jnp.stack([x[:, :old]] * 2) for x in (k, v)), jnp.int32(1))
    return Case(work, q, k[:, old:], v[:, old:], past, blocks, dout)


def _lists(work: Workload, q: jax.Array, k: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Index, count and whole of a `BlockMap`: as selection makes them, in the order of time, blocks with dead tokens last."""
    rows = -(-work.queries // work.block_q)
    shape = (work.batch, work.heads, rows, work.key_blocks)
    if work.full:
        index = jnp.broadcast_to(jnp.arange(work.key_blocks, dtype=jnp.int32), shape)
    else:
        scores = jax.random.uniform(key, shape) if work.lists == "random" else _scores(work, q, k)
        index = jnp.sort(jax.lax.top_k(scores, work.width)[1].astype(jnp.int32), axis=-1)
    count = jnp.full(shape[:3], work.width, jnp.int32)
    if not work.padded:
        return index, count, None
    ends = index % work.frame_blocks == work.frame_blocks - 1
    index = jnp.take_along_axis(index, jnp.argsort(ends, axis=-1, stable=True), axis=-1)
    return index, count, count - ends.sum(-1, dtype=jnp.int32)


def _scores(work: Workload, q: jax.Array, k: jax.Array) -> jax.Array:
    """Products of the mean query of every query block and the mean key of every key block, over live tokens."""
    starts = np.arange(0, work.queries, work.block_q)
    sizes = np.minimum(work.block_q, work.queries - starts)
    short = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, -work.queries % work.block_q), (0, 0), (0, 0)))
    mean_q = short.reshape(work.batch, -1, work.block_q, *q.shape[2:]).sum(2) / sizes[:, None, None]
    live = np.arange(k.shape[1]) % work.padded_frame < work.frame_tokens
    kept = k.astype(jnp.float32) * live[:, None, None]
    sizes = live.reshape(-1, work.block_k).sum(1)
    mean_k = kept.reshape(work.batch, -1, work.block_k, *k.shape[2:]).sum(2) / sizes[:, None, None]
    return jnp.einsum("bqhe,bkhe->bhqk", mean_q, mean_k, precision="highest")


def _forward() -> Iterable[Workload]:
    for lists in ("topk", "random"):
        for keep in (0.20, 0.12):
            for block_q, block_k in ((128, 128), (128, 64), (128, 32), (64, 64)):
                yield Workload(keep, block_q, block_k, lists)
        yield Workload(0.12, 128, 64, lists, past_frames=9)
        yield Workload(0.12, 128, 32, lists, frame_tokens=1560)
    yield Workload(1.0, 128, 128, "full")


FORWARD = tuple(_forward())
# FlashAttention-4 has gradients for key blocks of 128 only.
BACKWARD = tuple(
    Workload(0.12, 128, block_k, lists, past_frames=9, backward=True) for block_k in (64, 128) for lists in ("topk", "random")
)
# With those above, a forward workload of every block size at three lengths of lists and a backward one: for `tune`.
TUNING = (
    *(Workload(1.0, block_q, block_k, "full") for block_q, block_k in ((128, 64), (128, 32), (64, 64))),
    *(Workload(0.12, block_q, block_k, past_frames=9, backward=True) for block_q, block_k in ((128, 32), (64, 64))),
)
_SMALL = Workload(0.5, 16, 16, frame_tokens=40, past_frames=2, chunk_frames=1, batch=1, heads=2, head_dim=32, dtype="float32")
# For trying the command on any machine.
SMALL = (_SMALL, dataclasses.replace(_SMALL, backward=True))
WORKLOADS = {work.name: work for work in (*FORWARD, *BACKWARD, *TUNING, *SMALL)}


def named(patterns: Iterable[str]) -> list[Workload]:
    """The workloads whose names match any of the patterns (`*` stands for anything), in the order of the table.

    Raises:
        ValueError: for a pattern that matches none.
    """
    return [WORKLOADS[name] for name in command.matching("workload", patterns, tuple(WORKLOADS))]
