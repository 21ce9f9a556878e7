"""Paired comparisons over seeds: intervals, tests, Holm's correction, verdicts by one rule."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
MIN_SEEDS = 3  # below this no verdict but 'inconclusive'
NUM_RESAMPLES = 10_000  # of the bootstrap
NUM_PERMUTATIONS = 20_000  # random sign changes where all 2^n are too many
_MAX_EXACT = 14  # seeds up to which all sign changes are tried
RULE = (
    "Differences are paired by seed. 'better' or 'worse': at least 3 seeds, the two-sided p of the "
    "paired t test below 0.05 after Holm's correction over the comparisons of the table, and the "
    "95 % bootstrap interval of the mean difference without 0. All else is 'inconclusive'."
)

SeedValues = Mapping[int, float]


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Return n, mean and sample standard deviation (None below two values)."""
    n, std = len(values), None
    mean = math.fsum(values) / n if n else None
    if mean is not None and n > 1:
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return {"n": n, "mean": mean, "std": std}


def paired_difference(treated: SeedValues, control: SeedValues) -> dict[str, Any]:
    """Compare two arms seed by seed.

    Args:
        treated: Value by seed.
        control: Value by seed; only seeds in both count.
    Returns:
        `seeds`, `differences`, `n`, `mean`, `std`, `level`, `student_t` and `bootstrap` (of the
        percentiles, too narrow for a handful of values) as [low, high] or None below two seeds
        (then `note` says so).
    """
    seeds = sorted(treated.keys() & control.keys())
    differences = [treated[seed] - control[seed] for seed in seeds]
    summary = {"seeds": seeds, "differences": differences, **mean_std(differences), "level": LEVEL}
    if len(seeds) < 2:
        counted = "no seed" if not seeds else "one seed"
        return summary | {"student_t": None, "bootstrap": None, "note": f"{counted}: no interval"}
    from scipy import stats  # takes half a second, which --help should not wait for

    half = float(stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1))
    half *= summary["std"] / math.sqrt(len(seeds))
    resampled = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return summary | {
        "student_t": [summary["mean"] - half, summary["mean"] + half],
        "bootstrap": [float(bound) for bound in resampled.confidence_interval],
    }


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; None below two values.

    Where all differences are equal there is no spread to compare with: then the p of the sign
    changes, which needs none.
    """
    if len(differences) < 2:
        return None
    summary = mean_std(differences)
    if summary["std"] <= 1e-12 * abs(summary["mean"]):
        return permutation_test(differences)
    from scipy import stats

    error = summary["std"] / math.sqrt(summary["n"])
    return 2 * float(stats.t.sf(abs(summary["mean"]) / error, summary["n"] - 1))


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
    # Not scipy's permutation_test: it compares with a tolerance relative to the observed mean, and
    # differences of percentages are rounded by more than that, so that it misses ties.
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


def compare(contrasts: Sequence[Contrast]) -> list[dict[str, Any]]:
    """Compare, correct for the number of comparisons, and judge.

    Args:
        contrasts: The comparisons of one table: the family of Holm's correction.
    Returns:
        For each contrast what `paired_difference` gives, and `name`, `decides`, `p` (paired t),
        `p_permutation` (sign changes), `p_holm`, `verdict`; p are None below two seeds.
    """
    rows = []
    for contrast in contrasts:
        row = paired_difference(*contrast.sides())
        differences = row["differences"]
        rows.append(
            {"name": contrast.name, "decides": contrast.decides}
            | row
            | {"p": t_test(differences), "p_permutation": permutation_test(differences)}
        )
    for row, p_holm in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p_holm
        row["verdict"] = verdict(row)
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """'better', 'worse' or 'inconclusive', by RULE; higher is better."""
    interval, p_holm = row["bootstrap"], row["p_holm"]
    if row["n"] < MIN_SEEDS or interval is None or p_holm is None or not p_holm < 1 - LEVEL:
        return "inconclusive"
    if interval[0] <= 0 <= interval[1]:
        return "inconclusive"
    return "better" if row["mean"] > 0 else "worse"


def claim_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """'shown' if all deciding comparisons are better, 'contradicted' if one is worse."""
    verdicts = [row["verdict"] for row in rows if row["decides"]]
    if "worse" in verdicts:
        return "contradicted"
    return "shown" if verdicts and set(verdicts) == {"better"} else "inconclusive"
