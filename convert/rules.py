"""Conversion as a table that is complete both ways: source names, our names, and what happens to the tensor between.

A rule is a pair of templates:

    Rule("blocks.{layer}.self_attn.{p:q|k|v|o}.weight", "blocks.self_attention.{p}.kernel", LINEAR)

`{layer}`            an integer in the source; the leading, stacking axis of the target
`{name}`             any other integer, the same in source and target
`{name:a|b}`         one of the alternatives, the same in source and target (where `{name}` is enough)
`{name:a=x|b=y}`     `a` in the source is `x` in the target

Several rules may lead to one target: other spellings of the same tensor. A source may hold one of them; the first rule
is the one that export writes. A rule without a target names what a source may hold and the model does not need; together
with a rule that has a target, it allows a copy: the name counts where it is the only one, and is passed over elsewhere.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from convert.transforms import SAME, Transform

Shape = tuple[int, ...]

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]*))?\}")
_SHOWN = 12  # faults of one kind in a message


class ConversionError(ValueError):
    """A source that does not fit the model.

    Attributes:
        faults: kind of fault -> every single one; the message shows the first few of each kind.
    """

    def __init__(self, title: str, faults: Mapping[str, list[str]]):
        self.faults = {kind: list(found) for kind, found in faults.items() if found}
        lines = [title]
        for kind, found in self.faults.items():
            lines.append(f"  {kind} ({len(found)}):")
            lines += [f"    {fault}" for fault in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"    ... and {len(found) - _SHOWN} more")
        super().__init__("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        source: template of a name in the PyTorch checkpoint.
        target: template of our dotted parameter path; None for a tensor that the model does not need.
        transform: of one source tensor, that is of one layer.
    """

    source: str
    target: str | None
    transform: Transform = SAME

    def __post_init__(self):
        _compile(self)  # a wrong template fails where it is written

    @property
    def stacked(self) -> bool:
        return "layer" in _compile(self).names

    def source_match(self, key: str) -> dict[str, str] | None:
        """The placeholder values of `key`, as spelled in the source; None if the rule is not about it."""
        found = _compile(self).source.fullmatch(key)
        return found.groupdict() if found else None

    def target_match(self, path: str) -> dict[str, str] | None:
        """The placeholder values of our `path`, as spelled in the source, `layer` left out."""
        compiled = _compile(self)
        found = compiled.target.fullmatch(path) if compiled.target else None
        if not found:
            return None
        values = found.groupdict()
        for name, choices in compiled.names.items():
            if choices and name in values:
                values[name] = next(ours for ours, theirs in choices.items() if theirs == values[name])
        return values

    def source_key(self, values: Mapping[str, str | int | None]) -> str:
        return _PLACEHOLDER.sub(lambda found: str(values[found[1]]), self.source)


@dataclasses.dataclass(frozen=True)
class _Compiled:
    source: re.Pattern
    target: re.Pattern | None
    names: dict[str, dict[str, str] | None]  # placeholder -> source spelling -> target spelling; None for integers


@functools.cache
def _compile(rule: Rule) -> _Compiled:
    names: dict[str, dict[str, str] | None] = {}
    for name, choices in _PLACEHOLDER.findall(rule.source):
        if name in names:
            raise ValueError(f"{rule.source!r} names {{{name}}} twice")
        pairs = [choice.partition("=") for choice in choices.split("|")] if choices else []
        names[name] = {ours: theirs if equals else ours for ours, equals, theirs in pairs} or None
    source = _regex(rule.source, names, side=0)
    if rule.target is None:
        return _Compiled(source, None, names)
    used = [name for name, _ in _PLACEHOLDER.findall(rule.target)]
    if sorted(used) != sorted(set(names) - {"layer"}):
        raise ValueError(f"{rule.target!r} must use the placeholders of {rule.source!r}, once each, without {{layer}}")
    return _Compiled(source, _regex(rule.target, names, side=1), names)


def _regex(template: str, names: Mapping[str, dict[str, str] | None], side: int) -> re.Pattern:
    parts, at = [], 0
    for found in _PLACEHOLDER.finditer(template):
        choices = names.get(found[1])
        options = "|".join(re.escape(pair[side]) for pair in choices.items()) if choices else "0|[1-9][0-9]*"
        parts += [re.escape(template[at : found.start()]), f"(?P<{found[1]}>{options})"]
        at = found.end()
    return re.compile("".join([*parts, re.escape(template[at:])]))


