"""A checkpoint into a converted folder. Everything is checked before the first byte is written."""

import dataclasses
import fnmatch
import hashlib
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from convert import lora as low_rank
from convert.exporting import as_source
from convert.families import FAMILIES, Family, Part
from convert.reader import Source, open_source, unwrapped
from convert.rules import ConversionError, Piece, plan
from convert.tensors import Tensors
from convert.writer import Progress, dtypes_of, main_dtype, write_component
from lf_jax import checkpoint, presets, quant
from lf_jax.checkpoint.component import Part as PartConfig
from lf_jax.config import Config, check

GENERATOR, AVERAGED = ("generator", "model", "state_dict", "generator_lora"), ("generator_ema",)
LORA = ("generator_lora", "state_dict", "model")
TOKENIZER = "spiece.model"
_TOKENIZERS = (TOKENIZER, f"google/umt5-xxl/{TOKENIZER}", f"tokenizer/{TOKENIZER}", f"../tokenizer/{TOKENIZER}")


class Planned(NamedTuple):
    """One component, checked and ready to be written."""

    name: str
    part: PartConfig
    pieces: list[Piece]
    tensors: Tensors
    dtypes: dict[str, Any]
    beside: dict[str, pathlib.Path]
    notes: dict[str, Any]


def convert(
    family: str,
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    ema: bool = False,
    dtype: str | None = None,
    preset: str | Config | None = None,
    format: str = "safetensors",
    lora: str | os.PathLike | None = None,
    lora_scale: float = 1.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, pathlib.Path]:
    """Converts the components that `source` holds into `target`, beside those that are there already.

    A LoRA as `source` is merged into the transformer of `target`.

    Args:
        family: a name of `convert.families.FAMILIES`.
        source: a file, an index of files, or a folder.
        target: the converted folder; made if it is absent.
        ema: take the averaged weights (`generator_ema`) of a training checkpoint.
        dtype: "bfloat16", "float32" or "float16" for every tensor; None, or "keep", keeps what the source has.
        preset: a preset, or a Python file, or a config. The transformer and the text encoder must fit it, and the
            folder takes its cache, sparsity, rollout and video settings. None: the dimensions are read off the source,
            and a transformer brings the settings of its family's own preset.
        format: "safetensors", or "orbax".
        lora: a LoRA to merge into the transformer, times `lora_scale`.
        overwrite: replace components that `target` has.
        progress: called with what was written, the bytes done and the bytes in all of a component.

    Returns:
        The folders written, by component.

    Raises:
        ValueError: if a file is missing, truncated or of another family, a component is there already, or `target`
            cannot be written. ConversionError, a ValueError, lists everything that does not fit.
        NotImplementedError: for quantisations that cannot be read.
    """
    check(family in FAMILIES, f"{family=} is none of {', '.join(FAMILIES)}")
    check(dtype in (None, "keep", "bfloat16", "float32", "float16"), f"{dtype=} must be keep, bfloat16, float32 or float16")
    check(format in ("safetensors", "orbax"), f"{format=} must be 'safetensors' or 'orbax'")
    dtype = None if dtype == "keep" else dtype
    source, target, chosen = pathlib.Path(source), pathlib.Path(target), FAMILIES[family]
    settings = preset if preset is None or isinstance(preset, Config) else presets.load(preset)
    if lora is None and chosen.lora and (source / chosen.lora).is_file():
        lora = source / chosen.lora
    planned = []
    for part, path in locate(chosen, source):
        opened = open_source(path, AVERAGED if ema else GENERATOR)
        check(not ema or opened.branch in AVERAGED, f"{opened.path} has no averaged weights ({AVERAGED[0]}): {ema=}")
        if part.module.COMPONENT == "dit" and low_rank.is_lora(opened.tensors):
            check(lora is None, f"{opened.path} is a LoRA itself: merge {lora=} in a second step")
            planned.append(_lora_onto(target, opened, part, dtype, lora_scale))
        else:
            planned.append(_plan(opened, part, dtype, settings, lora, lora_scale))
            old = target / planned[-1].name
            check(overwrite or not old.exists(), f"{old} is there already; overwrite=True (--overwrite) replaces it")
    check(
        lora is None or any("lora" in one.notes for one in planned), f"{source} holds no transformer that {lora=} could go into"
    )
    written = {}
    for one in planned:
        notes = {"family": family, **one.notes}
        written[one.name] = write_component(
            target, one.name, one.part, one.pieces, one.tensors,
            dtypes=one.dtypes, format=format, beside=one.beside, notes=notes, progress=progress,
        )  # fmt: skip
    if settings is None and "dit" in written and chosen.preset:
        settings = presets.load(chosen.preset)
    if settings is not None:
        checkpoint.save_settings(target, settings)
    return written


