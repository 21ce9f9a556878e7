"""Tests, corrections and verdicts against closed forms, enumerations and simulations."""

import itertools
import math

import numpy as np
import pytest

from tools.flow.statistics import student_t_quantile
from tools.studies.significance import (
    Contrast,
    claim_verdict,
    compare,
    holm,
    permutation_test,
    t_test,
    verdict,
)


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_p_of_the_t_test_is_that_of_the_quantile() -> None:
    """A mean that lies t(0.975, 4) standard errors above 0 has p = 0.05."""
    base = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    error = base.std(ddof=1) / math.sqrt(5)
    for probability in (0.9, 0.975, 0.995):
        shifted = base + student_t_quantile(probability, 4) * error
        assert t_test(shifted.tolist()) == pytest.approx(2 * (1 - probability), rel=1e-9)
        assert t_test((-shifted).tolist()) == pytest.approx(2 * (1 - probability), rel=1e-9)


def test_p_of_two_values_is_the_cauchy_distribution() -> None:
    mean, half = 3.0, 0.7
    expected = 1 - 2 / math.pi * math.atan(mean / half)
    assert t_test([mean - half, mean + half]) == pytest.approx(expected, rel=1e-9)


def test_permutation_test_counts_sign_changes() -> None:
    values = [0.3, -0.1, 0.8, 0.5]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = sum(x >= abs(sum(values)) - 1e-12 for x in sums) / 16
    assert permutation_test(values) == expected
    assert permutation_test([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 32


def test_many_seeds_are_sampled_and_agree_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0.35, 1.0, 40)
    z = abs(values.sum()) / math.sqrt((values**2).sum())
    expected = math.erfc(z / math.sqrt(2))
    assert permutation_test(values.tolist()) == pytest.approx(expected, abs=0.012)


def test_equal_differences_fall_back_on_the_signs() -> None:
    assert t_test([0.5] * 5) == 2 / 32
    assert t_test([0.0] * 5) == 1.0
    assert t_test([0.1 + 0.2, 0.3, 0.3]) == 2 / 8  # equal but for rounding
    assert t_test([1.0]) is None
    assert permutation_test([]) is None


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_a_difference_of_differences_is_taken_seed_by_seed() -> None:
    a, b = seeds(5.0, 7.0, 9.0), seeds(4.0, 4.0, 4.0)
    c, d = seeds(3.0, 3.0, 3.0), {0: 2.0, 1: 1.0, 5: 100.0}
    row = compare([Contrast("x", ((1, a), (-1, b), (-1, c), (1, d)))])[0]
    assert row["seeds"] == [0, 1]
    assert row["differences"] == [(5 - 4) - (3 - 2), (7 - 4) - (3 - 1)]


@pytest.mark.parametrize(
    ("shift", "higher", "expected"),
    [
        (2.0, True, "better"),
        (-2.0, True, "worse"),
        (2.0, False, "worse"),
        (0.1, True, "inconclusive"),
    ],
)
def test_verdicts(shift: float, higher: bool, expected: str) -> None:
    noise = (0.1, -0.2, 0.15, -0.1, 0.05)
    contrast = Contrast("x", ((1, seeds(*(50 + shift + e for e in noise))), (-1, seeds(*[50] * 5))))
    assert compare([contrast], higher_is_better=higher)[0]["verdict"] == expected


@pytest.mark.parametrize(
    ("bootstrap", "expected"),
    [
        ([0.1, 2.0], "better"),
        ([-0.1, 2.0], "inconclusive"),
        ([0.0, 2.0], "inconclusive"),
        (None, "inconclusive"),
    ],
)
def test_a_small_p_is_not_enough_where_the_bootstrap_interval_holds_0(
    bootstrap: list[float] | None, expected: str
) -> None:
    assert verdict({"n": 5, "mean": 1.0, "p_holm": 0.01, "bootstrap": bootstrap}) == expected


def test_two_seeds_are_never_enough() -> None:
    pair = Contrast("x", ((1, seeds(60.0, 60.0)), (-1, seeds(50.0, 50.00001))))
    row = compare([pair])[0]
    assert row["p"] < 1e-4
    assert row["verdict"] == "inconclusive"
    nothing = compare([Contrast("y", ((1, {}), (-1, {})))])[0]
    assert (nothing["n"], nothing["p_holm"], nothing["verdict"]) == (0, None, "inconclusive")


def test_the_correction_can_take_a_verdict_back() -> None:
    """p of about 0.03 convinces alone, not among ten."""
    base = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    values = base + student_t_quantile(0.985, 4) * base.std(ddof=1) / math.sqrt(5)
    contrast = Contrast("x", ((1, seeds(*values)), (-1, seeds(*[0.0] * 5))))
    assert compare([contrast])[0]["verdict"] == "better"
    assert {row["verdict"] for row in compare([contrast] * 10)} == {"inconclusive"}


def test_claims() -> None:
    def rows(*verdicts: str) -> list[dict]:
        return [{"verdict": v, "decides": True} for v in verdicts]

    assert claim_verdict(rows("better", "better")) == "shown"
    assert claim_verdict(rows("better", "inconclusive")) == "inconclusive"
    assert claim_verdict(rows("better", "worse")) == "contradicted"
    assert claim_verdict([{"verdict": "worse", "decides": False}]) == "inconclusive"
    assert claim_verdict([]) == "inconclusive"


def test_false_alarms_of_a_table_stay_below_five_percent() -> None:
    """200 tables of four comparisons with a shared control, no effect anywhere."""
    generator = np.random.default_rng(5)
    alarms = 0
    for _ in range(200):
        cells = generator.normal(50.0, 1.0, (5, 5))
        contrasts = [
            Contrast(str(i), ((1, seeds(*cells[i])), (-1, seeds(*cells[4])))) for i in range(4)
        ]
        corrected = holm([t_test(row) for row in (cells[:4] - cells[4]).tolist()])
        if min(p for p in corrected if p is not None) < 0.05:  # no verdict without: saves time
            alarms += any(row["verdict"] != "inconclusive" for row in compare(contrasts))
    assert alarms / 200 < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_coverage_of_the_intervals_at_five_seeds() -> None:
    """Student's t covers 95 % of normal samples, the percentile bootstrap less: hence RULE."""
    generator = np.random.default_rng(6)
    samples = generator.normal(1.0, 1.0, (4000, 5))
    half = student_t_quantile(0.975, 4) * samples.std(axis=1, ddof=1) / math.sqrt(5)
    student = np.mean(np.abs(samples.mean(axis=1) - 1.0) <= half)
    assert student == pytest.approx(0.95, abs=0.012)
    picks = generator.integers(0, 5, (400, 5))
    means = samples[:, picks].mean(axis=2)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    bootstrap = np.mean((low <= 1.0) & (high >= 1.0))
    assert 0.75 < bootstrap < 0.90
