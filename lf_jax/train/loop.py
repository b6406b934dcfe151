"""A training run, from the config to the model folder. Started again with the same config it goes on where it was."""

import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from lf_jax.arrays import Array
from lf_jax.checkpoint.replace import replaced_file
from lf_jax.config import Config, check
from lf_jax.train import folders, lora, mesh, state
from lf_jax.train.checkpoints import Checkpoints
from lf_jax.train.config import Train, describe, differences
from lf_jax.train.data.source import ahead
from lf_jax.train.metrics import Metrics


class Outcome(NamedTuple):
    """Where a slice of a run ended."""

    step: int  # steps done in all
    finished: bool  # the model folder is there


def run(
    train: Train,
    folder: str | os.PathLike,
    *,
    minutes: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = print,
    report: Callable[[int, dict[str, Any] | None], None] = lambda step, line: None,
) -> Outcome:
    """Trains until the last step, or for a slice of it; then there is a checkpoint to go on from.

    The folder gets `train.json` (the config), `checkpoints/STEP`, `metrics.jsonl`, and in the end `model`, and with
    adapters `lora.safetensors`. A run that is killed goes on from its last checkpoint, bit by bit as if it had not been,
    on the same devices.

    Args:
        minutes: how long to train, start and compilation included; None: to the end.
        stop: asked after every step.
        note: takes a line for the user.
        report: called after every step with the steps done, and where there is one, the line of metrics.

    Raises:
        ValueError: if the folder holds a run of another config, init or data do not fit, no checkpoint is whole, or a metric
            is no longer finite.
    """
    began, folder = time.monotonic(), pathlib.Path(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claim(folder, train))
        config, devices = folders.configure(train), mesh.make(train.mesh)
        load = folders.Loader(train, config, frozenset(train.data.batch(config, 0, train.batch)), note)
        networks = train.objective.build(config, load, jax.random.key(train.seed))
        load.check_used()
        now, fixed, assemble = state.begin(train, networks, devices)
        del networks  # the state has copies, and these take the device's memory
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", train.keep, note))
        done, now = checkpoints.restore(now)
        if done:
            note(f"going on after step {done} of {train.steps}")
        metrics = Metrics(folder / "metrics.jsonl", done)
        update = state.compiled(train, config, devices, assemble, now)
        feed = stack.enter_context(contextlib.closing(batches(train, config, devices, done)))
        ended = done >= train.steps
        while not ended:
            for name in train.objective.updates(done):
                now, values = update[name](now, fixed, next(feed), np.int32(done))
                metrics.add(values, train.batch)
            done += 1
            ended = done == train.steps or stop() or (minutes is not None and time.monotonic() - began >= 60 * minutes)
            saving = ended or done % train.save_every == 0
            report(done, metrics.write(done) if saving or done % train.log_every == 0 else None)  # raises before NaN is saved
            if saving:
                checkpoints.save(done, now)
        if done >= train.steps:
            finish(train, config, folder, now[train.main], fixed, assemble[train.main])
    return Outcome(done, done >= train.steps)


@contextlib.contextmanager
def claim(folder: pathlib.Path, train: Train) -> Iterator[None]:
    """Makes the folder one of this run, and for the block, of this process.

    Raises:
        ValueError: if it is another run's, naming every field that differs, or another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is training in {folder}") from error
        path, ours = folder / "train.json", describe(train)
        if path.exists():
            changed = differences(ours, json.loads(path.read_text()))
            advice = "give the same options, or another --output"
            check(not changed, f"{folder} holds a run with another config: {', '.join(changed)}; {advice}")
        with replaced_file(path) as partial:
            partial.write_text(json.dumps(ours, indent=1) + "\n")
        yield


def batches(train: Train, config: Config, devices: jax.sharding.Mesh, start: int) -> Iterator[dict[str, Array]]:
    """A batch for every update from the step `start` on, on the devices, made ahead of time by a thread."""
    names = sorted(train.optimizers)
    draws = (
        step * len(names) + names.index(name) for step in range(start, train.steps) for name in train.objective.updates(step)
    )
    return ahead(lambda draw: jax.device_put(train.data.batch(config, draw, train.batch), mesh.samples(devices)), draws)


def finish(
    train: Train, config: Config, folder: pathlib.Path, trained: state.Trained, fixed: state.Fixed, assemble: state.Assemble
) -> None:
    """Writes the averaged weights of the main network, or the raw ones where none are averaged, as a model folder."""
    parameters = trained.parameters if trained.average is None else trained.average
    network = assemble(parameters, fixed.base[train.main])
    if hasattr(train.objective, "finish"):
        batch = partial(train.data.batch, config, size=train.batch)
        config = train.objective.finish(config, network, fixed.frozen, batch)
    if train.lora.rank:
        lora.save(folder / "lora.safetensors", parameters, train.lora)
    folders.export(folder / "model", train, config, network)
