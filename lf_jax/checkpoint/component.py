"""Converted folders: `DIR/{dit,vae,text}/{config.json, model.safetensors}` and `DIR/config.json`.

A component's config.json holds its own part of `Config`; DIR/config.json holds the rest. Loading needs no torch.
"""

import dataclasses
import functools
import json
import os
import pathlib
import typing
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from lf_jax import quant, vae
from lf_jax.arrays import Array
from lf_jax.checkpoint import tensorfile
from lf_jax.checkpoint.replace import replaced_file, replaced_folder
from lf_jax.config import Cache, Config, Model, Rollout, Sparsity, Text, Vae, Video, check
from lf_jax.dit.model import WanDiT
from lf_jax.text.umt5 import UMT5

FORMAT = 1  # of converted folders; a reader refuses any other
COMPONENTS = {"dit": Model, "vae": Vae, "text": Text}
SETTINGS = {"cache": Cache, "sparsity": Sparsity, "rollout": Rollout, "video": Video}
TENSORS, ORBAX = "model.safetensors", "orbax"  # a component has one of the two
READERS = 4  # tensors on their way from the file to the device at a time: disk, page cache and device overlap

Part = Model | Vae | Text


def abstract(part: Part) -> nnx.Module:
    """The module of a component with shapes in place of arrays: no memory, no random numbers."""
    leaves, tree = _skeleton(part)
    return jax.tree_util.tree_unflatten(tree, leaves)


@functools.lru_cache(maxsize=8)  # tracing the large constructors takes a second, and a conversion asks several times
def _skeleton(part: Part) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    constructor = WanDiT if isinstance(part, Model) else vae.build if isinstance(part, Vae) else UMT5
    return jax.tree_util.tree_flatten(jax.eval_shape(lambda: constructor(part, rngs=nnx.Rngs(0))))


def flatten(module: Any) -> dict[str, Any]:
    """Every parameter (array or shape) by its dotted path, e.g. `blocks.self_attention.q.kernel`."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]}


def build(module: Any, arrays: Mapping[str, Any]) -> Any:
    """`module`, or any pytree, with `arrays`, by dotted path, in place of its leaves."""
    paths, tree = jax.tree_util.tree_flatten_with_path(module)
    return jax.tree_util.tree_unflatten(tree, [arrays[_dotted(path)] for path, _ in paths])


def _dotted(path: Iterable[Any]) -> str:
    keys = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", None)))) for key in path]
    return ".".join(keys[:-1] if keys[-1:] == ["value"] else keys)  # the last step goes into the nnx.Param


def shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a component."""
    return {name: leaf.shape for name, leaf in flatten(abstract(part)).items()}


def save_component(
    folder: str | os.PathLike,
    name: str,
    part: Part,
    arrays: Mapping[str, Any] | nnx.Module,
    *,
    family: str = "",
    format: str = "safetensors",
) -> pathlib.Path:
    """Writes `folder/name`, whole or not at all, in place of what was there.

    Args:
        arrays: the module, or its arrays by dotted path.
        family: where the tensors come from; kept for the reader's information.
        format: "safetensors" or "orbax".
    """
    arrays = flatten(arrays) if isinstance(arrays, nnx.Module) else arrays
    with replaced_folder(pathlib.Path(folder) / name) as partial:
        layout = {key: (tuple(array.shape), np.dtype(array.dtype)) for key, array in arrays.items()}
        tensorfile.write(partial / TENSORS, layout, lambda key: [np.asarray(arrays[key])])
        finish_component(partial, name, part, family=family, format=format)
    return pathlib.Path(folder) / name


