"""What is refused before the first stage: the programs look at a small set of one's own."""

import contextlib
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from common.errors import EACH, RunFailed, UserError, run_or_check_each
from pipeline import experiment
from pipeline.config import load_config
from pipeline.plan import Stage
from pipeline.run import Limits
from pipeline.stages import build_stages
from tests.detection.tiny_detection import make_voc
from tools.run_pipeline import main

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/pipeline/smoke.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set, and an experiment with it and its pictures as pool, as small as the smoke."""
    folder = tmp_path_factory.mktemp("own")
    make_voc(folder / "voc")
    smoke = yaml.safe_load(SMOKE.read_text())
    pool = folder / "voc/VOC2007/JPEGImages"
    smoke["data"] = {"kind": "existing", "dataset": str(folder / "voc"), "pool": str(pool)}
    smoke["pretrain"]["overrides"]["data"]["batch_size"] = 4
    (folder / "own.yaml").write_text(yaml.safe_dump(smoke))
    return folder


def stages_of(folder: Path, out: Path, *overrides: str):
    config = load_config(folder / "own.yaml", overrides)
    return config, build_stages(config, ROOT, out)


def checked(folder: Path, *overrides: str) -> dict[str, dict]:
    """What the checks say; those that passed before are kept in `out`."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    return experiment.check(*stages_of(folder, out, *overrides), ROOT, out)


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs' own functions answer: starting the programs takes longer than their checks."""

    def run(command: list[str], input: str, **_: object) -> SimpleNamespace:
        name = Path(command[1]).stem
        module = importlib.import_module(
            "pretrain.__main__" if name == "pretrain" else f"tools.{name}"
        )
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None, raising=False)
        monkeypatch.setattr(sys, "argv", [name, EACH])
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert run_or_check_each(module.main) == 0
        return SimpleNamespace(stdout=said.getvalue())

    monkeypatch.setattr(experiment.subprocess, "run", run)
    monkeypatch.setattr(experiment.provenance, "usable_cores", lambda: 1)  # one after another


