import json
import math

import numpy as np
import pytest

from tests.tools.run_fixture import ARM_LEVELS, dump, make_run
from tools.flow import results
from tools.flow.statistics import (
    bootstrap_interval,
    incomplete_beta,
    mean_std,
    paired_difference,
    student_t_quantile,
)

# Two-sided 95 % and 99 % quantiles as printed in tables of Student's t distribution.
TABLE = {
    (0.975, 1): 12.706,
    (0.975, 2): 4.303,
    (0.975, 3): 3.182,
    (0.975, 4): 2.776,
    (0.975, 5): 2.571,
    (0.975, 9): 2.262,
    (0.975, 30): 2.042,
    (0.975, 120): 1.980,
    (0.995, 4): 4.604,
    (0.995, 10): 3.169,
}


@pytest.mark.parametrize(("key", "expected"), TABLE.items())
def test_t_quantiles_equal_the_printed_table(key, expected):
    assert student_t_quantile(*key) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.999])
def test_t_quantiles_equal_the_closed_forms(p):
    assert student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    two = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    assert student_t_quantile(p, 2) == pytest.approx(two, rel=1e-9)
    assert student_t_quantile(1 - p, 7) == -student_t_quantile(p, 7)


def test_t_quantile_refuses_the_impossible():
    with pytest.raises(ValueError, match=r"probability 1\.0, 3 degrees"):
        student_t_quantile(1.0, 3)


def test_incomplete_beta_equals_the_binomial_sum():
    a, b, x = 3, 4, 0.3
    n = a + b - 1
    expected = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
    assert incomplete_beta(a, b, x) == pytest.approx(expected, rel=1e-12)


def test_paired_difference_of_a_worked_example():
    treated = {0: 31.0, 1: 29.0, 2: 35.0, 3: 33.0, 4: 30.0, 9: 99.0}
    control = {0: 28.0, 1: 28.0, 2: 30.0, 3: 31.0, 4: 26.0, 8: 0.0}
    found = paired_difference(treated, control)
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
    found = paired_difference({0: 3.0}, {0: 1.0})
    assert found["mean"] == 2.0
    assert all(found[key] is None for key in ("std", "student_t", "bootstrap"))
    assert found["note"] == "one seed: no interval"
    assert paired_difference({}, {0: 1.0})["note"] == "no seed: no interval"


def test_bootstrap_is_seeded_and_near_the_normal_interval_for_many_values():
    values = np.random.default_rng(3).normal(10.0, 2.0, 400).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values)
    half = 1.96 * mean_std(values)["std"] / 20
    mean = mean_std(values)["mean"]
    assert bootstrap_interval(values) == pytest.approx([mean - half, mean + half], abs=0.02)


def test_results_keep_the_contract(tmp_path):
    out = make_run(tmp_path, seeds=2)
    results.write(out, skipped={"data"})
    found = json.loads((out / "results.json").read_text())
    assert set(found["detection"]) == set(ARM_LEVELS)
    for arm, rows in found["detection"].items():
        assert [row["seed"] for row in rows] == [0, 1]
        for row in rows:
            assert {"seed", "AP", "AP50", "AP75", "per_class"} <= set(row)
            path = out / f"detection/{arm}/seed-{row['seed']}/result.json"
            stored = json.loads(path.read_text())
            assert {k: row[k] for k in ("AP", "AP50", "AP75", "per_class")} == {
                k: stored[k] for k in ("AP", "AP50", "AP75", "per_class")
            }
    assert found["pretrain"]["images_per_second"] == 181.5
    assert found["pretrain"]["knn_top1"] == 0.71
    assert found["conversion"]["max_relative_difference"] == 4.5e-7
    assert found["stages"]["data"] == {
        "seconds": 61.25,
        "skipped": True,
        "peak_memory_bytes": 900 << 20,
    }
    assert found["stages"]["pretrain"]["skipped"] is False
    assert found["versions"]["torch"] == "2.15.0"
    pair = found["differences"]["fine_tuned"]["AP50"]
    assert pair["n"] == 2
    assert pair["mean"] == pytest.approx(
        mean([r["AP50"] for r in found["detection"]["pretrained"]])
        - mean([r["AP50"] for r in found["detection"]["random"]])
    )
    summary = json.loads((out / "detection/random/summary.json").read_text())
    assert (summary["n"], summary["seeds"]) == (2, [0, 1])
    for metric, more in (("AP", 0.25), ("AP50", 0.5), ("AP75", 0.125)):
        row = found["detection"]["random"][0]
        assert row[f"coco_{metric}"] == pytest.approx(row[metric] + more)
        by_coco, by_voc = (found["summary"]["random"][key] for key in (f"coco_{metric}", metric))
        assert by_coco["mean"] == pytest.approx(by_voc["mean"] + more)
        assert summary["coco"][metric] == pytest.approx(by_coco["mean"])
    assert found["differences"]["fine_tuned"]["coco_AP50"]["mean"] == pytest.approx(pair["mean"])


