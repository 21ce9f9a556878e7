import datetime
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import RunFailed, UserError
from common.files import LOCK, held, inside, remove
from pipeline.jobs import last_line
from pipeline.plan import Stage, read_run
from pipeline.run import Limits, Progress, Runner

COPY = """
import pathlib, sys
source, target = map(pathlib.Path, sys.argv[1:3])
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(source.read_text().strip())
runs = target.with_name(target.name + ".runs")
runs = pathlib.Path(sys.argv[3]) / runs.name
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
print("copied", source.name)
"""
PYTHON = (sys.executable, "-S")  # starts sooner


class World:
    """Two stages in a scratch repository: `first` reads in.txt, `second` reads what first made."""

    def __init__(self, folder: Path) -> None:
        self.root, self.out, self.counts = folder / "repo", folder / "out", folder / "counts"
        for path in (self.root, self.counts):
            path.mkdir()
        self.input = folder / "in.txt"
        self.input.write_text("one")
        (self.root / "copy.py").write_text(COPY)
        self.setting = self.code_version = 1

    def stages(self) -> list[Stage]:
        script = str(self.root / "copy.py")
        made = self.out / "first/value.txt"
        return [
            Stage(
                name="first",
                command=(*PYTHON, script, str(self.input), str(made), str(self.counts)),
                outputs=("first/value.txt",),
                owns=("first",),
                files=(self.input,),
            ),
            Stage(
                name="second/a",
                command=(
                    *(*PYTHON, script, str(made)),
                    *(str(self.out / "second/a.txt"), str(self.counts)),
                ),
                outputs=("second/a.txt",),
                owns=("second/a.txt",),
                upstream=("first",),
                config={"setting": self.setting},
                code_version=self.code_version,
            ),
        ]

    def runner(self, **limits) -> Runner:
        return Runner(self.root, self.out, ["bash", "run.sh", "a b"], Limits(**limits))

    def run(self, chosen: set[str] | None = None, **limits) -> Runner:
        runner = self.runner(**limits)
        runner.run(self.stages(), Progress(2, io.StringIO()), chosen=chosen)
        return runner

    def records(self) -> dict[str, dict]:
        return read_run(self.out)["stages"]

    def counted(self) -> tuple[int, int]:
        paths = [self.counts / name for name in ("value.txt.runs", "a.txt.runs")]
        first, second = (len(path.read_text()) if path.exists() else 0 for path in paths)
        return first, second

    def reasons(self) -> dict[str, tuple[str, str]]:
        plan = self.runner().plan(self.stages())
        return {name: (decision.action, decision.reason) for name, decision in plan.items()}


def skipped(runner: Runner) -> set[str]:
    return {name for name, record in runner.store.stages.items() if record["skipped"]}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("pipeline.run._POLL_SECONDS", 0.01)
    return World(tmp_path)


def test_unchanged_stages_are_skipped_and_keep_their_time(world):
    world.run()
    before = world.records()
    runner = world.run()
    assert world.counted() == (1, 1)
    assert skipped(runner) == {"first", "second/a"}
    after = world.records()
    assert all(after[name]["seconds"] == before[name]["seconds"] for name in before)
    assert all(record["status"] == "finished" and record["current"] for record in after.values())
    assert all(record["peak_memory_bytes"] > 1 << 20 for record in after.values())


@pytest.mark.parametrize(
    ("name", "key"), [("setting", "config.setting"), ("code_version", "code.version")]
)
def test_a_change_runs_only_the_stage_that_has_it(world, name, key):
    world.run()
    setattr(world, name, 2)
    assert world.reasons() == {
        "first": ("skip", "unchanged"),
        "second/a": ("run", f"changed: {key} 1 -> 2"),
    }
    world.run()
    assert world.counted() == (1, 2)


def test_changed_input_runs_everything_behind_it(world):
    world.run()
    world.input.write_text("two")
    plan = world.reasons()
    assert plan["first"][0] == "run"
    assert "in.txt" in plan["first"][1]
    assert plan["second/a"] == ("maybe", "only if first makes something else than before")
    world.run()
    assert world.counted() == (2, 2)
    assert (world.out / "second/a.txt").read_text() == "two"


def test_an_input_that_was_moved_changes_nothing(world):
    world.run()
    world.input = world.input.rename(world.input.with_name("moved.txt"))
    world.run()
    assert world.counted() == (1, 1)
    world.input.write_text("two")
    assert "moved.txt" in world.reasons()["first"][1]


