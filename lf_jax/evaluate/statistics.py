"""Means over prompts with bootstrap confidence intervals, for single numbers and for whole curves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lf_jax.arrays import Array

Values = Array | np.ndarray | np.generic | Sequence | float | int  # numbers, None among them where nothing was measured
LEVEL = 0.95  # of every confidence interval
DRAWS = 2000  # resamplings of the prompts


class Interval(NamedTuple):
    """A mean over prompts and the interval that it lies in; arrays where the values are curves. NaN: nothing was measured."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray  # prompts that were measured

    def as_json(self) -> dict:
        """Plain lists and numbers, None for NaN."""
        return {name: nested(values) for name, values in self._asdict().items()}


def interval(values: Values) -> Interval:
    """The mean of `values` [prompt, ...] over prompts, with its percentile bootstrap interval (Efron, 1979).

    Whole prompts are drawn with replacement, `DRAWS` times from a fixed seed, so that the entries of a curve stay
    together. NaN or None stands for what was not measured: such entries count in no mean.

    Raises:
        ValueError: without any prompt.
    """
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"values have shape {values.shape}, expected at least one prompt: [prompt, ...]")
    known = np.isfinite(values)
    rows, weights = values.reshape(len(values), -1), known.reshape(len(values), -1).astype(np.float64)
    rows = np.where(weights > 0, rows, 0.0)
    times = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), DRAWS).astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resampling caught nothing that was measured
        means, mean = times @ rows / (times @ weights), rows.sum(0) / weights.sum(0)
    tail = (1 - LEVEL) / 2
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    some = weights.any(0)
    if some.any():
        low[some], high[some] = np.nanquantile(means[:, some], (tail, 1 - tail), axis=0)
    shape = values.shape[1:]
    return Interval(mean.reshape(shape), low.reshape(shape), high.reshape(shape), known.sum(0))


def difference(values: Values, reference: Values) -> Interval:
    """The mean of the paired differences `values - reference`, prompt by prompt, as `interval`.

    Two policies see the same prompts and noise, so the difference is known better than either mean.
    """
    return interval(np.asarray(values, np.float64) - np.asarray(reference, np.float64))


def worst(values: Values, share: float = 0.01) -> np.ndarray | np.float64:
    """The mean of the lowest `share` of `values` [..., n], of one value at least."""
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    return ordered[..., : max(1, round(share * ordered.shape[-1]))].mean(-1)


def nested(values: Values | None) -> float | int | list | None:
    """Numbers as JSON can hold them: nested lists, None for NaN, six significant digits."""
    values = np.asarray(values, np.float64 if values is None or isinstance(values, Sequence) else None)
    if values.ndim:
        return [nested(value) for value in values]
    if np.issubdtype(values.dtype, np.integer):
        return int(values)
    return float(f"{float(values):.6g}") if np.isfinite(values) else None
