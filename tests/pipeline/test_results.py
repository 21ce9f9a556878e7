import json

import pytest

from pipeline import results
from tests.pipeline.report.run_fixture import ARM_LEVELS, dump, make_run


def test_results_keep_the_contract(tmp_path):
    out = make_run(tmp_path, seeds=2)
    ledger = json.loads((out / "stages.json").read_text())
    ledger["stages"]["data"]["skipped"] = True
    dump(out / "stages.json", ledger)
    results.write(out)
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
