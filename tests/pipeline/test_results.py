import json

import pytest

from common.picture_draws import NUM_DRAWS
from pipeline import results
from pipeline.experiment import closing_lines
from tests.pipeline.report import run_fixture


def test_results_keep_the_contract(tmp_path):
    out = run_fixture.make_run(tmp_path, seeds=2)
    run_fixture.change(out / "stages/data.json", skipped=True)
    results.write(out)
    found = json.loads((out / "results.json").read_text())
    assert set(found["detection"]) == set(run_fixture.ARM_LEVELS)
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
    out = run_fixture.make_run(tmp_path, seeds=2)
    run_fixture.change(out / "detection/random/seed-1/result.json", coco=None)
    results.write(out)
    found = json.loads((out / "results.json").read_text())
    assert found["detection"]["random"][1]["coco_AP50"] is None
    assert found["summary"]["random"]["coco_AP50"]["n"] == 1
    assert found["differences"]["fine_tuned"]["coco_AP50"]["seeds"] == [0]
    assert found["differences"]["fine_tuned"]["AP50"]["seeds"] == [0, 1]
    assert "coco" not in json.loads((out / "detection/random/summary.json").read_text())


@pytest.mark.parametrize(
    "content", [None, b"", b'{"AP": 1', b"\0" * 9, b"[]", b"7", b"null", b"{}"]
)
@pytest.mark.parametrize(
    "file", ["detection/random/seed-1/result.json", "stages/random/seed-1.json"]
)
def test_a_seed_does_not_disappear_silently(tmp_path, file, content):
    out = run_fixture.make_run(tmp_path, seeds=2)
    if content is not None:
        (out / file).write_bytes(content)
    elif file.startswith("stages"):
        pytest.skip("a stage that left no record did not run")
    else:
        (out / file).unlink()
    results.write(out)
    found = json.loads((out / "results.json").read_text())
    assert [row["seed"] for row in found["detection"]["random"]] == [0]
    (lost,) = [item for item in found["damaged"] if item["stage"] == "random/seed-1"]
    assert lost["file"] == file
    assert lost["fault"].startswith("is missing" if content is None else "is damaged")
    summary = json.loads((out / "detection/random/summary.json").read_text())
    assert (summary["n"], summary["damaged"]) == (1, [file])
    assert any(file in line for line in closing_lines(out).splitlines())


def mean(values):
    return sum(values) / len(values)


def test_only_finished_stages_of_the_present_settings_count(tmp_path):
    out = run_fixture.make_run(tmp_path, seeds=3)
    run_fixture.change(out / "stages/random/seed-1.json", status="running")
    run_fixture.change(out / "stages/pretrained/seed-2.json", current=False)
    run_fixture.change(out / "stages/convert.json", status="failed")
    plan = json.loads((out / "experiment.json").read_text())["plan"]
    plan.remove("random_frozen/seed-2")
    run_fixture.change(out / "experiment.json", plan=plan)
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
    assert results.findings(found) == []


@pytest.mark.parametrize(
    ("shift", "kind", "words"),
    [
        ([5.0, 5.2, 4.9], "better", "95 % interval +4.7 to +5.4, n = 3 detector seeds."),
        ([-5.0, -5.2, -4.9], "worse", "- random -5.0 points of AP50, 95 % interval -5.4 to -4.7"),
        ([5.0, -4.0, 0.5], "open", "95 % interval -10.7 to +11.7, n = 3 detector seeds."),
        ([5.0, 5.2], "open", "n = 2 detector seeds (fewer than 3 seeds decide nothing)."),
        ([9.0], "single", "+9.0 points of AP50, n = 1, no interval"),
    ],
)
def test_findings_are_honest(shift, kind, words):
    detection = {arm: [] for arm in run_fixture.ARM_LEVELS}
    for seed, gain in enumerate(shift):
        for arm, level in (("random", 30.0), ("pretrained", 30.0 + gain)):
            detection[arm].append({"seed": seed, "AP": level / 2, "AP50": level, "AP75": 1.0})
    (finding,) = results.findings({"detection": detection})
    assert finding["kind"] == kind
    assert words in finding["text"]


