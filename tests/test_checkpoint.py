"""Converted folders and rollout states: what is written is what is read, and what is broken is said."""

import dataclasses
import functools
import json
import os
import struct
import subprocess
import sys

import fake_checkpoints as fake
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import lf_jax
from lf_jax import cache, checkpoint
from lf_jax.checkpoint import tensorfile
from lf_jax.checkpoint.replace import replaced_file, replaced_folder
from lf_jax.config import Cache, Config, Model, Rollout, Sparsity, Text, Vae, Video
from lf_jax.dit.model import WanDiT
from lf_jax.tokens import Grid

PARTS = {"dit": fake.MODEL, "vae": fake.VAE, "text": fake.TEXT}


def module_of(part):
    """The module with random numbers in it, without compiling its initialisation."""
    random, flat = np.random.default_rng(0), checkpoint.flatten(checkpoint.abstract(part))
    arrays = {name: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype) for name, leaf in flat.items()}
    return checkpoint.build(checkpoint.abstract(part), arrays)


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny transformer, and the module."""
    model = module_of(fake.MODEL)
    checkpoint.save_component(tmp_path / "dir", "dit", fake.MODEL, model, family="test")
    return tmp_path / "dir", model


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# ---- the file format -----------------------------------------------------------------------

ARRAYS = {
    "bf16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "f8": np.linspace(-3, 3, 5).astype(ml_dtypes.float8_e4m3fn),
    "f32": np.linspace(0, 1, 7, dtype=np.float32),
    "scalar": np.array(3, np.int32),
    "empty": np.zeros((0, 4), np.float32),
    "bool": np.array([True, False]),
    "u32": np.arange(4, dtype=np.uint32),
}


def test_file_round_trip(tmp_path):
    path = fake.write(tmp_path / "a.safetensors", ARRAYS)
    file = tensorfile.TensorFile(path)
    for read in (file.read, file.view):
        fake.assert_identical({name: read(name) for name in file.entries}, ARRAYS)
    with pytest.raises(ValueError, match="read-only"):
        file.view("f32")[0] = 1


def test_the_library_reads_our_files_and_we_read_its(tmp_path):
    plain = {name: ARRAYS[name] for name in ("f32", "scalar", "empty", "u32")}
    fake.assert_identical(safetensors.numpy.load_file(fake.write(tmp_path / "ours.safetensors", plain)), plain)
    safetensors.numpy.save_file(plain, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    fake.assert_identical(fake.read(tmp_path / "theirs.safetensors"), plain)
    assert tensorfile.TensorFile(tmp_path / "theirs.safetensors").metadata == {"format": "np"}


def test_parts_must_add_up(tmp_path):
    layout = {"x": ((3, 2), np.dtype(np.float32))}
    with pytest.raises(ValueError, match="x needs 6 numbers, received 4"):
        tensorfile.write(tmp_path / "a", layout, lambda _: np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="x is laid out as float32, received a part of float64"):
        tensorfile.write(tmp_path / "a", layout, lambda _: np.zeros((3, 2)))


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_truncated_file(keep, tmp_path):
    path = fake.write(tmp_path / "a.safetensors", ARRAYS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="a.safetensors is (truncated|not a safetensors file)"):
        tensorfile.TensorFile(path)


def test_broken_files(tmp_path):
    path = fake.write(tmp_path / "a.safetensors", ARRAYS)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="1 bytes after its last tensor"):
        tensorfile.TensorFile(path)
    path.write_bytes(struct.pack("<Q", 4) + b"{]  ")
    with pytest.raises(ValueError, match="is not a safetensors file: Expecting property name"):
        tensorfile.TensorFile(path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="x spans 8 bytes, its shape and dtype need 12"):
        tensorfile.TensorFile(path)
    with pytest.raises(ValueError, match="no such file"):
        tensorfile.TensorFile(tmp_path / "absent")


# ---- whole or not at all -------------------------------------------------------------------


def test_failed_writing_keeps_what_was_there(tmp_path):
    for replaced, write in ((replaced_file, lambda p: p.write_text("new")), (replaced_folder, lambda p: (p / "new").touch())):
        place = tmp_path / replaced.__name__
        with replaced(place) as partial:
            write(partial)
        before = place.read_text() if place.is_file() else os.listdir(place)
        with pytest.raises(RuntimeError), replaced(place) as partial:
            if partial.is_dir():
                (partial / "half").touch()
            else:
                partial.write_text("half")
            raise RuntimeError
        assert (place.read_text() if place.is_file() else os.listdir(place)) == before
    assert sorted(os.listdir(tmp_path)) == ["replaced_file", "replaced_folder"]


def test_leftovers_are_cleared_and_a_folder_put_aside_comes_back(tmp_path):
    (tmp_path / ".dit.partial/orbax").mkdir(parents=True)
    (tmp_path / ".dit.partial/half").touch()
    (tmp_path / ".dit.replaced").mkdir()
    (tmp_path / ".dit.replaced/old").touch()
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "dit") as partial:
        assert os.listdir(partial) == []
        raise RuntimeError
    assert os.listdir(tmp_path) == ["dit"] and os.listdir(tmp_path / "dit") == ["old"]
    (tmp_path / ".state.partial").write_text("longer than what comes")
    checkpoint.save_state(tmp_path / "state", {"x": 1})
    assert sorted(os.listdir(tmp_path)) == ["dit", "state"] and checkpoint.load_state(tmp_path / "state") == {"x": 1}


def test_two_writers_do_not_mix(tmp_path):
    with replaced_folder(tmp_path / "dit") as partial:
        (partial / "first").touch()
        with pytest.raises(ValueError, match="another process is writing"), replaced_folder(tmp_path / "dit"):
            pass
    with replaced_file(tmp_path / "state") as partial:
        partial.write_text("first")
        with pytest.raises(ValueError, match="another process is writing"), replaced_file(tmp_path / "state"):
            pass
    assert os.listdir(tmp_path / "dit") == ["first"] and (tmp_path / "state").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["dit", "state"]


def test_unwritable_places_are_named_as_the_caller_knows_them(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / ".dit.partial").touch()
    for replaced, place in (
        (replaced_folder, tmp_path / "file/dit"),
        (replaced_folder, tmp_path / "dit"),
        (replaced_file, tmp_path / "file/state"),
        (replaced_file, tmp_path / "folder"),
    ):
        with pytest.raises(ValueError, match=f"{place} cannot be written: "), replaced(place):
            pass
    assert sorted(os.listdir(tmp_path)) == [".dit.partial", "file", "folder"]


# ---- components ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.parametrize("name", PARTS)
def test_component_round_trip(name, format, tmp_path):
    part = PARTS[name]
    module = module_of(part)
    place = checkpoint.save_component(tmp_path / "dir", name, part, module, family="test", format=format)
    assert sorted(os.listdir(place)) == sorted(["config.json", "orbax" if format == "orbax" else "model.safetensors"])
    found_part, found = checkpoint.load_component(tmp_path / "dir", name)
    assert found_part == part and type(found) is type(module)
    assert_equal(found, module)
    half_part, half = checkpoint.load_component(tmp_path / "dir", name, dtype="bfloat16")
    assert half_part == dataclasses.replace(part, dtype="bfloat16")
    like = checkpoint.flatten(checkpoint.abstract(half_part))
    expected = {name: leaf.astype(like[name].dtype) for name, leaf in checkpoint.flatten(module).items()}
    assert_equal(checkpoint.flatten(half), expected)


def test_flatten_and_build_are_inverse():
    model = module_of(fake.MODEL)
    flat = checkpoint.flatten(model)
    assert isinstance(model, WanDiT) and all(isinstance(leaf, jax.Array) for leaf in flat.values())
    assert model.blocks.self_attention.qkv.kernel[...] is flat["blocks.self_attention.qkv.kernel"]
    assert flat["blocks.self_attention.qkv.kernel"].shape == (3, 3, 32, 32)
    assert_equal(checkpoint.build(checkpoint.abstract(fake.MODEL), flat), model)


def test_shapes_take_no_memory_at_full_size():
    sizes = {part: sum(int(np.prod(shape)) for shape in checkpoint.shapes(part).values()) for part in (Model(), Vae(), Text())}
    assert list(sizes.values()) == [1_418_996_800, 126_892_531, 5_680_910_336]  # as the PyTorch originals count


def test_loading_needs_no_torch(saved):
    script = (
        "import sys, lf_jax.checkpoint as c; c.load_component(sys.argv[1], 'dit'); "
        "assert not {'torch', 'convert', 'orbax.checkpoint'} & set(sys.modules)"
    )
    root = os.path.dirname(os.path.dirname(lf_jax.__file__))
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script, saved[0]], env=environment, check=True, timeout=120)


def test_missing_and_wrong_folders(saved, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        checkpoint.load_component(tmp_path / "absent", "dit")
    with pytest.raises(ValueError, match="is not a converted folder: it has none of dit/config.json, vae/config.json"):
        checkpoint.load_component(tmp_path, "dit")
    with pytest.raises(ValueError, match="has no vae, only dit: `lf-jax convert` adds it from a checkpoint"):
        checkpoint.load_component(saved[0], "vae")
    with pytest.raises(ValueError, match="name='unet' must be one of dit, vae, text"):
        checkpoint.load_component(saved[0], "unet")


def test_truncated_component(saved):
    path = saved[0] / "dit/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated: expected \d+ bytes, the file has \d+"):
        checkpoint.load_component(saved[0], "dit")
    path.unlink()
    with pytest.raises(ValueError, match="no such file: .*model.safetensors"):
        checkpoint.load_component(saved[0], "dit")


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_component_of_the_wrong_size(format, saved):
    folder, model = saved
    wrong = dataclasses.replace(fake.MODEL, ffn_dim=40, layers=2)
    checkpoint.save_component(folder, "dit", wrong, model, format=format)
    with pytest.raises(ValueError, match=r"does not fit the config beside it:[\s\S]*expected \[2, 32\], received \[3, 32\]"):
        checkpoint.load_component(folder, "dit")
    with pytest.raises(ValueError, match="does not fit the config beside it"):
        checkpoint.check_component(folder, "dit")


def test_missing_and_unknown_parameters(saved):
    folder, model = saved
    arrays = checkpoint.flatten(model)
    arrays["surplus"] = arrays.pop("head.linear.bias")
    checkpoint.save_component(folder, "dit", fake.MODEL, arrays)
    with pytest.raises(ValueError, match=r"missing head.linear.bias \[64\]\n  unknown surplus \[64\]"):
        checkpoint.load_component(folder, "dit")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "config.json has format 2, this version reads 1"),
        ({"config": {"dim": 32, "colour": 1}}, "Model has no fields colour"),
        ({"config": {"dim": 33}}, "must divide self.dim=33"),
    ],
)
def test_config_that_cannot_be_used(change, message, saved):
    path = saved[0] / "dit/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_part(saved[0], "dit")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        checkpoint.load_part(saved[0], "dit")


# ---- settings ------------------------------------------------------------------------------


def test_whole_config_round_trip(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="has no config.json"):
        checkpoint.load_config(folder)
    settings = Config(
        model=fake.MODEL,
        vae=fake.VAE,
        text=fake.TEXT,
        cache=Cache(window=12, sink=1, positions="relative"),
        sparsity=Sparsity(policy="light_forcing", base=None),
        rollout=Rollout(timesteps=(1000.0, 500.0), shift=8.0),
        video=Video(height=64, width=96, negative_prompt="déjà vu"),
    )
    checkpoint.save_settings(folder, settings)
    alone = checkpoint.load_config(folder)
    assert alone == dataclasses.replace(settings, vae=Vae(), text=Text(dim=16, length=12))
    for name in ("vae", "text"):
        checkpoint.save_component(folder, name, PARTS[name], module_of(PARTS[name]))
    assert checkpoint.load_config(folder) == settings
    assert checkpoint.components(folder) == ("dit", "vae", "text")


def test_a_selector_function_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="is a function; only a name can be written"):
        checkpoint.save_settings(tmp_path, Config(sparsity=Sparsity(policy=print)))


# ---- states --------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "inner", "nothing"], meta_fields=["size", "name"])
@dataclasses.dataclass(frozen=True)
class State:
    keys: object
    inner: object
    nothing: object
    size: int
    name: str


def a_state(impl: str) -> State:
    grid = Grid(rows=2, columns=3, block_q=4, block_k=4)
    kv = cache.empty(fake.MODEL, grid, Cache(window=4, sink=1, positions="relative"), True, 2, 4)
    random = np.random.default_rng(0)
    kv = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), kv)
    keys = jax.random.split(jax.random.key(7, impl=impl), 3)
    features = {"a": (jnp.ones((2, 3), jnp.bfloat16), None), "b": [jnp.int32(3), jnp.array([True])]}
    return State(keys, (kv, features), None, 5, "x")


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_state_round_trip(impl, tmp_path):
    state = a_state(impl)
    checkpoint.save_state(tmp_path / "s.safetensors", state)
    found = checkpoint.load_state(tmp_path / "s.safetensors", classes=[State])
    assert_equal(found, state)
    assert (found.size, found.name, found.nothing, found.inner[0].frames, found.inner[0].sink) == (5, "x", None, 4, 1)
    draws = (jax.random.normal(keys[1], (4,)) for keys in (found.keys, state.keys))
    np.testing.assert_array_equal(*draws)


def test_state_classes_are_only_those_allowed(tmp_path):
    checkpoint.save_state(tmp_path / "s", a_state("threefry2x32"))
    with pytest.raises(ValueError, match="pass that class in `classes`"):
        checkpoint.load_state(tmp_path / "s")
    for name, message in (("os:system", "pass that class"), ("lf_jax.config:check", "which lf_jax does not have")):
        structure = json.dumps({"dataclass": name, "fields": {}})
        tensorfile.write(tmp_path / "bad", {}, lambda _: [], {"format": "1", "structure": structure})
        with pytest.raises(ValueError, match=message):
            checkpoint.load_state(tmp_path / "bad")


def test_states_that_cannot_be_read(tmp_path):
    path = tmp_path / "s"
    checkpoint.save_state(path, {"x": jnp.ones(3)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.load_state(path)
    fake.write(path, ARRAYS)
    with pytest.raises(ValueError, match="holds tensors but no rollout state"):
        checkpoint.load_state(path)
    tensorfile.write(path, {}, lambda _: [], {"format": "9", "structure": "{}"})
    with pytest.raises(ValueError, match="format 9, this version reads 1"):
        checkpoint.load_state(path)


def test_failed_save_keeps_the_old_state(tmp_path):
    checkpoint.save_state(tmp_path / "s", {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match="state.y is a object, which cannot be saved"):
        checkpoint.save_state(tmp_path / "s", {"x": jnp.zeros(3), "y": object()})
    np.testing.assert_array_equal(checkpoint.load_state(tmp_path / "s")["x"], np.ones(3))
    assert os.listdir(tmp_path) == ["s"]