def test_a_stage_that_makes_the_same_again_changes_nothing_behind_it(world):
    world.run()
    world.input.write_text("one\n")  # The copy strips it.
    runner = world.run()
    assert world.counted() == (2, 1)
    assert skipped(runner) == {"second/a"}


def test_the_commit_is_recorded_and_does_not_count(world, monkeypatch):
    monkeypatch.setattr("pipeline.run.provenance.commit", lambda root: "abc")
    world.run()
    monkeypatch.setattr("pipeline.run.provenance.commit", lambda root: "abd")
    world.setting = 2
    world.run()
    commits = [world.records()[name]["commit"] for name in ("first", "second/a")]
    assert commits == ["abc", "abd"]


def test_missing_output_runs_again(world):
    world.run()
    (world.out / "second/a.txt").unlink()
    assert world.reasons()["second/a"] == ("run", "second/a.txt is missing")
    world.run()
    assert world.counted() == (1, 2)


def test_records_of_other_settings_are_not_current(world):
    world.run()
    world.setting = 2
    world.run({"first"})
    stages = world.records()
    assert stages["first"]["current"]
    assert not stages["second/a"]["current"]
    world.setting = 1
    world.run()
    assert world.counted() == (1, 1), "going back to the old settings costs nothing"


def test_failure_names_stage_log_lines_and_the_way_on(world):
    (world.root / "copy.py").write_text("print('about to break'); raise SystemExit(3)")
    with pytest.raises(RunFailed) as caught:
        world.run()
    message = str(caught.value)
    assert "stage first failed with exit status 3" in message
    assert "| about to break" in message
    assert str(world.out / "logs/first.log") in message
    assert message.endswith("to go on: bash run.sh 'a b'")
    (world.root / "copy.py").write_text(COPY)
    world.run()
    assert world.counted() == (1, 1)


def test_exit_status_0_without_the_output_is_a_failure(world):
    (world.root / "copy.py").write_text("print('done')")
    with pytest.raises(RunFailed, match="ended without leaving first/value"):
        world.run()


def test_what_this_pipeline_did_not_make_is_never_removed(world):
    precious = world.out / "first/holiday.jpg"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    with pytest.raises(UserError, match="was not made by this pipeline"):
        world.run()
    assert precious.exists()


def test_old_outputs_are_removed_before_a_fresh_start(world):
    world.run()
    stale = world.out / "first/stale.txt"
    stale.write_text("x")
    world.input.write_text("two")
    world.run()
    assert not stale.exists()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", ""])
def test_paths_out_of_the_folder_are_refused(tmp_path, path):
    with pytest.raises(UserError, match="is not a path below"):
        inside(tmp_path, path)


def test_links_are_unlinked_not_followed(tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "out"
    for folder in (outside, out):
        folder.mkdir()
    (outside / "precious").write_text("x")
    (out / "link").symlink_to(outside)
    with pytest.raises(UserError, match="move links away"):
        remove(out, "link/precious")
    remove(out, "link")
    assert not (out / "link").exists()
    assert (outside / "precious").exists()


def test_two_runs_in_one_folder_refuse_each_other(world, monkeypatch):
    world.out.mkdir()
    monkeypatch.setattr("pipeline.run.LOCK_WAIT_SECONDS", 0.0)
    message = rf"out: process {os.getpid()} on .* is at work here since 2.*choose another out"
    with held(world.out / LOCK, of_process=False), pytest.raises(UserError, match=message):
        world.run()


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 9, b"[]", b"7", b"null", b"\xff"])
def test_a_stage_with_a_damaged_record_runs_again(world, content):
    world.run()
    (world.out / "stages/first.json").write_bytes(content)
    (world.out / "experiment.json").write_bytes(content)
    with pytest.raises(UserError, match=r"experiment\.json: is damaged; the command of this run"):
        world.records()
    assert world.reasons()["first"] == ("run", "stages/first.json is damaged")
    runner = world.run()
    assert world.counted() == (2, 1)
    runner.store.open_run("name")
    assert world.records()["first"]["status"] == "finished"


@pytest.mark.parametrize(("key", "value"), [("config", 7), ("command", [["demo"]]), ("plan", {})])
def test_an_experiment_whose_facts_are_of_other_kinds_is_damaged(world, key, value):
    world.run().store.open_run("name", config={}, command=["demo"], plan=["first"])
    assert world.records()
    path = world.out / "experiment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"experiment\.json: is damaged; the command of this run"):
        world.records()


