"""What a training run is: frozen dataclasses that check themselves.

A preset is a Python file that ends in `TRAIN = Train(...)`; the command line can override any field of it, those of the
objective, the data, the optimizers and the model's config included.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from lf_jax import presets
from lf_jax.config import Config, check, check_dtype
from lf_jax.train.objectives.objective import Objective

EXPORTED = ("model", "generator")  # roles whose network becomes the model folder; a critic never does
FREE = ("steps", "save_every", "keep", "log_every")  # fields that a resumed run may change


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How one network is updated: AdamW on clipped gradients, and an average of the weights."""

    learning_rate: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # of kernels and embeddings; norms, biases and modulations have none
    clip: float | None = 10.0  # largest global norm of the gradient
    warmup: int = 0  # steps of the run over which the learning rate rises
    decay: Literal["constant", "linear", "cosine"] = "constant"  # from the end of the warmup to the last step
    final: float = 0.0  # where the decay ends, as a fraction of the learning rate
    ema: float | None = None  # decay of the averaged weights an update; None keeps none, and the raw ones are exported
    ema_start: int = 0  # step of the run from which weights are averaged

    def __post_init__(self):
        check(self.learning_rate > 0, f"{self.learning_rate=} must be positive")
        check(all(0 <= beta < 1 for beta in self.betas), f"{self.betas=} must lie in [0, 1)")
        check(self.eps > 0, f"{self.eps=} must be positive")
        check(self.weight_decay >= 0, f"{self.weight_decay=} must not be negative")
        check(self.clip is None or self.clip > 0, f"{self.clip=} must be positive, or None")
        check(self.warmup >= 0, f"{self.warmup=} must not be negative")
        check(0 <= self.final <= 1, f"{self.final=} must lie in [0, 1]")
        check(self.ema is None or 0 <= self.ema < 1, f"{self.ema=} must lie in [0, 1), or be None")
        check(self.ema is not None or self.ema_start == 0, f"{self.ema_start=} has no use without ema")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the linear layers of the transformer blocks, trained in their place (LongLive 1.0)."""

    rank: int = 0  # 0 trains the weights themselves
    alpha: float | None = None  # updates are multiplied by alpha / rank; None means rank

    def __post_init__(self):
        check(self.rank >= 0, f"{self.rank=} must not be negative")
        check(self.alpha is None or self.rank > 0, f"{self.alpha=} has no use at {self.rank=}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices: batches are cut over all of them, weights, moments and averages over `fsdp`."""

    data: int = 1
    fsdp: int = 1

    def __post_init__(self):
        check(self.data > 0 and self.fsdp > 0, f"{self.data=} and {self.fsdp=} must be positive")

    @property
    def size(self) -> int:
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True)
class Train:
    """One stage of training."""

    objective: Any  # an lf_jax.train.objectives.Objective; any class that has its methods will do
    data: Any  # has the `batch` of lf_jax.train.data.Source
    optimizers: Mapping[str, Optimizer]  # of every trained network, by its name
    config: Annotated[Config, tyro.conf.arg(name="")] = Config()  # of the model; its dtypes are those of the export
    init: Mapping[str, str] = dataclasses.field(default_factory=dict)  # role -> model folder, or preset (random weights)
    steps: int = 1000
    batch: int = 8  # samples of an update, over all devices and micro-batches
    accumulate: int = 1  # micro-batches of an update, one after the other
    seed: int = 0  # of everything that is drawn
    lora: Lora = Lora()
    mesh: Mesh = Mesh()
    compute_dtype: str = "bfloat16"  # of activations and of frozen weights; trained weights are float32
    save_every: int = 500  # steps between two checkpoints
    keep: int = 3  # checkpoints kept, the newest
    log_every: int = 10  # steps between two lines of metrics

    def __post_init__(self):
        check(isinstance(self.objective, Objective), f"{self.objective=} must be an objective: build, updates, gradients")
        check(callable(getattr(self.data, "batch", None)), f"{self.data=} must be a source of data: batch")
        check_dtype(self.compute_dtype)
        for name in ("steps", "batch", "accumulate", "save_every", "keep", "log_every"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        unit = self.accumulate * self.mesh.size
        check(self.batch % unit == 0, f"{self.batch=} must be a multiple of accumulate x devices = {unit}")
        mains = [role for role in EXPORTED if role in self.optimizers]
        check(len(mains) == 1, f"optimizers are for {', '.join(self.optimizers)}; expected one of {' or '.join(EXPORTED)}")

    @property
    def main(self) -> str:
        """The role whose network is exported, and whose folder of `init` has the components that are not trained."""
        return next(role for role in EXPORTED if role in self.optimizers)


def load(source: str | os.PathLike) -> Train:
    """The run of a preset, or of a Python file, which is run.

    Raises:
        ValueError: if `source` is neither a preset nor a file, or the file does not set `TRAIN` to a `Train`.
    """
    path, found = presets.run(source)
    train = found.get("TRAIN")
    check(isinstance(train, Train), f"{path} must set TRAIN to an lf_jax.train.Train, received {type(train).__name__}")
    return train


def describe(value: Any, path: str = "") -> dict[str, Any]:
    """A config as JSON can hold it: dotted field -> value, and for a dataclass its class.

    Raises:
        ValueError: for a value that a file cannot hold, such as a function.
    """
    inner = f"{path}." if path else ""
    if dataclasses.is_dataclass(value):
        found = {path: type(value).__name__} if path else {}
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        found, fields = {}, value
    else:
        return {path: _plain(value, path)}
    for name, field in fields.items():
        found |= describe(field, f"{inner}{name}")
    return found


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item, path) for item in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    check(value is None or isinstance(value, bool | int | float | str), f"{path}={value!r} cannot be written into a file")
    return value


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Where two descriptions differ, but for the fields that a resumed run may change."""
    names = [name for name in {**theirs, **ours} if name not in FREE]
    show = [(name, *(repr(run[name]) if name in run else "absent" for run in (ours, theirs))) for name in names]
    return [f"{name}={new}, was {old}" for name, new, old in show if new != old]
