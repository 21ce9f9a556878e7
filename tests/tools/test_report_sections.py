"""Sections of the report beyond one run: runs compared, studies, what was skipped or failed."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from tests.tools.run_fixture import dump, dump_lines, make_run
from tests.tools.study_fixture import make_study, make_trials
from tools.flow import report, runs, runs_section, skipped, studies_section
from tools.flow.config import load_config
from tools.flow.stages import build_stages

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs/pipeline/smoke.yaml"


def words(text: str) -> str:
    """A page's text without its tags."""
    body = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def section(text: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', text, re.DOTALL)[0]


def make_pretraining(
    folder: Path, *, loss: float = 2.0, rate: float = 0.1, num_steps: int = 6
) -> Path:
    """A finished run."""
    rows = [
        {"kind": "train", "step": s, "epoch": s / 2, "loss": loss - s / 10, "effective_rank": 9 + s}
        for s in range(1, num_steps + 1)
    ]
    dump_lines(folder / "metrics.jsonl", rows)
    dump(folder / "summary.json", {"steps": num_steps, "seconds": 5.0})
    dump(folder / "environment.json", {"commit": "f" * 40})
    (folder / "config.yaml").write_text(yaml.safe_dump({"optim": {"base_lr": rate}}))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "first", seeds=1)


# --- runs


def test_curves_of_runs_are_drawn_together(out, tmp_path):
    make_pretraining(tmp_path / "more" / "slow")
    make_pretraining(tmp_path / "more" / "fast", rate=0.2, loss=3.0)
    text = section(report.render(out, runs=[tmp_path / "more"]), "runs")
    names = [f"{name}" for name in ("pretrain", "fast", "slow")]
    assert all(name in text for name in names)
    charts = re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)
    by_title = {re.search(r'aria-label="([^.]*)\.', chart)[1]: chart for chart in charts}
    for title, keys in (("Loss", "012"), ("Effective rank", "012"), ("kNN top-1", "0")):
        drawn = re.findall(r'data-series="run-(\d)" d="M', by_title[title])
        assert sorted(drawn) == list(keys), title
    assert "from 2.9 to 2.4" in by_title["Loss"]
    legend = re.findall(r'<li data-series="run-(\d)">', text)
    assert legend == ["0", "1", "2"]
    assert "optim.base_lr" in text
    assert "<td>0.1</td>" in text


def test_without_other_runs_nothing_is_compared(out):
    assert '<section id="runs"' not in report.render(out)


def test_a_run_that_is_named_twice_comes_once(tmp_path):
    folder = make_pretraining(tmp_path / "a")
    assert len(runs_section.read_all([tmp_path, folder, tmp_path / "a"])) == 1


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["r/a", "r/b"], ["a", "b"]),
        (["r/a/pretrain", "r/b/pretrain"], ["a", "b"]),
        (["x/a/pretrain", "y/pretrain"], ["x/a", "y"]),
        (["r", "r/a"], ["r", "r/a"]),
        (["r/a"], ["a"]),
        (["r/a", "r/a"], ["a (1)", "a (2)"]),
        ([], []),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(tmp_path, folders, expected):
    found = [runs.RunInfo(tmp_path / name, "finished", "", {}, None, None) for name in folders]
    assert runs.names(found) == expected


def test_locks_of_pipelines_and_studies_are_no_runs(out, tmp_path):
    for name, mark in (("pipeline", "stages.json"), ("study", "job_results/f-0.json")):
        make_pretraining(tmp_path / name / "pretrain")
        (tmp_path / name / ".lock").touch()
        (tmp_path / name / mark).parent.mkdir(exist_ok=True)
        (tmp_path / name / mark).touch()
    found = [str(path.relative_to(tmp_path)) for path in runs.find(tmp_path)]
    assert found == ["pipeline/pretrain", "study/pretrain"]


# --- studies


def test_a_study_is_shown_with_its_verdicts_and_plots(out, tmp_path):
    page = report.render(out, studies=[make_study(tmp_path / "s"), make_trials(tmp_path / "t")])
    study, trials = section(page, "study-1"), section(page, "study-2")
    assert "Study tiny on squares (s)" in study
    assert "FA &amp; a mask help" in study
    assert "FA &lt;methods&gt;" in study
    assert '<td class="words is-better">better</td>' in study
    assert '<td class="words is-shown">shown</td>' in study
    assert "53.26 ± 0.47" in study
    assert study.count('<svg class="plot"') == 2
    assert "<style" not in study
    assert "PRELIMINARY" not in study
    assert '<td class="words is-worse">worse</td>' in trials
    assert "a paper [M]" in trials
    assert trials.count('<table class="sortable">') == 5


