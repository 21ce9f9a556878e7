"""Made-up results of a study and of trials, in the formats of tools/studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.stats import RULE, Contrast, claim_verdict, compare, mean_std
from tests.tools.run_fixture import dump
from tools.studies import results, trials

NONE = {0: 50.0, 1: 51.0, 2: 49.5, 3: 50.5, 4: 50.2}
MASK = {0: 53.1, 1: 53.9, 2: 52.6, 3: 53.4, 4: 53.3}
WORSE = {0: 46.2, 1: 46.9, 2: 45.6, 3: 46.4, 4: 46.3}


def make_study(folder: Path, *, is_complete: bool = True) -> Path:
    """A study of two cells and five seeds, in which the second is better."""
    compared = compare([Contrast("mask - none", ((1, MASK), (-1, NONE)))])
    table = {
        "name": "methods",
        "title": "FA <methods>",
        "claim": "FA & a mask help",
        "metric": "knn",
        "rows": [
            {"axes": {"FA": name}, "fingerprint": name, **mean_std(list(v.values())), "values": v}
            for name, v in (("none", NONE), ("mask", MASK))
        ],
        "comparisons": compared,
        "verdict": claim_verdict(compared),
        "left_out": [{"cells": {"FA": "noise"}, "reason": "two cells at most"}],
    }
    study: dict[str, Any] = {
        "format": results.FORMAT, "preset": "tiny", "data": "squares", "rule": RULE,
        "metrics": {"knn": "kNN top-1"}, "seeds": 5, "is_complete": is_complete,
        "counts": {"cells": 10, "finished": 10} if is_complete
        else {"cells": 12, "finished": 10, "planned": 1, "failed": 1},
        "seconds": 3600.0, "tables": [table], "cells": [],
        "failures": [] if is_complete
        else [{"cell": "FA: nn", "seed": 3, "attempts": 2, "reason": "exit status 1: <no memory>"}],
    }  # fmt: skip
    dump(folder / "results.json", study)
    return folder


def make_trials(folder: Path) -> Path:
    """Trials of two arms and five seeds, in which the second is worse; a published row."""

    def summary(values: dict[int, float]) -> dict[str, Any]:
        return {**mean_std(list(values.values())), "values": values}

    compared = compare([Contrast("ours - random", ((1, WORSE), (-1, NONE)))])
    arms = {"random": NONE, "ours": WORSE}
    found: dict[str, Any] = {
        "format": trials.FORMAT, "rule": RULE, "seeds": [0, 1, 2, 3, 4], "is_complete": True,
        "counts": {"cells": 10, "finished": 10},
        "arms": {name: {m: summary(v) for m in trials.METRICS} for name, v in arms.items()},
        "comparisons": dict.fromkeys(trials.METRICS, compared),
        "per_class": {
            "AP": {"arms": {"cup": {n: summary(v) for n, v in arms.items()}}, "comparisons": []}
        },
        "failures": [], "config": "thin.yaml", "data": "scenes", "words": [],
        "published": {
            "protocol": "24k",
            "rows": [{"init": "MoCo", "source": "a paper", "AP50": 81.5, "recalled": True}],
        },
    }  # fmt: skip
    dump(folder / "results.json", found)
    return folder
