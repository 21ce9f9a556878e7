import json

import pytest

from pipeline import results
from tests.pipeline.report.run_fixture import (
    ARM_LEVELS,
    change_record,
    dump,
    dump_lines,
    make_run,
)


def test_results_keep_the_contract(tmp_path):
    out = make_run(tmp_path, seeds=2)
    change_record(out, "data", skipped=True)
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
    change_record(out, "random/seed-1", status="running")
    change_record(out, "pretrained/seed-2", current=False)
    change_record(out, "convert", status="failed")
    run = json.loads((out / "experiment.json").read_text())
    run["plan"].remove("random_frozen/seed-2")
    dump(out / "experiment.json", run)
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


GAINS = (3.1, 2.8, 3.3, 2.7)


@pytest.fixture
def compared(tmp_path):
    """Two variants with four seeds of pretraining, a shared `random`; one pretraining failed."""
    plan = []
    for seed, gain in enumerate(GAINS):
        for variant, level in (("base", 50.0 + seed), ("fa", 50.0 + seed + gain)):
            stage = f"{variant}/seed-{seed}"
            dump(tmp_path / f"pretrain/{stage}/summary.json", {"knn_top1": level / 100})
            rows = [{"kind": "train", "online_top1": 0.1}, {"online_top1": level / 200}]
            dump_lines(tmp_path / f"pretrain/{stage}/metrics.jsonl", rows)
            dump(tmp_path / f"linear/{stage}/linear.json", {"top1": None if seed else level / 100})
            plan += [f"pretrain/{stage}", f"linear/{stage}"]
        for arm, level in (("random", 20.0), ("base", 24.0), ("fa", 24.0 + gain)):
            result = {"AP": level / 2, "AP50": level, "AP75": level / 4}
            result |= {"per_class_AP50": {"cat": level + 1, "dog": None}}
            dump(tmp_path / f"detection/{arm}/seed-{seed}/result.json", result)
            plan.append(f"{arm}/seed-{seed}")
    record = {"format": "fa-stage-2", "status": "finished", "current": True, "seconds": 1.0}
    record |= {"label": "", "error": None}
    for number, name in enumerate(plan):
        dump(tmp_path / f"stages/{name}.json", record | {"commit": "abc" if number else "abd"})
    failed = {"status": "failed", "error": "no | memory", "label": "FA <b>"}
    dump(tmp_path / "stages/pretrain/fa/seed-4.json", record | failed)
    comparison = {"name": "fa - base", "terms": {"fa": 1, "base": -1}, "decides": True}
    rows = {name: name for name in ("random", "base", "fa")}
    table = {"name": "compare", "title": "", "claim": "fa helps", "rows": rows, "left_out": {}}
    run = {"format": "fa-stage-2", "name": "compare", "plan": [*plan, "pretrain/fa/seed-4"]}
    run |= {"arms": ["random", "base", "fa"], "tables": [table | {"comparisons": [comparison]}]}
    dump(tmp_path / "experiment.json", run)
    return tmp_path


def test_variants_are_compared_seed_by_seed(compared):
    results.write(compared)
    found = json.loads((compared / "results.json").read_text())
    tables = {table["metric"]: table for table in found["tables"]}
    assert set(tables) == {"knn", "online", "linear", "AP", "AP50", "AP75", "AP50 by class"}
    for metric, factor in (("knn", 1.0), ("online", 0.5), ("AP50", 1.0), ("AP", 0.5)):
        (row,) = tables[metric]["comparisons"]
        assert row["differences"] == pytest.approx([factor * gain for gain in GAINS])
        low, high = row["student_t"]
        assert low < row["mean"] < high
        assert (row["verdict"], tables[metric]["verdict"]) == ("better", "shown")
    assert tables["linear"]["comparisons"][0]["n"] == 1, "a missing figure is no figure"
    assert tables["knn"]["rows"][2]["values"]["2"] == pytest.approx(55.3)
    assert tables["knn"]["rows"][0]["n"] == 0, "random has no pretraining"
    (row,) = tables["AP50 by class"]["comparisons"]
    assert (row["name"], row["n"]) == ("cat: fa - base", 4)
    assert found["pretrainings"]["fa/seed-1"]["knn_top1"] == pytest.approx(0.538)
    assert any(text.startswith("knn, fa - base: +2.9") for text in results.verdicts(found))


def test_tables_say_what_is_preliminary_mixed_and_failed(compared):
    results.write(compared)
    text = (compared / "tables.md").read_text()
    assert "PRELIMINARY" in text
    assert "MIXED: stages ran at several commits: abc, abd" in text
    assert r"| pretrain/fa/seed-4 | FA \<b\> | no \| memory |" in text
    assert "| base | 4 | 51.50 ± 1.29 |" in text
    assert "| fa - base | 4 | +2.98 |" in text
    assert "compare, knn: fa - base: 2.975 (" in (compared / "differences.svg").read_text()