def finish_component(folder: pathlib.Path, name: str, part: Part, *, family: str, format: str, **notes: Any) -> None:
    """Adds config.json to a folder that holds model.safetensors, and turns the tensors into an Orbax checkpoint if asked."""
    check(format in ("safetensors", "orbax"), f"{format=} must be 'safetensors' or 'orbax'")
    if format == "orbax":
        import orbax.checkpoint  # over a second to import, and most users never need it

        file = tensorfile.TensorFile(folder / TENSORS)
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / ORBAX, {key: file.view(key) for key in file.entries})
        (folder / TENSORS).unlink()
    text = {"format": FORMAT, "component": name, "family": family, **notes, "config": dataclasses.asdict(part)}
    (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n")


def load_component(
    folder: str | os.PathLike, name: str, *, dtype: str | None = None, linears: str | None = None, sharding: Any = None
) -> tuple[Part, nnx.Module]:
    """A component of a converted folder, on the default device or as `sharding` says.

    Args:
        name: "dit", "vae" or "text".
        dtype: of the module, in place of the one it was converted with. Each parameter takes the dtype that the
            module gives it, whatever the file holds.
        linears: of a transformer, the form of its linear layers, in place of the one that is stored: they are quantised, or
            multiplied out, while they load.

    Raises:
        ValueError: if the folder is not a converted one, lacks the component, was written in another format, is
            truncated, or holds parameters that do not fit the config beside them.
    """
    part, place = load_part(folder, name), pathlib.Path(folder) / name
    file, kept = _open(place, part), flatten(abstract(part))
    changes = {key: value for key, value in (("dtype", dtype), ("linears", linears)) if value is not None}
    part = dataclasses.replace(part, **changes)
    module = abstract(part)
    wanted = flatten(module)
    if file is None:
        like = {key: wanted.get(key, leaf) for key, leaf in kept.items()}
        loaded = _load_orbax(place / ORBAX, like, sharding)

    def read(key: str) -> Array:  # from the file's pages straight to the device
        return loaded[key] if file is None else jax.device_put(file.view(key), sharding, may_alias=False)

    def load(key: str) -> Array:
        array = read(key) if key in kept else quant.of_other_form(key, read)
        return array.astype(wanted[key].dtype).block_until_ready()

    with ThreadPoolExecutor(READERS) as pool:  # so that at most a few are on the device in both dtypes
        return part, build(module, dict(zip(wanted, pool.map(load, wanted), strict=True)))


def check_component(folder: str | os.PathLike, name: str) -> None:
    """Raises ValueError where `load_component` would, but reads no tensor: cheap, so it can come before long work."""
    _open(pathlib.Path(folder) / name, load_part(folder, name))


def _open(place: pathlib.Path, part: Part) -> tensorfile.TensorFile | None:
    """The tensors of a component, which fit `part`; None where they are an Orbax checkpoint."""
    if (place / ORBAX).is_dir():
        file, path = None, place / ORBAX
        found = {key: tuple(leaf.shape) for key, leaf in _orbax_metadata(path).items()}
    else:
        file, path = tensorfile.TensorFile(place / TENSORS), place / TENSORS
        found = {key: entry.shape for key, entry in file.entries.items()}
    _compare(path, found, flatten(abstract(part)))
    return file


def _orbax_metadata(path: pathlib.Path) -> Mapping[str, Any]:
    """What has the shape and dtype of every stored array, by dotted path."""
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(path.absolute()).item_metadata.tree


def _load_orbax(path: pathlib.Path, wanted: Mapping[str, Any], sharding: Any) -> dict[str, Array]:
    """`wanted`, by dotted path what has the shape and dtype to load."""
    import orbax.checkpoint

    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for key, leaf in wanted.items()}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), like)


def stored(folder: str | os.PathLike, name: str) -> dict[str, np.ndarray]:
    """The arrays of a component as they are stored, by dotted path: views of the file, or all in memory from Orbax.

    Raises:
        ValueError: as `load_component`.
    """
    place = pathlib.Path(folder) / name
    file = _open(place, load_part(folder, name))
    if file is None:
        arrays = _load_orbax(place / ORBAX, _orbax_metadata(place / ORBAX), None)
        return {key: np.asarray(array) for key, array in arrays.items()}
    return {key: file.view(key) for key in file.entries}


def _compare(place: pathlib.Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Any]) -> None:
    faults = [f"missing {key} {list(wanted[key].shape)}" for key in wanted if key not in found]
    faults += [f"unknown {key} {list(found[key])}" for key in found if key not in wanted]
    faults += [
        f"{key}: expected {list(wanted[key].shape)}, received {list(found[key])}"
        for key in wanted
        if key in found and tuple(wanted[key].shape) != found[key]
    ]
    more = f"\n  ... and {len(faults) - 12} more" if len(faults) > 12 else ""
    check(not faults, f"{place} does not fit the config beside it:\n  " + "\n  ".join(faults[:12]) + more)


