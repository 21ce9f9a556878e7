"""The report's figures, before they are drawn: which arm is which, and means over the seeds."""

import pytest

from tests.tools.run_fixture import dump_lines
from tools.flow.report_data import Run, ap_curves_of_pair, per_class_rows, seed_rows


@pytest.mark.parametrize(
    ("pair", "random", "pretrained"),
    [
        ("fine_tuned", "random", "pretrained"),
        ("frozen", "random_frozen", "pretrained_frozen"),
    ],
)
def test_curves_of_a_pair_are_those_of_its_arms_and_their_means(tmp_path, pair, random, pretrained):
    levels = {random: (10.0, 20.0), pretrained: (40.0, 60.0)}
    for arm, values in levels.items():
        for seed, ap in enumerate(values):
            rows = [{"iteration": i, "AP50": ap * i / 100, "AP": 1.0} for i in (100, 200)]
            dump_lines(tmp_path / f"detection/{arm}/seed-{seed}/curve.jsonl", rows)
    detection = {arm: [{"seed": 0}, {"seed": 1}] for arm in levels}
    curves = ap_curves_of_pair(Run(tmp_path, {}, {"detection": detection}), pair, "AP50")
    assert curves == {
        "random": ({0: [(100, 10), (200, 20)], 1: [(100, 20), (200, 40)]}, [(100, 15), (200, 30)]),
        "pretrained": (
            {0: [(100, 40), (200, 80)], 1: [(100, 60), (200, 120)]},
            [(100, 50), (200, 100)],
        ),
    }


def test_rows_of_seeds_hold_random_first_and_only_seeds_of_both_arms():
    detection = {
        "random": [{"seed": 0, "AP50": 10.0}, {"seed": 1, "AP50": 12.0}, {"seed": 2, "AP50": 9.0}],
        "pretrained": [{"seed": 1, "AP50": 32.0}, {"seed": 0, "AP50": 30.0}],
        "random_frozen": [{"seed": 0, "AP50": 1.0}],
        "pretrained_frozen": [{"seed": 0, "AP50": 2.0}],
    }
    assert seed_rows(detection, "fine_tuned", "AP50") == [(0, 10.0, 30.0), (1, 12.0, 32.0)]
    assert seed_rows(detection, "frozen", "AP50") == [(0, 1.0, 2.0)]


def test_figures_per_class_are_means_over_the_seeds_random_first():
    detection = {
        "random": [
            {"per_class": {"cat": 10.0, "ant": 1.0}},
            {"per_class": {"cat": 20.0, "ant": float("nan")}},
            {"per_class": {"cat": 60.0}},
            {"per_class": None},
        ],
        "pretrained": [{"per_class": {"cat": 50.0, "dog": 7.0}}, {"per_class": {"cat": 60.0}}],
    }
    assert per_class_rows(detection, "fine_tuned", "per_class") == [
        ("ant", 1.0, None),
        ("cat", 30.0, 55.0),
        ("dog", None, 7.0),
    ]
