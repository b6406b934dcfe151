"""Conversion as a table that is complete both ways: source names, our names, and what happens to the tensor between.

A rule is a pair of templates:

    Rule("blocks.{layer}.self_attn.{p:q|k|v|o}.weight", "blocks.self_attention.{p}.kernel", LINEAR)

`{layer}`            an integer in the source; the leading, stacking axis of the target
`{part:a=0|b=1}`     one of the alternatives in the source; its place on the next axis of the target
`{name}`             any other integer, the same in source and target
`{name:a|b}`         one of the alternatives, the same in source and target (where `{name}` is enough)
`{name:a=x|b=y}`     `a` in the source is `x` in the target

Several rules may lead to one target: other spellings of the same tensor. A source may hold one of them; the first rule
is the one that export writes. A rule without a target names what a source may hold and the model does not need; together
with a rule that has a target, it allows a copy: the name counts where it is the only one, and is passed over elsewhere.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from convert.transforms import SAME, Transform

Shape = tuple[int, ...]

AXES = ("layer", "part")
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
    def axes(self) -> tuple[str, ...]:
        """The placeholders that stand for the leading axes of the target, which hold one source tensor at each place."""
        return tuple(name for name in AXES if name in _compile(self).names)

    def spelled(self, name: str, at: int) -> str:
        """A place on such an axis as the source spells it."""
        choices = _compile(self).names[name] or {str(at): str(at)}
        return next(theirs for theirs, place in choices.items() if place == str(at))

    def source_match(self, key: str) -> dict[str, str] | None:
        """The placeholder values of `key`, as spelled in the source; None if the rule is not about it."""
        found = _compile(self).source.fullmatch(key)
        return found.groupdict() if found else None

    def target_match(self, path: str) -> dict[str, str] | None:
        """The placeholder values of our `path`, as spelled in the source, `AXES` left out."""
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
    if sorted(used) != sorted(set(names) - set(AXES)):
        without = " and ".join(f"{{{name}}}" for name in AXES)
        raise ValueError(f"{rule.target!r} must use the placeholders of {rule.source!r}, once each, without {without}")
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
    """One source tensor and its place: a whole target, or one layer, or one part of a layer, of a stacked one."""

    source: str
    target: str
    index: tuple[int, ...]  # on the leading axes of the target; () is all of it
    transform: Transform
    shape: Shape  # in the source

    @property
    def place(self) -> str:
        return ", ".join([self.target, *(f"{name} {at}" for name, at in zip(AXES, self.index, strict=False))])


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
            place = slot[0].place
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
    """For a parameter, or each place on its leading axes, the source tensors that can fill it, by preference."""
    matches = [(rule, values) for rule in rules if (values := rule.target_match(target)) is not None]
    if len({rule.axes for rule, _ in matches}) > 1:
        raise ValueError(f"rules disagree how {target} is stacked: {[rule.source for rule, _ in matches]}")
    stacked = len(matches[0][0].axes) if matches else 0
    places = itertools.product(*map(range, shape[:stacked])) if matches else ()
    return [[_piece(rule, values, target, index, shape) for rule, values in matches] for index in places]


def _piece(rule: Rule, values: dict[str, str], target: str, index: tuple[int, ...], shape: Shape) -> Piece:
    weightless = np.broadcast_to(np.zeros((), np.bool_), shape[len(index) :])  # strides of zero: any size for one byte
    expected = tuple(int(n) for n in rule.transform.inverse(weightless).shape)
    where = {name: rule.spelled(name, at) for name, at in zip(rule.axes, index, strict=True)}
    return Piece(rule.source_key(values | where), target, index, rule.transform, expected)