def load_part(folder: str | os.PathLike, name: str) -> Part:
    """The config of one component. Raises ValueError as `load_component` does."""
    check(name in COMPONENTS, f"{name=} must be one of {', '.join(COMPONENTS)}")
    text = _read(pathlib.Path(folder), name)
    return _decode(COMPONENTS[name], text["config"], pathlib.Path(folder) / name / "config.json")


def load_notes(folder: str | os.PathLike, name: str) -> dict[str, Any]:
    """What a component's config.json says beside the config: family, format, and what the converter noted."""
    return {key: value for key, value in _read(pathlib.Path(folder), name).items() if key != "config"}


def components(folder: str | os.PathLike) -> tuple[str, ...]:
    """The components that a converted folder has."""
    return tuple(name for name in COMPONENTS if (pathlib.Path(folder) / name / "config.json").is_file())


def _read(folder: pathlib.Path, name: str) -> dict[str, Any]:
    check(folder.is_dir(), f"no such folder: {folder}")
    present = components(folder)
    check(
        bool(present), f"{folder} is not a converted folder: it has none of {', '.join(f'{c}/config.json' for c in COMPONENTS)}"
    )
    advice = "`lf-jax convert` adds it from a checkpoint that holds it"
    check(name in present, f"{folder} has no {name}, only {', '.join(present)}: {advice}")
    return _read_json(folder / name / "config.json")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        text = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    version = text.get("format") if isinstance(text, dict) else None
    check(version == FORMAT, f"{path} has format {version}, this version reads {FORMAT}: convert the checkpoint again")
    return text


def _decode(kind: type, fields: Mapping[str, Any], path: pathlib.Path) -> Any:
    hints = typing.get_type_hints(kind)
    check(set(fields) <= set(hints), f"{path}: {kind.__name__} has no fields {', '.join(sorted(set(fields) - set(hints)))}")
    return kind(**{key: _value(hints[key], value) for key, value in fields.items()})


def _value(hint: Any, value: Any) -> Any:
    """A value from JSON, which knows no tuples and writes a float that was given as an integer as one."""
    if isinstance(value, list):
        return tuple(_value(typing.get_args(hint)[0], item) for item in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in (hint, *typing.get_args(hint)) else value


def save_settings(folder: str | os.PathLike, settings: Config) -> None:
    """Writes the part of a config that no component holds, as `folder/config.json`.

    Raises:
        ValueError: if the selector is a function: only names can be written.
    """
    policy = settings.sparsity.policy
    check(isinstance(policy, str), f"sparsity.policy={policy} is a function; only a name can be written")
    text = {"format": FORMAT, **{name: dataclasses.asdict(getattr(settings, name)) for name in SETTINGS}}
    with replaced_file(pathlib.Path(folder) / "config.json") as partial:
        partial.write_text(json.dumps(text, indent=2) + "\n")


def load_config(folder: str | os.PathLike) -> Config:
    """The whole config of a converted folder that has a transformer, or of one that has an autoencoder only.

    What is missing has its default part, with the widths that the others need: latents or saved embeddings are enough for
    some work, and an autoencoder alone, as its training leaves it, encodes videos for others.
    """
    folder = pathlib.Path(folder)
    present = components(folder)
    model = Model(channels=load_part(folder, "vae").channels) if present == ("vae",) else load_part(folder, "dit")
    check((folder / "config.json").is_file(), f"{folder} has no config.json: convert its transformer again")
    text = _read_json(folder / "config.json")
    parts = {name: load_part(folder, name) for name in ("vae", "text") if name in present}
    parts.setdefault("text", Text(dim=model.text_dim, length=model.text_len))
    rest = {name: _decode(kind, text.get(name, {}), folder / "config.json") for name, kind in SETTINGS.items()}
    return Config(model=model, **parts, **rest)