def test_what_is_no_result_yet_is_marked_in_every_form(out, tmp_path):
    folder = make_study(tmp_path / "s", is_complete=False)
    text = section(report.render(out, studies=[folder]), "study-1")
    assert '<p class="notice">PRELIMINARY' in text
    assert text.count("preliminary</small></h3>") == 2
    found = studies_section.read(folder)
    from tools.studies import documents

    for render in (documents.to_markdown, documents.to_latex):
        lines = render("t", found.sections).splitlines()
        marked = [line for line in lines if re.search(r"FA .*methods", line) and "PRELIM" in line]
        assert marked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: .* is no folder that tools/ablate.py or tools/run_trials.py"),
        ("{", "has the format None, not fa-study-1 or fa-trials-1"),
        ("[1]", "has the format None"),
        ('{"format": "fa-results-1"}', "has the format fa-results-1, not fa-study-1"),
        ('{"format": "fa-study-1"}', r"is damaged \(KeyError: 'preset'\)"),
        ('{"format": "fa-trials-1", "data": "d", "is_complete": true, "counts": 3}', "is damaged"),
    ],
)
def test_a_folder_that_is_no_study_is_one_error(out, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    before = sorted(out.iterdir())
    assert report.main([str(out), "--studies", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: {re.escape(str(tmp_path))}/results.json .*\n", printed.err)
    assert re.search(message, printed.err)
    assert (printed.out, sorted(out.iterdir())) == ("", before)


def places(value, at=()):
    """The way to every value within a JSON value."""
    yield from [at] if at else []
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from places(value[key], (*at, key))


@pytest.mark.parametrize(
    ("make", "wrong"),
    [(make_study, None), (make_study, {}), (make_study, "<script>"), (make_trials, {})],
)
def test_whatever_is_damaged_in_a_study_is_no_traceback_and_no_tag(tmp_path, make, wrong):
    whole = json.loads((make(tmp_path) / "results.json").read_text())
    refused = []
    for *way, last in places(whole):
        damaged = json.loads(json.dumps(whole))
        node = damaged
        for key in way:
            node = node[key]
        node[last] = wrong
        dump(tmp_path / "results.json", damaged)
        try:
            study = studies_section.read(tmp_path)
        except UserError as error:
            refused.append(str(error))
        else:
            assert "<script" not in study.parts
    assert len(refused) > 20
    assert all(str(tmp_path / "results.json") in message for message in refused)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "none is no folder; name"), ("empty", "empty holds no pretraining run: no folder")],
)
def test_a_folder_without_runs_is_one_error(out, tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    assert report.main([str(out), "--runs", str(tmp_path / name)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


# --- skipped or failed


def items(text: str) -> list[list[str]]:
    """Cells of the rows of the section's first table."""
    body = re.search(r"<tbody>(.*?)</tbody>", section(text, "skipped"), re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [[words(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", r, re.DOTALL)] for r in rows]


@pytest.fixture
def clean(tmp_path) -> Path:
    """A run in which nothing was skipped."""
    out = make_run(tmp_path / "clean", seeds=1)
    dump(out / "shards/index.json", {"skipped": []})
    dump(out / "pretrain/summary.json", {"steps": 1000, "num_skipped_samples": 0})
    return out


def test_nothing_is_said_in_words(clean, tmp_path):
    folders = [make_pretraining(tmp_path / "a")]
    text = report.render(clean, folders, [make_trials(tmp_path / "t")])
    assert "Nothing: no stage or run failed, no alarm" in section(text, "skipped")
    assert "<table" not in section(text, "skipped")


def test_a_failed_stage_is_shown_with_the_end_of_its_log(clean):
    ledger = json.loads((clean / "stages.json").read_text())
    ledger["stages"]["random/seed-0"] |= {"status": "failed", "exit_status": 1}
    del ledger["stages"]["pretrained/seed-0"]
    dump(clean / "stages.json", ledger)
    (clean / "logs/random").mkdir(parents=True)
    (clean / "logs/random/seed-0.log").write_text(
        "# command\nfirst\nsecond\n\nerror: <no> memory\n"
    )
    assert items(report.render(clean)) == [
        ["failed", "random/seed-0", "the stage", "exit status 1. logs/random/seed-0.log ends: "
         "first second error: &lt;no&gt; memory"],
        ["not run", "pretrained/seed-0", "the stage", "not run"],
    ]  # fmt: skip


def test_steps_that_were_not_finite_are_shown(clean):
    folder = clean / "pretrain"
    dump(
        folder / "nonfinite/step-00000007.json",
        {"step": 7, "policy": "skip", "loss": ["nan", 1.5], "gradient_norm": "inf"},
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
        for step in (7, 9):
            event = {"kind": "event", "step": step, "num_skipped_steps": 1, "message": f"at {step}"}
            file.write(json.dumps(event) + "\n")
        row = {"kind": "train", "step": 1000, "num_overflow_steps": 4}
        file.write(json.dumps(row) + "\n")
    found = items(report.render(clean))
    assert found == [
        ["damaged", "pretrain", "metrics.jsonl", "has 1 damaged lines"],
        ["not finite", "pretrain", "step 7, left out",
         "loss nan, 1.5, gradient norm inf; batch: nonfinite/step-00000007.json"],
        ["not finite", "pretrain", "step 9, left out", "at 9"],
        ["overflow", "pretrain", "4 steps",
         "gradients too large for the loss scale of fp16; it was lowered"],
    ]  # fmt: skip


def test_alarms_and_notes_are_shown_and_figures_are_not(clean, tmp_path):
    events = [
        {"collapse": {"feature_std": 0.1}, "message": "collapsed"},
        {"message": "wandb went away"},
        {"message": "kNN before training", "knn_top1_initial": 0.2},
        {"message": "stopped by SIGTERM after step 4"},
    ]
    path = clean / "pretrain/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    dump_lines(path, [*rows, *({"kind": "event", "step": 1000} | event for event in events)])
    expected = [
        ["alarm", "pretrain", "step 1000", "collapsed"],
        ["noted", "pretrain", "step 1000", "wandb went away"],
    ]
    assert items(report.render(clean)) == expected
    others = [make_pretraining(tmp_path / "other")]
    assert items(report.render(clean, others)) == expected  # this run's are not told twice


def test_what_detection_did_not_use_is_shown_once(clean):
    for arm in ("random", "pretrained"):
        path = clean / f"detection/{arm}/seed-0/result.json"
        found = json.loads(path.read_text())
        dump(path, found | {"classes_without_test_objects": ["tool"], "num_test_images": 60})
        (path.parent / "log.txt").write_text(
            "Removed 9 images with no usable annotations. 3 images left.\n"
            "Removed 12 images with no usable annotations. 188 images left.\n"
        )
    assert items(report.render(clean)) == [
        ["left out", "detection", "class tool", "no object in the test pictures"],
        ["left out", "detection", "40 of 100 test pictures", "TEST.NUM_IMAGES"],
        ["left out", "detection", "12 training pictures", "no object in them"],
    ]


def test_other_runs_and_studies_tell_theirs(clean, tmp_path):
    crashed = make_pretraining(tmp_path / "r/crashed")
    (crashed / "summary.json").unlink()
    dump_lines(crashed / "bad_samples.jsonl", [{"sample": 3, "reason": "cut"}, {"sample": 4}])
    (crashed / "config.yaml").unlink()
    late = crashed.stat().st_mtime + 1e4
    study = make_study(tmp_path / "s", is_complete=False)
    others = [runs.read(crashed, now=late), runs.read(make_pretraining(tmp_path / "r/well"))]
    found = [*skipped.of_runs(others), *studies_section.read(study).skipped]
    assert [(i.kind, i.where, i.what) for i in found] == [
        ("failed", "crashed", "the run"),
        ("damaged", "crashed", "config.yaml"),
        ("replaced", "crashed", "2 samples"),
        ("failed", "Study tiny on squares (s)", "FA: nn, seed 3"),
        ("left out", "Study tiny on squares (s)", "FA <methods>: noise"),
        ("not run", "Study tiny on squares (s)", "1 of 12 runs"),
    ]
    assert [i.why for i in found][2:4] == [
        "cut (the first; bad_samples.jsonl)", "exit status 1: <no memory>",
    ]  # fmt: skip
    text = report.render(clean, studies=[study])
    assert "exit status 1: &lt;no memory&gt;" in section(text, "skipped")


def test_many_of_a_kind_are_counted(clean):
    entries = [{"file": f"{i}.jpg", "reason": "does not decode"} for i in range(70)]
    dump(clean / "shards/index.json", {"skipped": entries})
    text = report.render(clean)
    found = items(text)
    assert len(found) == 51
    assert found[-1][2] == "20 more"
    assert "Left out: 70." in words(section(text, "skipped"))


# --- keys of the pipeline's config


def test_keys_of_the_config_reach_the_page(clean, tmp_path):
    folder, study = make_pretraining(tmp_path / "a/b"), make_study(tmp_path / "s")
    keys = [f"report.runs=[{folder}]", f"report.studies=[{study}]"]
    stage = build_stages(load_config(SMOKE, keys), ROOT, clean)[-1]
    assert {study / "results.json", folder / "metrics.jsonl"} <= set(stage.files)
    subprocess.run(stage.command, check=True, cwd=ROOT, capture_output=True)
    text = (clean / "report.html").read_text()
    assert 'data-series="run-1" d="M' in section(text, "runs")
    assert "Study tiny on squares" in section(text, "study-1")
    plain = build_stages(load_config(SMOKE), ROOT, clean)[-1]
    assert (plain.files, "--runs" in plain.command) == ((), False)


@pytest.mark.parametrize(
    ("key", "message"),
    [("report.runs", "report.runs: .*none is no folder"),
     ("report.studies", "report.studies: .*none holds no results.json")],
)  # fmt: skip
def test_keys_that_name_nothing_are_refused(tmp_path, key, message):
    with pytest.raises(UserError, match=message):
        load_config(SMOKE, [f"{key}=[{tmp_path / 'none'}]"])