@pytest.mark.usefixtures("_in_this_process")
def test_what_is_right_passes_and_says_what_it_takes(folder, monkeypatch, capsys):
    facts = checked(folder)
    arch = {"depth": 50, "width_per_group": 16, "stem_channels": 16, "res2_channels": 64}
    assert facts["pretrain"]["arch"] == facts["random/seed-0"]["arch"] == arch
    for name in ("pretrain", "random/seed-0"):
        assert facts[name]["seconds"] > 0
        assert facts[name]["disk_bytes"] > 1e6
    assert facts["random/seed-0"]["num_train"] > 0
    assert facts["shards"]["num_pictures"] == 12

    # What passed is kept with the run, and a dry run shows times and writes no more.
    monkeypatch.setattr(experiment.subprocess, "run", lambda *_, **__: pytest.fail("asked again"))
    assert checked(folder) == facts
    capsys.readouterr()
    words = [str(folder / "own.yaml"), "--out", str(folder / "out"), "--dry-run"]
    assert main([*words, "--until", "pretrain"]) == 0
    *stages, total = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in stages]
    assert [line[:2] for line in lines] == [["run", "shards"], ["run", "pretrain"]]
    assert lines[1][3] in ("s", "min")
    assert re.fullmatch(
        r"2 stages to do: about .* added up, without 1 of unknown time \(-\)", total
    )
    assert [path.name for path in (folder / "out").iterdir()] == ["checks.json"]

    # A full disk is foreseen.
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(experiment.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the stages leave about .* GB are free"):
        checked(folder)


def test_a_dry_run_makes_no_folder_and_keeps_its_checks(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA_CACHE", str(tmp_path / "cache"))
    new, code = tmp_path / "new", tmp_path / "code/common"
    words = [str(folder / "own.yaml"), "--out", str(new), "--dry-run", "--until", "shards"]

    def printed() -> list[str]:
        assert main(words) == 0
        assert not new.exists()
        return capsys.readouterr().out.splitlines()

    first = printed()
    assert first[0].startswith("checking")
    assert printed() == first[1:]

    # Code that has changed is asked again.
    code.mkdir(parents=True)
    digests = set()
    for text in ("", "x = 1\n"):
        (code / "module.py").write_text(text)
        digests.add(experiment.code_digest(tmp_path / "code"))
    assert len(digests) == 2
    monkeypatch.setattr(experiment, "code_digest", lambda root: digests.pop())
    assert printed() == first


PRETRAINING = {  # variant -> what is wrong with it, and what is said of that
    "typo": ({"optim.epochz": 3}, "unknown key optim.epochz"),
    "method": ({"fa.method": "mask", "fa.architecture": "post"}, "cannot train"),
    "arch": ({"arch.res2_channels": 128, "arch.width_per_group": 32}, "a backbone with arch"),
    "pixels": ({"data.pixel_mean": [0.5, 0.5, 0.5]}, "a backbone with pixel_mean"),
    "batch": ({"data.batch_size": 4096}, "data.batch_size 4096 is more than the 12 pictures"),
}
DETECTION = {  # override -> what is said of it
    "overrides.SOLVER.MAXITER=3": "unknown key SOLVER.MAXITER",
    "overrides.SOLVER.STEPS=(9,)": "reaches beyond SOLVER.MAX_ITER",
    "options.eval_evry=3": "unrecognized arguments",
    "options.train_split=trian": "no such list",
    "options.classes=[disc, bxo]": "unknown class",
}


@pytest.mark.usefixtures("_in_this_process")
def test_every_fault_is_found_before_the_first_stage(folder: Path) -> None:
    variants = {name: {"overrides": overrides} for name, (overrides, _) in PRETRAINING.items()}
    words = ["convert.branch=ema", f"variants={json.dumps(variants)}"]
    with pytest.raises(UserError, match="nothing was started") as caught:
        checked(folder, *words)
    lines = str(caught.value).splitlines()
    for name, (_, message) in PRETRAINING.items():
        assert any(f"pretrain/{name}" in line and message in line for line in lines), name
    assert "pretrain/arch has only online" in str(caught.value)


@pytest.mark.usefixtures("_in_this_process")
def test_notes_and_faults_of_detection_name_settings(folder: Path, tmp_path: Path) -> None:
    """The options of tools/train_voc.sh are none of run_pipeline."""
    shutil.copytree(folder / "voc", tmp_path / "voc")
    path = min((tmp_path / "voc/VOC2007/JPEGImages").iterdir())
    exif = Image.Exif()
    exif[0x112] = 3
    Image.open(path).save(path, exif=exif)
    words = ["detection.overrides.SEED=3", "detection.options.test_split=train+test"]
    given = [[f"data.dataset={tmp_path / 'voc'}"], *([word] for word in words)]
    stages = {str(x): stages_of(folder, tmp_path, *x)[1][-2] for x in given}
    noted, seed, lists = experiment.ask(stages, ROOT)
    assert noted["notes"][0].endswith("; detection.options.exif=stored says otherwise")
    assert seed["error"] == "SEED: use detection.seeds=.."
    assert lists["error"].startswith("detection.options.test_split=.. train+test: give one list")


@pytest.mark.usefixtures("_in_this_process")
def test_a_pool_in_parts_is_as_large_as_all_of_them(folder: Path, tmp_path: Path) -> None:
    variants = json.dumps({"whole": {}, "half": {"pool": 0.5}})
    words = ["data.shares=[0.5]", f"variants={variants}", "evaluations=[knn]"]
    facts = experiment.check(*stages_of(folder, tmp_path, *words), ROOT, tmp_path)
    sizes = [facts[f"pretrain/{name}"]["num_samples"] for name in ("whole", "half")]
    assert sizes == [12, 6]


def test_a_page_of_a_failed_call_does_not_stay(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    page = f"import pathlib; pathlib.Path({str(out)!r}, 'report.html').write_text('good')"

    def call(*seeds: str, rerun: tuple[str, ...] = ()) -> None:
        stages = [Stage(f"random/seed-{n}", (sys.executable, "-c", code), (), ())
                  for n, code in enumerate(seeds)]  # fmt: skip
        names = tuple(stage.name for stage in stages)
        report = Stage("report", (sys.executable, "-c", page), ("report.html",), (), upstream=names)
        monkeypatch.setattr(experiment, "build_stages", lambda *_: [*stages, report])
        command = ["bash", "run.sh", *(word for name in rerun for word in ("--rerun", name)), "a=1"]
        experiment.run_experiment(load_config(SMOKE), out, command, Limits(rerun=rerun))

    monkeypatch.setattr(experiment, "check", lambda *_: {})
    monkeypatch.setattr("pipeline.run._POLL_SECONDS", 0.01)
    call("pass")
    assert (out / "report.html").read_text() == "good"
    with pytest.raises(RunFailed) as caught:
        call("pass", "raise SystemExit(1)", rerun=("random/seed-1",))
    assert (out / "report.html").read_text() != "good"
    assert str(caught.value).endswith("to go on: bash run.sh a=1"), "without --rerun"
    call("pass")
    assert (out / "report.html").read_text() == "good"


@pytest.mark.slow
def test_faults_of_detection_and_of_shards(folder: Path, tmp_path: Path) -> None:
    stages, messages = {}, list(DETECTION.values())
    for override in DETECTION:
        stages[override] = stages_of(folder, tmp_path, f"detection.{override}")[1][-2]
    for kind in ("Annotations", "JPEGImages"):  # damaged files are named
        shutil.copytree(folder / "voc", tmp_path / kind)
        path = min((tmp_path / kind / "VOC2007" / kind).iterdir())
        data = path.read_bytes().replace(b"<xmin>", b"<xmin>x")
        path.write_bytes(data if kind == "Annotations" else data[: len(data) // 2])
        stages[kind] = stages_of(folder, tmp_path, f"data.dataset={tmp_path / kind}")[1][-2]
        messages.append(path.name)
    for answer, message in zip(experiment.ask(stages, ROOT), messages, strict=True):
        assert message in answer.get("error", "")
    wrong = stages_of(folder, tmp_path, "shards.options.max_badd=3")[1][0]
    (answer,) = experiment.ask({"shards": wrong}, ROOT)
    assert "unrecognized arguments: --max-badd 3" in answer["error"]


def test_every_program_answers_many_checks_at_once(folder: Path, capfd, monkeypatch) -> None:
    def program(words: list[str] | None) -> int:
        if words == ["odd"]:
            raise SystemExit(2)
        print("noise\n" + json.dumps({"words": words}))
        return 0

    monkeypatch.setattr("sys.argv", ["x", EACH])
    monkeypatch.setattr("sys.stdin", io.StringIO('[["a"], ["odd"], ["b", "c"]]'))
    assert run_or_check_each(program) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines == ['{"words": ["a"]}', '{"error": "no message"}', '{"words": ["b", "c"]}']