@dataclasses.dataclass(frozen=True)
class Piece:
    """One source tensor and its place: a whole target, or one layer of a stacked one."""

    source: str
    target: str
    layer: int | None
    transform: Transform
    shape: Shape  # in the source


def plan(rules: Iterable[Rule], source_shapes: Mapping[str, Shape], target_shapes: Mapping[str, Shape]) -> list[Piece]:
    """Which source tensor fills which place, in the order of the targets, layer by layer.

    Args:
        source_shapes: of every tensor of the source.
        target_shapes: of every parameter of the model, stacked ones with their leading layer axis.

    Raises:
        ConversionError: with every fault at once: unknown and missing source names, targets filled twice or never,
            wrong shapes (expected and received, as the source lays them out).
    """
    rules = tuple(rules)
    faults: dict[str, list[str]] = {
        "unknown names in the source": [],
        "missing from the source": [],
        "doubled: several source tensors for one parameter": [],
        "doubled: several parameters from one source tensor": [],
        "wrong shape": [],
        "parameters of the model that no rule fills": [],
    }
    unknown, missing, doubled, shared, misshaped, unruled = faults.values()
    pieces, taken = [], {}
    for target, shape in target_shapes.items():
        if not (slots := _slots(rules, target, shape)):
            unruled.append(f"{target} {list(shape)}")
        for slot in slots:
            place = target if slot[0].layer is None else f"{target}, layer {slot[0].layer}"
            present = [piece for piece in slot if piece.source in source_shapes]
            if not present:
                missing.append(f"{' or '.join(piece.source for piece in slot)} {list(slot[0].shape)} (for {place})")
                continue
            if len(present) > 1:
                present = [piece for piece in present if not _unneeded(rules, piece.source)] or present
            if len(present) > 1:
                doubled.append(f"{place}: {', '.join(piece.source for piece in present)}")
            for piece in present:
                if piece.source in taken:
                    shared.append(f"{piece.source}: {taken[piece.source]}; {place}")
                taken[piece.source] = place
                if (received := tuple(source_shapes[piece.source])) != piece.shape:
                    misshaped.append(f"{piece.source}: expected {list(piece.shape)}, received {list(received)} (for {place})")
            pieces.append(present[0])
    for key in source_shapes:
        if key not in taken and not _unneeded(rules, key):
            unknown.append(f"{key} {list(source_shapes[key])}")
    if any(faults.values()):
        raise ConversionError("the source does not fit the model:", faults)
    return pieces


def _unneeded(rules: tuple[Rule, ...], key: str) -> bool:
    return any(rule.target is None and rule.source_match(key) is not None for rule in rules)


def pieces_of(rules: Iterable[Rule], target_shapes: Mapping[str, Shape]) -> list[Piece]:
    """The inverse plan: which source tensors a model is written back as, each by the first rule that knows its place.

    Raises:
        ConversionError: if a parameter has no rule, or two would be written under one name.
    """
    rules = tuple(rules)
    unruled, doubled, pieces = [], [], {}
    for target, shape in target_shapes.items():
        if not (slots := _slots(rules, target, shape)):
            unruled.append(f"{target} {list(shape)}")
        for piece in (slot[0] for slot in slots):
            if piece.source in pieces:
                doubled.append(f"{piece.source}: {pieces[piece.source].target}, {target}")
            pieces[piece.source] = piece
    if unruled or doubled:
        faults = {"parameters of the model that no rule fills": unruled, "doubled names": doubled}
        raise ConversionError("the table does not cover the model:", faults)
    return list(pieces.values())


def _slots(rules: tuple[Rule, ...], target: str, shape: Shape) -> list[list[Piece]]:
    """For a parameter, or each layer of it, the source tensors that can fill it, by preference."""
    matches = [(rule, values) for rule in rules if (values := rule.target_match(target)) is not None]
    stacked = {rule.stacked for rule, _ in matches}
    if len(stacked) > 1:
        raise ValueError(f"rules disagree whether {target} is stacked: {[rule.source for rule, _ in matches]}")
    layers = range(shape[0]) if True in stacked else [None] * len(stacked)
    return [[_piece(rule, values, target, layer, shape) for rule, values in matches] for layer in layers]


def _piece(rule: Rule, values: dict[str, str], target: str, layer: int | None, shape: Shape) -> Piece:
    one = shape if layer is None else shape[1:]
    weightless = np.broadcast_to(np.zeros((), np.bool_), one)  # strides of zero: any size for one byte
    expected = tuple(int(n) for n in rule.transform.inverse(weightless).shape)
    return Piece(rule.source_key({**values, "layer": layer}), target, layer, rule.transform, expected)