def locate(family: Family, source: pathlib.Path) -> list[tuple[Part, pathlib.Path]]:
    """Where the components of a family lie: all that a folder holds, or the one that a file is.

    Raises:
        ValueError: if there is no such file, or a folder holds none of the family, or several candidates for one.
    """
    check(source.exists(), f"no such file or folder: {source}")
    found = []
    for part in family.parts if source.is_dir() else ():
        for pattern in part.inside:
            paths = sorted(source.glob(pattern))
            check(len(paths) < 2, f"{source} holds several of {pattern}: {', '.join(p.name for p in paths)}; name one")
            if paths:
                found.append((part, paths[0]))
                break
    if found:
        return found
    names = (source.name, source.parent.name)
    by_name = [part for part in family.parts if any(fnmatch.fnmatch(n, pattern) for n in names for pattern in part.inside)]
    if by_name or len(family.parts) == 1 or source.is_file():
        return [((by_name or family.parts)[0], source)]
    wanted = ", ".join(pattern for part in family.parts for pattern in part.inside)
    raise ValueError(f"{source} holds nothing of this family; looked for {wanted}")


def _plan(
    opened: Source,
    part: Part,
    dtype: str | None,
    settings: Config | None,
    lora: str | os.PathLike | None,
    lora_scale: float,
) -> Planned:
    table, notes = part.module, {}
    tensors = getattr(table, "prepare", lambda same: same)(unwrapped(opened.tensors))
    if lora is not None and table.COMPONENT == "dit":
        update = open_source(pathlib.Path(lora), LORA)
        tensors = low_rank.merge(tensors, update.tensors, lora_scale)
        notes["lora"] = [_lora_note(update.path, lora_scale)]
    beside, shapes = _tokenizer(table, opened.path), {name: tensor.shape for name, tensor in tensors.items()}
    if settings is None or table.COMPONENT == "vae":  # any VAE goes with any transformer of its latents
        config = dataclasses.replace(table.describe(shapes, opened.settings), **part.fields)
        return _fit(table, config, tensors, dtype, beside, notes)
    config = dataclasses.replace(settings.model if table.COMPONENT == "dit" else settings.text, **part.fields)
    try:
        return _fit(table, config, tensors, dtype, beside, notes)
    except ConversionError as error:
        try:
            found = table.describe(shapes, opened.settings)
        except ValueError:
            raise error from None
        raise ConversionError(f"the source does not fit the preset{_difference(config, found)}:", error.faults) from None


def _difference(wanted: PartConfig, found: PartConfig) -> str:
    fields = [field.name for field in dataclasses.fields(wanted) if field.name != "dtype"]
    pairs = [(name, getattr(wanted, name), getattr(found, name)) for name in fields]
    text = ", ".join(f"{name}={ours}, not {theirs}" for name, ours, theirs in pairs if ours != theirs)
    return f" ({text})" if text else ""


def _fit(table: Any, config: PartConfig, tensors: Tensors, dtype: str | None, beside: dict, notes: dict) -> Planned:
    leaves = checkpoint.flatten(checkpoint.abstract(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    pieces = plan(table.rules(config), {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    fixed = {name: np.dtype(leaf.dtype) for name, leaf in leaves.items() if quant.is_form(name, leaves)}
    dtypes = dtypes_of(pieces, tensors, dtype, fixed)
    free = {name: kind for name, kind in dtypes.items() if name not in fixed}
    config = dataclasses.replace(config, dtype=dtype or main_dtype(free, shapes))
    return Planned(table.COMPONENT, config, pieces, tensors, dtypes, beside, notes)


def _lora_onto(target: pathlib.Path, update: Source, part: Part, dtype: str | None, scale: float) -> Planned:
    """The transformer of a converted folder with a LoRA added."""
    check(
        "dit" in checkpoint.components(target),
        f"{update.path} holds a LoRA alone, and {target} has no transformer to add it to: convert the base first, or give both",
    )
    check(checkpoint.load_part(target, "dit").linears == "full", f"{target}/dit is quantised: a LoRA needs the full weights")
    note, notes = _lora_note(update.path, scale), checkpoint.load_notes(target, "dit")
    before = notes.get("lora", [])
    check(note["sha256"] not in [old["sha256"] for old in before], f"{update.path} is merged into {target}/dit already")
    config, tensors = as_source(target, "dit", part.module)
    return _fit(part.module, config, low_rank.merge(tensors, update.tensors, scale), dtype, {}, {"lora": [*before, note]})


def _lora_note(path: pathlib.Path, scale: float) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"file": path.name, "scale": scale, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _tokenizer(table: Any, path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The text encoder's own vocabulary, where it lies beside it."""
    places = [path.parent / place for place in _TOKENIZERS] if table.COMPONENT == "text" else []
    found = next((place for place in places if place.is_file()), None)
    return {} if found is None else {TOKENIZER: found}
