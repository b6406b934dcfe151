"""Checkpoints: what is kept, what is skipped, and that nothing else is read."""

import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lf_jax.train.checkpoints import Checkpoints

advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    z: Any  # not in the order of their names
    a: Any


def begun():
    model = {"a.kernel": jnp.zeros((64, 48)), "a.bias": jnp.zeros(3, jnp.bfloat16)}
    return {"model": model, "pair": Pair(jnp.zeros(2), jnp.full(2, 0.5)), "count": jnp.int32(0)}


def saved(folder, steps, keep=9):
    """A run whose state holds its step in every number, saved after each of `steps`."""
    state = begun()
    with Checkpoints(folder, keep, pytest.fail) as checkpoints:
        for step in range(1, max(steps) + 1):
            state = advance(state)
            if step in steps:
                checkpoints.save(step, state)


def restored(folder):
    notes: list[str] = []
    with Checkpoints(folder, 9, notes.append) as checkpoints:
        step, state = checkpoints.restore(begun())
    for leaf, start in zip(jax.tree.leaves(state), jax.tree.leaves(begun()), strict=True):
        assert leaf.dtype == start.dtype and (leaf == start + step).all()
    return step, notes


def largest(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "files.json"]
    return max(files, key=lambda path: path.stat().st_size)


def test_the_newest_are_kept_while_training_goes_on(tmp_path):
    saved(tmp_path, range(1, 8), keep=2)  # the state is donated to the next step while its copy is written
    assert {path.name for path in tmp_path.iterdir()} == {"6", "7"}
    assert restored(tmp_path) == (7, [])


def test_nothing_to_restore(tmp_path):
    assert restored(tmp_path / "absent") == (0, [])


def shorten(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm, words", [(shorten, "not as it was"), (flip, "not as it was"), (lambda p: p.unlink(), "is missing")]
)
def test_a_damaged_one_is_skipped_for_the_one_before(harm, words, tmp_path):
    saved(tmp_path, [2, 4])
    harm(largest(tmp_path / "4"))
    step, (message,) = restored(tmp_path)
    assert step == 2
    assert str(tmp_path / "4") in message and words in message and "skipped" in message
    saved(tmp_path, [4])  # its place is free again
    assert restored(tmp_path) == (4, [])


def test_every_file_counts(tmp_path):
    saved(tmp_path, [1])
    for path in [path for path in (tmp_path / "1").rglob("*") if path.is_file()]:
        data = path.read_bytes()
        shorten(path)
        if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # not read
            assert restored(tmp_path) == (1, [])
        else:
            with pytest.raises(ValueError, match="none of the checkpoints in .* is whole"):
                restored(tmp_path)
            (tmp_path / "1.damaged").rename(tmp_path / "1")
        path.write_bytes(data)


def test_a_half_written_one_is_removed(tmp_path):
    saved(tmp_path, [2, 4])
    (tmp_path / "4").rename(tmp_path / "4.orbax-checkpoint-tmp")
    step, (message,) = restored(tmp_path)
    assert step == 2 and "was not written to its end" in message
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_state_of_another_shape_is_named(tmp_path):
    saved(tmp_path, [1])
    with Checkpoints(tmp_path, 9, pytest.fail) as checkpoints:
        other = begun() | {"more": jnp.zeros(2)}
        with pytest.raises(ValueError, match=r"1 is of another run: here more is \[2\]"):
            checkpoints.restore(other)
        other = begun() | {"model": {"a.kernel": jnp.zeros((64, 49))}}
        with pytest.raises(ValueError, match=r"model.a.bias is unknown.*model.a.kernel is \[64, 49\]"):
            checkpoints.restore(other)


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    gate = threading.Event()
    complete = Checkpoints._complete
    monkeypatch.setattr(Checkpoints, "_complete", lambda self: (gate.wait(30), complete(self)))
    with Checkpoints(tmp_path, 9, pytest.fail) as checkpoints:
        checkpoints.save(1, begun())
        assert not (tmp_path / "1").exists()  # came back although nothing could be completed
        gate.set()
    np.testing.assert_array_equal([int(path.name) for path in tmp_path.iterdir()], [1])
