"""What the public call refuses, and what the description of the device says."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMap, Past, block_sparse_attention, check_block_map, platform


def good() -> dict:
    blocks = BlockMap(jnp.zeros((1, 2, 3, 2), jnp.int32), jnp.ones((1, 2, 3), jnp.int32), block_q=4, block_k=4)
    past = Past(jnp.zeros((2, 1, 16, 2, 8)), jnp.zeros((2, 1, 16, 2, 8)), jnp.int32(0))
    kv = jnp.zeros((1, 8, 2, 8))
    return dict(q=jnp.zeros((1, 10, 2, 8)), k=kv, v=kv, blocks=blocks, past=past, frame_tokens=7, scale=1.0)


def blocks(**fields) -> dict:
    return dict(blocks=dataclasses.replace(good()["blocks"], **fields))


def past(**fields) -> dict:
    return dict(past=dataclasses.replace(good()["past"], **fields))


BAD = {
    "three axes": (dict(q=jnp.zeros((10, 2, 8))), r"q.shape=\(10, 2, 8\) must be \[b, tq, head, e\]"),
    "no queries": (dict(q=jnp.zeros((1, 0, 2, 8))), "nothing empty"),
    "integers": (dict(q=jnp.zeros((1, 10, 2, 8), jnp.int32)), "q.dtype=.*must be float32, bfloat16 or float16"),
    "k and v differ": (dict(v=jnp.zeros((1, 12, 2, 8))), "k.shape=.* and v.shape=.* must be equal"),
    "heads differ": (dict(k=jnp.zeros((1, 8, 1, 8)), v=jnp.zeros((1, 8, 1, 8))), r"must be \[1, tk, 2, 8\] as q is"),
    "dtypes differ": (dict(v=jnp.zeros((1, 8, 2, 8), jnp.bfloat16)), "v.dtype=.* must equal q.dtype"),
    "ragged keys": (
        dict(k=jnp.zeros((1, 12, 2, 8)), v=jnp.zeros((1, 12, 2, 8))),
        "=12 keys must be a positive multiple of 8, a frame of frame_tokens=7",
    ),
    "ragged keys without frames": (
        dict(k=jnp.zeros((1, 6, 2, 8)), v=jnp.zeros((1, 6, 2, 8)), frame_tokens=None),
        "=6 keys must be a positive multiple of blocks.block_k=4",
    ),
    "empty frames": (dict(frame_tokens=0), "frame_tokens=0 must be positive"),
    "query blocks": (blocks(index=jnp.zeros((1, 2, 4, 2), jnp.int32)), r"blocks.index.shape=\(1, 2, 4, 2\) must be"),
    "no width": (blocks(index=jnp.zeros((1, 2, 3, 0), jnp.int32)), "width of at least 1"),
    "too wide": (blocks(index=jnp.zeros((1, 2, 3, 7), jnp.int32)), "lists of 7 blocks are wider than the 6 key blocks"),
    "counts": (blocks(count=jnp.ones((1, 2), jnp.int32)), r"blocks.count.shape=\(1, 2\) must be \(1, 2, 3\)"),
    "index dtype": (blocks(index=jnp.zeros((1, 2, 3, 2))), "blocks.index must be int32, received float32"),
    "whole": (blocks(whole=jnp.ones((1, 2), jnp.int32)), r"blocks.whole.shape=\(1, 2\) must be \(1, 2, 3\)"),
    "whole dtype": (blocks(whole=jnp.ones((1, 2, 3))), "blocks.whole must be int32, received float32"),
    "block size": (blocks(block_q=0), "must be positive"),
    "past layout": (
        past(k=jnp.zeros((1, 16, 2, 8)), v=jnp.zeros((1, 16, 2, 8))),
        r"past.k.shape=.* must be \[layer, 1, s, 2, 8\]",
    ),
    "past k and v": (past(v=jnp.zeros((2, 1, 8, 2, 8))), "past.k.shape=.* and past.v.shape=.* must be equal"),
    "past dtype": (past(v=jnp.zeros((2, 1, 16, 2, 8), jnp.bfloat16)), "past.v.dtype=.* must equal q.dtype"),
    "past frames": (
        past(k=jnp.zeros((2, 1, 12, 2, 8)), v=jnp.zeros((2, 1, 12, 2, 8))),
        "slots=12 of the past must be a multiple of 8",
    ),
    "layer": (past(layer=jnp.zeros(2, jnp.int32)), "past.layer must be a scalar"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_refused(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**(good() | change))


def test_the_right_arguments_are_not():
    assert block_sparse_attention(**good()).shape == (1, 10, 2, 8)


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        ([[0, 4]], [2], r"index outside 0..3; index\[at\]=array\(\[0, 4\]"),
        ([[-1, 2]], [2], "index outside 0..3"),
        ([[2, 2]], [2], "the same block twice"),
        ([[0, 1]], [3], "count outside 0..2"),
    ],
)
def test_a_broken_block_map_is_found(index, count, message):
    index, count = np.array([[index]], np.int32), np.array([[count]], np.int32)
    with pytest.raises(ValueError, match=message):
        check_block_map(BlockMap(index, count, 4, 4), key_blocks=4)


def test_unused_entries_may_hold_anything():
    index, count = np.array([[[[3, 3, 99], [0, 0, 0]]]], np.int32), np.array([[[1, 0]]], np.int32)
    check_block_map(BlockMap(index, count, 4, 4), key_blocks=4)


@pytest.mark.parametrize(
    ("name", "expected"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None), ("10.x", None)]
)
def test_compute_capability(name, expected, monkeypatch):
    fake = SimpleNamespace(platform="gpu", device_kind="Some GPU", compute_capability=name, core_count=114)
    monkeypatch.setattr(jax, "devices", lambda: [fake])
    assert platform.device().compute_capability == expected
    assert platform.device().multiprocessors == (114 if expected else None)
    assert ("compute capability" in platform.describe()) == (expected is not None)


def test_the_device_describes_itself():
    here = platform.device()
    assert here.kind in platform.describe() and jax.__version__ in platform.describe()
    assert here.nvidia == (here.backend == "gpu" and here.compute_capability is not None)
    assert (here.multiprocessors is not None) == here.nvidia


@pytest.mark.parametrize(
    ("whole", "frame_tokens", "message"),
    [
        ([3], None, "whole outside 0..count"),
        ([-1], 6, "whole outside 0..count"),
        ([2], 6, "dead tokens among the first `whole`"),
    ],
)
def test_check_block_map_finds_a_wrong_whole(whole, frame_tokens, message):
    """Blocks 1 and 3 have two dead tokens each where a frame has six."""
    index, count = np.asarray([[[[2, 3, 0]]]], np.int32), np.full((1, 1, 1), 2, np.int32)
    with pytest.raises(ValueError, match=message):
        check_block_map(BlockMap(index, count, 4, 4, np.asarray([[whole]])), 4, frame_tokens)
    for fine in (0, 1):
        check_block_map(BlockMap(index, count, 4, 4, np.full((1, 1, 1), fine)), 4, frame_tokens)
    check_block_map(BlockMap(index, count, 4, 4, count), 4, 8)