def test_variants_are_compared_seed_by_seed(tmp_path):
    results.write(run_fixture.make_study(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())
    tables = {table["metric"]: table for table in found["tables"]}
    assert set(tables) == {"knn", "linear", "AP", "AP50", "AP75"}
    for metric, factor in (("knn", 1.0), ("AP50", 1.0), ("AP", 0.5)):
        (row,) = tables[metric]["comparisons"]
        assert row["differences"] == pytest.approx([factor * gain for gain in run_fixture.GAINS])
        low, high = row["student_t"]
        assert low < row["mean"] < high
        assert (row["verdict"], tables[metric]["verdict"]) == ("better", "shown")
    assert tables["linear"]["comparisons"][0]["n"] == 1, "a missing figure is no figure"
    assert tables["knn"]["rows"][2]["values"]["2"] == pytest.approx(55.3)
    assert tables["knn"]["rows"][0]["n"] == 0, "random has no pretraining"
    assert found["pretrainings"]["fa/seed-1"]["knn_top1"] == pytest.approx(0.538)
    assert found["commits"] == ["abc", "abd"]
    assert found["failures"][0]["reason"] == "no <memory>"
    text = results.findings(found)[0]["text"]
    assert text.startswith("fa helps (shown). fa - base +3.0 points of kNN top-1, 95 % interval")


def test_a_claim_is_not_shown_while_a_comparison_has_no_values():
    comparisons = [{"name": f"{cell} - a", "terms": {cell: 1, "a": -1}, "decides": True}
                   for cell in "bc"]  # fmt: skip
    table = {"name": "t", "title": "t", "claim": "FA helps", "left_out": [],
             "rows": {"a": "a", "b": "b", "c": "c"}, "comparisons": comparisons}  # fmt: skip
    values = {"a": {0: 50.0, 1: 51.0, 2: 50.5}, "b": {0: 60.0, 1: 61.2, 2: 60.4}, "c": {}}
    made = results.make_table(table, {"knn": values}, "knn")
    (finding,) = results.findings({"tables": [made]})
    assert (finding["kind"], made["verdict"]) == ("open", "inconclusive")
    assert finding["text"].startswith("FA helps (inconclusive). b - a +10.0 points")
    assert finding["text"].endswith("; c - a: nothing to compare yet.")
    values["c"] = values["b"]
    made = results.make_table(table, {"knn": values}, "knn")
    assert results.findings({"tables": [made]})[0]["kind"] == "better"


@pytest.mark.parametrize("seeds", [4, 1])
def test_a_question_is_answered_first_by_the_fine_tuned_detectors(tmp_path, seeds):
    found = results.assemble(run_fixture.make_compare(tmp_path, seeds))
    gain, told = mean(run_fixture.GAINS[:seeds]), results.findings(found)
    assert [finding["text"].partition(",")[0] for finding in told] == [
        f"fa - base {gain:+.1f} points of AP50",
        f"fa - base {gain / 2:+.1f} points of AP50 with the backbone frozen",
        f"fa - base {run_fixture.GAINS[0]:+.1f} points of linear top-1",
        f"fa - base {gain:+.1f} points of kNN top-1",
    ]
    first, sure = told[0]["text"], "95 % interval +2.5 to +3.4, n = 4 pretraining seeds."
    assert first.endswith("n = 1, no interval: it may be chance." if seeds == 1 else sure)
    assert told[0]["kind"] == ("single" if seeds == 1 else "better")
    assert told[0]["answer"] == ("One seed cannot tell:" if seeds == 1 else "Yes:")
    lines = closing_lines(tmp_path).splitlines()
    assert lines[1:3] == ["Does FA help?", f"{told[0]['answer']} {first}"]

    table = results.answer_table(found)
    assert table["variants"] == ["random", "base", "fa"]
    assert [row["title"] for row in table["rows"]] == [
        "AP50, fine-tuned", "AP50, backbone frozen", "linear top-1", "kNN top-1",
    ]  # fmt: skip
    for row, level, factor in zip(table["rows"], (24, 8, 50, 50), (1, 0.5, 1, 1), strict=True):
        base, fa = row["means"][1:]
        assert base["values"][0] == level
        assert fa["values"][0] == pytest.approx(level + factor * run_fixture.GAINS[0])
        assert (row["name"], row["difference"]["differences"][0]) == (
            "fa - base", pytest.approx(factor * run_fixture.GAINS[0])
        )  # fmt: skip
    assert table["rows"][3]["means"][0]["n"] == 0, "random has no pretraining"


def test_an_interval_without_0_that_decides_nothing_says_why(tmp_path):
    out = run_fixture.make_compare(tmp_path)
    for seed, gain in enumerate((1.6, 0.2, 1.0, 1.1)):
        for arm, level in (("fa", 24.0), ("fa_frozen", 8.0)):
            run_fixture.change(out / f"detection/{arm}/seed-{seed}/result.json", AP50=level + gain)
    first = results.findings(results.assemble(out))[0]
    assert first["answer"] == "Not shown:"
    assert "95 % interval +0.1 to +1.9, n = 4 pretraining seeds (p = 0.09 after" in first["text"]


def test_other_sets_have_intervals_over_pictures(tmp_path):
    """Of the mean over the seeds, and of paired differences, by the same draws of pictures."""
    out = run_fixture.make_run(tmp_path, seeds=2)
    run_fixture.evaluate_elsewhere(out, "real")
    results.write(out)
    (one,) = json.loads((out / "results.json").read_text())["other_sets"]
    tables = {table["metric"]: table for table in one["tables"]}
    low, high = (0.025 * (NUM_DRAWS - 1), 0.975 * (NUM_DRAWS - 1))
    for row in tables["AP50"]["rows"]:
        step = 0.01 if row["variant"].startswith("random") else 0.011
        own = mean([run_fixture.ap50(row["variant"], seed) - 10 for seed in range(2)])
        assert (row["n"], row["mean"]) == (2, pytest.approx(own))
        assert row["picture_interval"] == pytest.approx([own + step * low, own + step * high])
    for row in tables["AP50"]["comparisons"]:
        paired = [row["mean"] + 0.001 * low, row["mean"] + 0.001 * high]
        assert row["picture_interval"] == pytest.approx(paired), "narrow: the pictures are shared"
    assert tables["coco_AP50"]["rows"][0]["picture_interval"] is None
    assert (one["outdated"], one["without_draws"]) == ([], [])

    # A seed on other pictures, and one of an older version: no interval that needs them.
    for end in ("", "-draws"):
        run_fixture.change(
            out / f"detection/random/seed-0/eval-on-real{end}.json", data_sha256="other"
        )
    (out / "detection/pretrained/seed-1/eval-on-real-draws.json").unlink()
    (one,) = results.assemble(out)["other_sets"]
    assert one["without_draws"] == ["random/seed-0", "pretrained/seed-1"]
    (table,) = [table for table in one["tables"] if table["metric"] == "AP"]
    has_interval = {row["variant"]: bool(row["picture_interval"]) for row in table["rows"]}
    assert has_interval == {arm: arm.endswith("_frozen") for arm in run_fixture.ARM_LEVELS}
    assert [bool(row["picture_interval"]) for row in table["comparisons"]] == [False, True]


def test_other_sets_of_variants_are_compared_as_the_run_compares_them(tmp_path):
    out = run_fixture.make_compare(tmp_path)
    run_fixture.evaluate_elsewhere(out, "real")
    (one,) = results.assemble(out)["other_sets"]
    (table,) = [table for table in one["tables"] if table["metric"] == "AP50"]
    assert [row["name"] for row in table["comparisons"]] == ["fa - base", "fa - base, frozen"]
    assert table["comparisons"][0]["picture_interval"] == pytest.approx(
        [mean(run_fixture.GAINS)] * 2
    )
    assert (table["name"], table["claim"]) == ("real", "")


def test_frozen_arms_are_compared_once_more():
    values = {"a": {0: 5.0}, "b": {0: 3.0}, "a_frozen": {0: 2.0}, "b_frozen": {0: 1.0}}
    item = {"name": "a - b", "terms": {"a": 1, "b": -1}, "decides": True}
    table = {"name": "t", "title": "", "claim": "", "left_out": {}, "rows": {"a": "a"}}
    made = results.make_table({**table, "comparisons": [item]}, {"AP": values}, "AP")
    found = [(row["name"], row["mean"]) for row in made["comparisons"]]
    assert found == [("a - b", 2.0), ("a - b, frozen", 1.0)]
