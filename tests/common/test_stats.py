"""Intervals, tests, corrections and verdicts against closed forms, tables, enumerations."""

import itertools
import math

import numpy as np
import pytest

from common import stats


# Two-sided 95 % quantiles as printed in tables of Student's t distribution.
def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_paired_difference_of_a_worked_example():
    treated = {0: 31.0, 1: 29.0, 2: 35.0, 3: 33.0, 4: 30.0, 9: 99.0}
    control = {0: 28.0, 1: 28.0, 2: 30.0, 3: 31.0, 4: 26.0, 8: 0.0}
    found = stats.paired_difference(treated, control)
    assert found["seeds"] == [0, 1, 2, 3, 4]
    assert found["differences"] == [3.0, 1.0, 5.0, 2.0, 4.0]
    assert (found["n"], found["mean"]) == (5, 3.0)
    assert found["std"] == pytest.approx(math.sqrt(2.5))
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found["student_t"] == pytest.approx([3 - half, 3 + half], abs=1e-5)
    low, high = found["bootstrap"]
    assert 1.0 < low < 3.0 < high < 5.0
    assert high - low < 2 * half


def test_one_seed_has_no_interval_and_says_so():
    found = stats.paired_difference({0: 3.0}, {0: 1.0})
    assert found["mean"] == 2.0
    assert all(found[key] is None for key in ("std", "student_t", "bootstrap"))
    assert found["note"] == "one seed: no interval"
    assert stats.paired_difference({}, {0: 1.0})["note"] == "no seed: no interval"


def test_the_bootstrap_takes_the_percentiles_of_seeded_means():
    """The same draws by numpy alone."""
    values = [0.3, -0.1, 0.8, 0.5, 1.1]
    picks = np.random.default_rng(0).integers(0, 5, size=(stats.NUM_RESAMPLES, 5))
    means = np.sort(np.array(values)[picks].mean(axis=1))
    position = 0.025 * (stats.NUM_RESAMPLES - 1)
    low = np.interp(position, np.arange(stats.NUM_RESAMPLES), means)
    high = np.interp(stats.NUM_RESAMPLES - 1 - position, np.arange(stats.NUM_RESAMPLES), means)
    found = stats.paired_difference(seeds(*values), seeds(*[0.0] * 5))["bootstrap"]
    assert found == pytest.approx([low, high], abs=1e-12)


def test_p_of_the_t_test_is_that_of_the_closed_forms():
    """Student's distribution with 1 (Cauchy) and 4 degrees of freedom."""
    for values in ([2.3, 3.7], [-0.2, 0.1]):
        t = statistic_of(values)
        expected = 1 - 2 / math.pi * math.atan(t)
        assert stats.t_test(values) == pytest.approx(expected, rel=1e-9)
        assert stats.t_test([-value for value in values]) == pytest.approx(expected, rel=1e-9)
    for values in ([0.3, -0.1, 0.8, 0.5, 1.1], [-2.0, 1.0, 0.5, 0.2, 0.1]):
        s = statistic_of(values) ** 2 / 4
        inside = 0.75 * math.sqrt(4 * s) / math.sqrt(1 + s) * (1 - s / (3 * (1 + s)))
        assert stats.t_test(values) == pytest.approx(1 - inside, rel=1e-9)


def statistic_of(values: list[float]) -> float:
    """|t| of a sample against 0."""
    return float(abs(np.mean(values)) / (np.std(values, ddof=1) / math.sqrt(len(values))))


def test_permutation_test_counts_sign_changes() -> None:
    values = [0.3, -0.1, 0.8, 0.5]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = sum(x >= abs(sum(values)) - 1e-12 for x in sums) / 16
    assert stats.permutation_test(values) == expected
    assert stats.permutation_test([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 32
    # Differences of percentages are rounded: 0.1 - 0.2 + 0.3 and its like still tie with 0.2.
    rounded = [50.1 - 50.0, 50.2 - 50.0, 49.7 - 50.0]
    assert stats.permutation_test(rounded) == 1.0
    assert stats.permutation_test([*rounded[:2], -rounded[2]]) == 2 / 8
    assert stats.permutation_test([50.1 - 50.0, 49.8 - 50.0, 50.3 - 50.0]) == 6 / 8


def test_equal_differences_fall_back_on_the_signs() -> None:
    assert stats.t_test([0.5] * 5) == 2 / 32
    assert stats.t_test([0.0] * 5) == 1.0
    assert stats.t_test([0.1 + 0.2, 0.3, 0.3]) == 2 / 8  # equal but for rounding
    assert stats.t_test([1.0, 1.0 + 1e-11]) == pytest.approx(3.18e-12, rel=0.01)  # hardly unequal
    assert stats.t_test([1.0]) is None
    assert stats.permutation_test([]) is None


def test_holm_of_a_worked_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert stats.holm([]) == []


def test_a_difference_of_differences_is_taken_seed_by_seed() -> None:
    a, b = seeds(5.0, 7.0, 9.0), seeds(4.0, 4.0, 4.0)
    c, d = seeds(3.0, 3.0, 3.0), {0: 2.0, 1: 1.0, 5: 100.0}
    row = stats.compare([stats.Contrast("x", ((1, a), (-1, b), (-1, c), (1, d)))])[0]
    assert row["seeds"] == [0, 1]
    assert row["differences"] == [(5 - 4) - (3 - 2), (7 - 4) - (3 - 1)]


@pytest.mark.parametrize(
    ("shift", "expected"), [(2.0, "better"), (-2.0, "worse"), (0.1, "inconclusive")]
)
def test_verdicts(shift: float, expected: str) -> None:
    noise = (0.1, -0.2, 0.15, -0.1, 0.05)
    contrast = stats.Contrast(
        "x", ((1, seeds(*(50 + shift + e for e in noise))), (-1, seeds(*[50] * 5)))
    )
    assert stats.compare([contrast])[0]["verdict"] == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "better"),
        ({"bootstrap": [-0.1, 2.0]}, "inconclusive"),
        ({"bootstrap": [0.0, 2.0]}, "inconclusive"),
        ({"bootstrap": None}, "inconclusive"),
        ({"p_holm": 0.06}, "inconclusive"),
        ({"p_holm": None}, "inconclusive"),
        ({"n": 2}, "inconclusive"),
        ({"mean": -1.0, "bootstrap": [-2.0, -0.5]}, "worse"),
        ({"mean": -1.0, "bootstrap": [-2.0, 0.5]}, "inconclusive"),
    ],
)
def test_each_condition_of_the_rule_decides(change: dict, expected: str) -> None:
    row = {"n": 5, "mean": 1.0, "bootstrap": [0.5, 2.0], "p_holm": 0.01}
    assert stats.verdict(row | change) == expected


def test_claims() -> None:
    def rows(*verdicts: str) -> list[dict]:
        return [{"verdict": v, "decides": True} for v in verdicts]

    assert stats.claim_verdict(rows("better", "better")) == "shown"
    assert stats.claim_verdict(rows("better", "inconclusive")) == "inconclusive"
    assert stats.claim_verdict(rows("better", "worse")) == "contradicted"
    assert stats.claim_verdict([{"verdict": "worse", "decides": False}]) == "inconclusive"
    assert stats.claim_verdict([]) == "inconclusive"
