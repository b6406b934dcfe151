"""Intervals on data whose answer is known."""

import numpy as np
import pytest

from lf_jax.evaluate.statistics import difference, interval, nested, worst


def test_the_interval_of_a_large_normal_sample_is_the_textbook_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = interval(values)
    error = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert found.count == 400


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draws = np.random.default_rng(2).exponential(1.0, (200, 60))  # 200 samples of 60, true mean 1
    found = [interval(sample) for sample in draws]
    assert 0.88 <= np.mean([one.low <= 1 <= one.high for one in found]) <= 0.98


def test_proportions_stay_within_zero_and_one():
    found = interval([1.0] * 19 + [0.0])
    assert 0.8 < found.low < found.mean == 0.95 < found.high == 1.0


def test_what_was_not_measured_counts_in_no_mean():
    found = interval([1.0, None, 3.0, float("nan")])
    assert (found.mean, found.count) == (2.0, 2) and 1 <= found.low <= found.high <= 3
    nothing = interval([None, None])
    assert np.isnan([nothing.mean, nothing.low, nothing.high]).all() and nothing.count == 0


def test_a_curve_is_its_points():
    values = np.random.default_rng(3).random((7, 4))
    values[2, 1] = np.nan
    curve = interval(values)
    for column in range(4):
        alone = interval(values[:, column])
        np.testing.assert_allclose([part[column] for part in curve], list(alone), rtol=1e-12)


def test_one_prompt_has_an_interval_without_width():
    assert interval([0.25])[:3] == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="at least one prompt"):
        interval([])


def test_paired_differences_are_known_better_than_the_means():
    random = np.random.default_rng(4)
    dense = random.normal(0, 1, 50)
    sparse = dense - 0.1 + random.normal(0, 0.01, 50)
    apart, paired = interval(sparse), difference(sparse, dense)
    assert paired.mean == pytest.approx(-0.1, abs=0.01) and paired.high < -0.09
    assert paired.high - paired.low < 0.05 * (apart.high - apart.low)
    assert difference([1.0, None, 2.0], [0.0, 1.0, None])[0::3] == (1.0, 1)


def test_the_worst_are_the_lowest():
    values = np.arange(300.0)[::-1]
    assert worst(values) == 1.0  # of 0, 1, 2
    assert worst(values.reshape(3, 100)).tolist() == [200.0, 100.0, 0.0]
    assert worst([3.0, 2.0]) == 2.0  # at least one


def test_json_has_no_nan():
    assert nested(np.array([[1.0, np.nan], [1 / 3, 2e-9]])) == [[1.0, None], [0.333333, 2e-9]]
    assert nested([None, 1]) == [None, 1.0] and nested(np.int32(3)) == 3 and nested(None) is None
