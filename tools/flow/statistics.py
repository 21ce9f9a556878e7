"""Means, deviations and intervals of a few paired seeds, without further libraries than numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Return n, mean and sample standard deviation (None below two values)."""
    n = len(values)
    if n == 0:
        return {"n": 0, "mean": None, "std": None}
    mean = math.fsum(values) / n
    if n == 1:
        return {"n": 1, "mean": mean, "std": None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return {"n": n, "mean": mean, "std": math.sqrt(variance)}


def paired_difference(
    treated: Mapping[int, float], control: Mapping[int, float], level: float = 0.95
) -> dict[str, Any]:
    """Compare two arms seed by seed.

    Args:
        treated: Value by seed.
        control: Value by seed; only seeds in both count.
        level: Coverage of the intervals.
    Returns:
        `seeds`, `differences`, `n`, `mean`, `std`, `level`, `student_t` and `bootstrap` as
        [low, high] or None below two seeds (then `note` says so).
    """
    seeds = sorted(treated.keys() & control.keys())
    differences = [treated[seed] - control[seed] for seed in seeds]
    summary = {"seeds": seeds, "differences": differences, **mean_std(differences), "level": level}
    if len(seeds) < 2:
        counted = "no seed" if not seeds else "one seed"
        return summary | {"student_t": None, "bootstrap": None, "note": f"{counted}: no interval"}
    half = student_t_quantile((1 + level) / 2, len(seeds) - 1)
    half *= summary["std"] / math.sqrt(len(seeds))
    interval = [summary["mean"] - half, summary["mean"] + half]
    return summary | {"student_t": interval, "bootstrap": bootstrap_interval(differences, level)}


def bootstrap_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> list[float]:
    """Return the percentile bootstrap interval of the mean (too narrow for a handful of values)."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
    means = np.asarray(values, dtype=np.float64)[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def student_t_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t distribution, by bisection of its distribution function.

    Raises:
        ValueError: If the probability is not inside (0, 1) or there are no degrees of freedom.
    """
    if not 0 < probability < 1 or degrees <= 0:
        raise ValueError(f"no t quantile for probability {probability}, {degrees} degrees")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if student_t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def student_t_cdf(t: float, degrees: float) -> float:
    """Return the distribution function of Student's t, through the incomplete beta function."""
    tail = 0.5 * incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return 1 - tail if t >= 0 else tail


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b) by its continued fraction."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _beta_fraction(a, b, x))


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Evaluate 1 + d1/(1 + d2/(1 + ...)) (Abramowitz and Stegun, 26.5.8) from the far end."""
    value = 1.0
    for k in range(400, 0, -1):
        m = k // 2
        if k % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + term / value
    return value