def test_a_record_of_another_version_is_refused(world):
    (world.out / "stages").mkdir(parents=True)
    (world.out / "stages/first.json").write_text('{"format": "fa-stage-1", "status": "finished"}')
    with pytest.raises(UserError, match=r"first\.json is not of this version; move .* away"):
        world.runner()


@pytest.mark.parametrize(("resumable", "action"), [(True, "resume"), (False, "run")])
def test_a_stage_whose_output_is_damaged_is_not_skipped(world, resumable, action):
    world.run()
    (world.out / "first/value.txt").write_bytes(b"")
    stages = [replace(world.stages()[0], resumable=resumable)]
    decision = world.runner().plan(stages)["first"]
    assert (decision.action, decision.reason) == (action, "first/value.txt is damaged")


def test_an_attempt_that_was_killed_with_its_runner_lasted_until_its_last_line(world):
    world.run()
    stage, runner = replace(world.stages()[0], resumable=True), world.runner()
    started = datetime.datetime.fromisoformat(world.records()["first"]["started"]).timestamp()
    runner.store.update("first", status="running", seconds=5.0)
    os.utime(runner.log_path(stage), (started, started + 100))
    runner.run([stage], Progress(1, io.StringIO()))
    assert 105 <= world.records()["first"]["seconds"] < 130


def test_rerun_runs_a_stage_once_more_and_what_it_makes_decides(world):
    world.run()
    world.run(rerun=("first",))
    assert world.counted() == (2, 1), "the same was made: the second stage has nothing to do"
    world.run(rerun=("second",))
    assert world.counted() == (2, 2)
    world.run()
    assert world.counted() == (2, 2)


def test_failures_up_to_a_bound_do_not_stop_the_others(world):
    (world.root / "copy.py").write_text(COPY + "target.name == 'a.txt' and sys.exit('no room')")
    first, second = world.stages()
    place = str(world.out / "third/value.txt")
    words = (*first.command[:-2], place, str(world.counts))
    third = replace(
        first, name="third", command=words, outputs=("third/value.txt",), owns=("third",)
    )
    fourth = replace(second, name="fourth", upstream=("second/a",), outputs=("x",), owns=())
    fifth = replace(second, name="fifth", upstream=("fourth",), outputs=("y",), owns=())
    stages = [first, second, third, fourth, fifth]
    runner = world.runner(max_failures=1)
    with pytest.raises(RunFailed, match="stage second/a failed with exit status 1"):
        runner.run(stages, Progress(4, io.StringIO()))
    states = {name: record["status"] for name, record in world.records().items()}
    assert states == {"first": "finished", "second/a": "failed", "third": "finished"}
    assert world.records()["second/a"]["error"].endswith("no room")


def test_expected_seconds_are_those_of_the_stage_or_of_its_kind(world):
    runner = world.run()
    first, second = (replace(stage, kind="k") for stage in world.stages())
    assert runner.expected_seconds(first) is None
    runner.store.update("first", kind="k", seconds=8.0)
    assert runner.expected_seconds(second) == 8.0
    runner.store.update("second/a", kind="k", seconds=2.0)
    assert runner.expected_seconds(second) == 2.0


def test_the_log_ends_with_the_last_state_of_a_progress_bar(world):
    script = "import sys\nfor i in range(200): sys.stderr.write(f'\\rstep {i}')\nsys.exit(3)"
    (world.root / "copy.py").write_text(script)
    with pytest.raises(RunFailed, match="step 199"):
        world.run()
    assert last_line(world.out / "logs/first.log") == "step 199"


def test_progress_shows_what_runs_side_by_side(monkeypatch):
    monkeypatch.setattr("pipeline.run._SHOWN_EVERY_SECONDS", {True: 0.0, False: 0.0})
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((41, 9)))
    for is_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda is_terminal=is_terminal: is_terminal)
        progress = Progress(2, stream)
        progress.show(["random/seed-0 1:05 [##..] 120/700", "fa/seed-0 0:01 "])
        progress.say("[1/2] random/seed-0: finished")
        lines = stream.getvalue().replace("\r\x1b[K", "\n").split("\n")
        live = ["", "random/seed-0 1:05  fa/seed-0 0:01      "]
        plain = ["random/seed-0 1:05 [##..] 120/700 | fa/seed-0 0:01 "]
        assert lines == [*(live if is_terminal else plain), "[1/2] random/seed-0: finished", ""]
