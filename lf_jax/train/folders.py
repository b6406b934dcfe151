"""Model folders at both ends of a run: what networks start from, and what becomes of them."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from lf_jax import checkpoint, loading, presets, text
from lf_jax.checkpoint.component import Part
from lf_jax.checkpoint.replace import replaced_folder
from lf_jax.config import Config, check
from lf_jax.loading import COMPONENT_PARTS
from lf_jax.train.config import EXPORTED, Train


def start(train: Train, role: str) -> str | os.PathLike | None:
    """The model folder that a role starts from, or a preset that has random weights; None where `init` names nothing."""
    place = train.init.get(role)
    return None if place is None else loading.shipped(place)


def configure(train: Train) -> Config:
    """The config that a run computes with: everywhere the compute dtype, and the latent statistics of the VAE it starts from.

    Raises:
        ValueError: if `init` names what is neither a model folder nor a preset.
    """
    config, source = train.config, start(train, train.main)
    for place in map(loading.shipped, train.init.values()):
        known = presets.is_name(place) or bool(checkpoint.components(place))
        check(
            known, f"init {str(place)!r} is neither a model folder nor a preset; the presets are {', '.join(presets.names())}"
        )
    if source is not None and not presets.is_name(source) and "vae" in checkpoint.components(source):
        found = checkpoint.load_part(source, "vae")
        config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, mean=found.mean, std=found.std))
    return _with_dtypes(config, {part: train.compute_dtype for part in COMPONENT_PARTS.values()})


def _with_dtypes(config: Config, dtypes: Mapping[str, str]) -> Config:
    parts = {name: dataclasses.replace(getattr(config, name), dtype=dtype) for name, dtype in dtypes.items()}
    return dataclasses.replace(config, **parts)


@dataclasses.dataclass(frozen=True)
class Loader:
    """What `Objective.build` loads with: the component "dit", "vae" or "text" that a role is to start from.

    Arrays come in the dtype that they are stored in, inside modules whose config has the compute dtype. None where `init`
    names nothing for the role, its folder lacks the component, or batches make it unnecessary.

    Attributes:
        config: of `configure`; the network that will be exported must fit it.
        carried: the names of a batch's arrays.
        note: called with one line about weights that are random.
        asked: the roles that something was asked for, for `check_used`.
    """

    train: Train
    config: Config
    carried: frozenset[str]
    note: Callable[[str], None]
    asked: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, role: str, component: str) -> nnx.Module | None:
        self.asked.add(role)
        source = start(self.train, role)
        if source is None or {"vae": "latents", "text": "text"}.get(component) in self.carried:
            return None
        if presets.is_name(source):
            self.note(f"{role} {component}: random weights of {source}")
            part = getattr(presets.load(source), COMPONENT_PARTS[component])
            module = loading.random_module(part, self.train.seed)
        elif component in checkpoint.components(source):
            part, module = checkpoint.load_component(source, component)
        else:
            return None
        part = dataclasses.replace(part, dtype=self.train.compute_dtype)
        if role in EXPORTED:
            if component == "dit" and self.config.model.linear_branch:  # begins as the zeros that change nothing
                part = dataclasses.replace(part, linear_branch=True)
            self._check(role, source, component, part)
        wanted, arrays = checkpoint.abstract(part), checkpoint.flatten(module)
        shapes = {name: leaf for name, leaf in checkpoint.flatten(wanted).items() if name not in arrays}
        return checkpoint.build(wanted, arrays | {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()})

    def check_used(self) -> None:
        """Raises ValueError if `init` names a role that the objective does not have."""
        unknown = [role for role in self.train.init if role not in self.asked]
        check(not unknown, f"init has no use for {', '.join(unknown)}: the objective loads {', '.join(sorted(self.asked))}")

    def _check(self, role: str, source: str | os.PathLike, component: str, part: Part) -> None:
        name = COMPONENT_PARTS[component]
        ours, theirs = (dataclasses.asdict(one) for one in (getattr(self.config, name), part))
        faults = [
            f"{name}.{field}={ours[field]} but {theirs[field]} in {source}" for field in ours if ours[field] != theirs[field]
        ]
        check(not faults, f"{role} does not fit its init: {'; '.join(faults)}")


def export(folder: str | os.PathLike, train: Train, config: Config, network: Mapping[str, nnx.Module]) -> None:
    """Writes a model folder that `lf_jax.load` and the next run's `init` read, whole or not at all.

    Args:
        config: of the run; stored dtypes are those of `train.config`.
        network: the trained components. The others are copied from the folder that the run started from.
    """
    config = _with_dtypes(config, {part: getattr(train.config, part).dtype for part in COMPONENT_PARTS.values()})
    source = start(train, train.main)
    with replaced_folder(folder) as partial:
        for name, module in network.items():
            part = getattr(config, COMPONENT_PARTS[name])
            wanted = checkpoint.flatten(checkpoint.abstract(part))
            arrays = {key: np.asarray(array.astype(wanted[key].dtype)) for key, array in checkpoint.flatten(module).items()}
            checkpoint.save_component(partial, name, part, arrays, family="lf_jax")
        for name in () if source is None or presets.is_name(source) else checkpoint.components(source):
            if name not in network:
                shutil.copytree(pathlib.Path(source) / name, partial / name)
        if "text" in network:
            (partial / "text" / loading.SPIECE).write_bytes(_tokenizer(train))
        checkpoint.save_settings(partial, config)


def _tokenizer(train: Train) -> bytes:
    """The tokenizer that the data was read with."""
    folder = getattr(train.data, "model", None)
    return text.tiny_model() if folder is None else (pathlib.Path(folder) / "text" / loading.SPIECE).read_bytes()