def test_results_of_an_older_version_have_no_coco_metric(tmp_path):
    out = make_run(tmp_path, seeds=2)
    path = out / "detection/random/seed-1/result.json"
    old = json.loads(path.read_text())
    del old["coco"]
    dump(path, old)
    results.write(out)
    found = json.loads((out / "results.json").read_text())
    assert found["detection"]["random"][1]["coco_AP50"] is None
    assert found["summary"]["random"]["coco_AP50"]["n"] == 1
    assert found["differences"]["fine_tuned"]["coco_AP50"]["seeds"] == [0]
    assert found["differences"]["fine_tuned"]["AP50"]["seeds"] == [0, 1]
    assert "coco" not in json.loads((out / "detection/random/summary.json").read_text())


def mean(values):
    return sum(values) / len(values)


def test_only_finished_stages_of_the_present_settings_count(tmp_path):
    out = make_run(tmp_path, seeds=3)
    ledger = json.loads((out / "stages.json").read_text())
    ledger["stages"]["random/seed-1"]["status"] = "running"
    ledger["stages"]["pretrained/seed-2"]["current"] = False
    ledger["plan"].remove("random_frozen/seed-2")
    ledger["stages"]["convert"]["status"] = "failed"
    dump(out / "stages.json", ledger)
    found = results.assemble(out)
    seeds = {arm: [row["seed"] for row in rows] for arm, rows in found["detection"].items()}
    assert seeds["random"] == [0, 2]
    assert seeds["pretrained"] == [0, 1]
    assert seeds["random_frozen"] == [0, 1]
    assert found["differences"]["fine_tuned"]["AP"]["seeds"] == [0]
    assert found["conversion"]["max_relative_difference"] is None
    assert {"random/seed-1", "pretrained/seed-2", "convert"} <= set(found["unfinished"])


def test_an_empty_folder_gives_empty_results(tmp_path):
    found = results.assemble(tmp_path)
    assert all(rows == [] for rows in found["detection"].values())
    assert found["pretrain"] == {"images_per_second": None, "knn_top1": None}
    assert results.verdicts(found) == []


@pytest.mark.parametrize(
    ("shift", "kind", "words"),
    [
        ([5.0, 5.2, 4.9], "better", "Pretraining helps"),
        ([-5.0, -5.2, -4.9], "worse", "Pretraining hurts"),
        ([5.0, -4.0, 0.5], "unclear", "No clear difference"),
        ([9.0], "single", "One seed: no interval"),
    ],
)
def test_verdict_is_honest(shift, kind, words):
    detection = {arm: [] for arm in ARM_LEVELS}
    for seed, change in enumerate(shift):
        for arm, level in (("random", 30.0), ("pretrained", 30.0 + change)):
            detection[arm].append({"seed": seed, "AP": level / 2, "AP50": level, "AP75": 1.0})
    pairs = results.PAIRS.items()
    differences = {pair: results.compare(detection, *arms) for pair, arms in pairs}
    found = {"detection": detection, "differences": differences}
    verdict = results.verdict(found, "fine_tuned")
    assert verdict["kind"] == kind
    assert words in verdict["text"]
    assert results.verdict(found, "frozen")["kind"] == "missing"
