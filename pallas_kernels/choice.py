"""What the public calls share: checks of arguments, and which implementation runs. A named one runs or raises."""

from collections.abc import Mapping

Reasons = Mapping[str, str | None]  # of every implementation, in the order of choice: why it cannot run a call, or None


def require(holds: bool, rule: str) -> None:
    """Raises ValueError with `rule` unless it holds."""
    if not holds:
        raise ValueError(rule)


def unmet(rules: Mapping[str, bool]) -> str | None:
    """The first of the rules that does not hold; None if all do."""
    return next((rule for rule, holds in rules.items() if not holds), None)


def choose(operation: str, name: str | None, can: Reasons, automatic: Reasons | None = None) -> str:
    """The implementation of `operation` that runs a call: the one that is named, or the first that can.

    Args:
        automatic: where it is not named, from among these, for these reasons; None: from among all of `can`.

    Raises:
        ValueError: for a name that is not in `can`.
        NotImplementedError: if the named implementation cannot run the call, with the reason.
    """
    if name is None:
        return next(other for other, reason in (automatic or can).items() if reason is None)
    require(name in can, f"implementation={name!r} must be one of {', '.join(can)}, or None")
    if can[name] is not None:
        raise NotImplementedError(f"{operation} with implementation={name!r}: {can[name]}")
    return name
