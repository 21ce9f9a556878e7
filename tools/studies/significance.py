"""Paired comparisons over seeds: intervals, tests, Holm's correction, verdicts by one rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.flow.statistics import paired_difference, student_t_cdf

LEVEL = 0.95
MIN_SEEDS = 3  # below this no verdict but 'inconclusive'
NUM_PERMUTATIONS = 20_000  # random sign changes where all 2^n are too many
_MAX_EXACT = 14  # seeds up to which all sign changes are tried
RULE = (
    "Differences are paired by seed. 'better' or 'worse': at least 3 seeds, the two-sided p of the "
    "paired t test below 0.05 after Holm's correction over the comparisons of the table, and the "
    "95 % bootstrap interval of the mean difference without 0. All else is 'inconclusive'."
)

SeedValues = Mapping[int, float]


@dataclass(frozen=True)
class Contrast:
    """A difference of cells, or a difference of two differences.

    Attributes:
        name: How tables call it.
        terms: (weight, value by seed); a plain comparison is (1, treated), (-1, control).
        decides: Whether the verdict on the table's claim rests on it.
    """

    name: str
    terms: tuple[tuple[float, SeedValues], ...]
    decides: bool = True

    def sides(self) -> tuple[dict[int, float], dict[int, float]]:
        """The positive and the negative terms, each summed by seed, over the seeds of all terms."""
        seeds = set.intersection(*(set(values) for _, values in self.terms))
        treated, control = dict.fromkeys(seeds, 0.0), dict.fromkeys(seeds, 0.0)
        for weight, values in self.terms:
            side = treated if weight > 0 else control
            for seed in seeds:
                side[seed] += abs(weight) * values[seed]
        return treated, control


def compare(
    contrasts: Sequence[Contrast], *, higher_is_better: bool = True
) -> list[dict[str, Any]]:
    """Compare, correct for the number of comparisons, and judge.

    Args:
        contrasts: The comparisons of one table: the family of Holm's correction.
        higher_is_better: Sense of the metric.
    Returns:
        For each contrast what `paired_difference` gives, and `name`, `decides`, `p` (paired t),
        `p_permutation` (sign changes), `p_holm`, `verdict`; p are None below two seeds.
    """
    rows = []
    for contrast in contrasts:
        row = paired_difference(*contrast.sides(), LEVEL)
        differences = row["differences"]
        rows.append(
            {"name": contrast.name, "decides": contrast.decides}
            | row
            | {"p": t_test(differences), "p_permutation": permutation_test(differences)}
        )
    for row, p_holm in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p_holm
        row["verdict"] = verdict(row, higher_is_better=higher_is_better)
    return rows


def verdict(row: Mapping[str, Any], *, higher_is_better: bool = True) -> str:
    """'better', 'worse' or 'inconclusive', by RULE."""
    interval, p_holm = row["bootstrap"], row["p_holm"]
    if row["n"] < MIN_SEEDS or interval is None or p_holm is None or not p_holm < 1 - LEVEL:
        return "inconclusive"
    if interval[0] <= 0 <= interval[1]:
        return "inconclusive"
    return "better" if (row["mean"] > 0) == higher_is_better else "worse"


def claim_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """'shown' if all deciding comparisons are better, 'contradicted' if one is worse."""
    verdicts = [row["verdict"] for row in rows if row["decides"]]
    if "worse" in verdicts:
        return "contradicted"
    return "shown" if verdicts and set(verdicts) == {"better"} else "inconclusive"


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; None below two values.

    Where all differences are equal there is no spread to compare with: then the p of the sign
    changes, which needs none.
    """
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    variance = math.fsum((value - mean) ** 2 for value in differences) / (n - 1)
    if math.sqrt(variance) <= 1e-12 * abs(mean) or variance == 0:
        return permutation_test(differences)
    return 2 * student_t_cdf(-abs(mean) / math.sqrt(variance / n), n - 1)


def permutation_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of the mean under changes of sign; None below two values.

    Exact up to 14 seeds: with n seeds it cannot fall below 2 / 2^n (5 seeds: 0.0625). Beyond that
    a random sample of sign changes, the observed one counted among them.
    """
    n = len(differences)
    if n < 2:
        return None
    values = np.asarray(differences, dtype=np.float64)
    if n <= _MAX_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        generator = np.random.default_rng(0)
        signs = generator.choice((1.0, -1.0), size=(NUM_PERMUTATIONS, n))
        signs[0] = 1.0
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12 * np.abs(values).sum()))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None stays None and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[index] = highest
    return corrected
