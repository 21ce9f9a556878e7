"""An experiment's run: its options, the checks before its first stage, plan, stages, results.

`run_pipeline`, `ablate` and `run_trials` share this.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import provenance
from common.config import to_plain
from common.errors import EACH, RunFailed, UserError, add_slurm_option, duration, require, whole
from common.files import cache_folder, read_record_or_none, write_json
from pipeline import results
from pipeline.config import PipelineConfig
from pipeline.jobs import SlurmSettings
from pipeline.plan import Stage, digest
from pipeline.run import SAVE_SECONDS, Decision, Limits, Progress, Runner, TimeIsUp, is_named
from pipeline.stages import build_stages, dataset_folder

ROOT = Path(__file__).resolve().parents[1]
CHECKS_FILE = "checks.json"
_MOST_KEPT = 200  # checks of dry runs
_CODE = ("common", "detection", "pipeline", "pretrain", "tools")
# Options of tools/train_voc.sh that its messages name, and the settings that are no `options`.
_OPTION = re.compile(
    r"--(format|classes|train-split|test-split|exif|max-left-out|metric-year|num-gpus|data|seeds)\b"
    r"(?: (stored|\d+))?"
)
_SETTINGS = {"data": "data.dataset", "seeds": "detection.seeds"}


# -- options --------------------------------------------------------------------------------------


def add_run_options(main_parser: argparse.ArgumentParser, max_failures: int) -> None:
    """The options that say how long and where stages run."""
    add = main_parser.add_argument
    text = "run a stage (or a group of them) again though nothing changed"
    add("--rerun", action="append", default=[], metavar="STAGE", help=text)
    text = f"stop in time: {SAVE_SECONDS:g} s before, stages save; exit status 3"
    add("--max-minutes", type=float, metavar="N", help=text)
    text = f"begin nothing more after more than N failures (default: {max_failures})"
    add("--max-failures", type=whole(0), default=max_failures, metavar="N", help=text)
    group = main_parser.add_argument_group("where stages run")
    add = group.add_argument
    text = "slurm: those that can resume are queued through submitit (default: local)"
    add("--cluster", choices=("local", "slurm"), default="local", help=text)
    add("--parallel", type=whole(1), metavar="N", help="stages side by side")
    add("--gpus-per-run", type=whole(0), metavar="N", help="SLURM: of each job (default: 0)")
    add("--cpus-per-run", type=whole(1), metavar="N", help="threads of each, processors of a job")
    text = "SLURM: time limit; then the job is queued again (default: 240)"
    add("--time-minutes", type=whole(1), default=240, metavar="T", help=text)
    add("--partition", metavar="P", help="SLURM partition")
    add_slurm_option(group)


def limits_of(
    options: argparse.Namespace, *, parallel: int = 1, threads: int | None = None, gpus: int = 0,
    minutes: float | None = None,
) -> Limits:  # fmt: skip
    """The limits that the command line asks for; the other arguments hold where it says nothing.

    Raises:
        UserError: For a number that cannot be.
    """
    minutes = minutes if options.max_minutes is None else options.max_minutes
    gpus = gpus if options.gpus_per_run is None else options.gpus_per_run
    require(
        minutes is None or 60 * minutes > SAVE_SECONDS,
        f"--max-minutes {minutes or 0:g}: the last {SAVE_SECONDS:g} s are for saving; give more",
    )
    cluster = None
    if options.cluster == "slurm":
        cpus, further = options.cpus_per_run or 1, tuple(options.slurm_option)
        cluster = SlurmSettings(gpus, cpus, options.time_minutes, options.partition, further)
    return Limits(
        options.parallel or parallel, options.cpus_per_run or threads, options.max_failures,
        tuple(options.rerun), minutes, cluster,
    )  # fmt: skip


# -- checks before the first stage ----------------------------------------------------------------


def check(
    config: PipelineConfig, stages: Sequence[Stage], root: Path, out: Path
) -> dict[str, dict[str, Any]]:
    """Run the checks of some stages, each command once; return what they say, by stage.

    Each program checks its own input (`--check --json`) and says what it would do; what they say is
    then compared: the pretrained backbone with the detector, the pool with the batch, the disk.

    Args:
        config: The settings that the stages were made from.
        stages: Those that will run, or have run.
        root: The repository.
        out: The run's folder. Checks that passed are kept in it, or in the user's cache
            ($FA_CACHE, else .cache here) while it is not there.
    Raises:
        UserError: Naming all that was found.
    """
    # Each program is started once and checks what all its stages would do.
    cache, code = cache_folder(root), code_digest(root)
    before, kept = (kept_checks(folder, code) for folder in (cache, out))
    keys: dict[str, str] = {}  # stage -> key of its check
    by_program: dict[tuple[str, ...], dict[str, Stage]] = defaultdict(dict)
    for stage in stages:
        if stage.check:
            parts = stage.key_parts(root, out, dict.fromkeys(stage.upstream))
            about = {name: parts[name] for name in ("files", "libraries", "code")}
            keys[stage.name] = key = digest(about | {"check": list(stage.check)})
            if key in before:
                kept.setdefault(key, before[key])
            if key not in kept:
                by_program[stage.check[:2]].setdefault(key, stage)
    if by_program:
        print(f"checking settings and data of {sum(map(len, by_program.values()))} stages")
    faults = []
    with ThreadPoolExecutor(provenance.usable_cores()) as threads:
        answers = threads.map(lambda mine: ask(mine, root), by_program.values())
        for mine, told in zip(by_program.values(), answers, strict=True):
            for (key, stage), answer in zip(mine.items(), told, strict=True):
                if "error" in answer:
                    faults.append(f"stage {stage.title}: {answer['error']}")
                else:
                    kept[key] = answer
    facts = {stage: dict(kept[key]) for stage, key in keys.items() if key in kept}
    for note in dict.fromkeys(note for told in facts.values() for note in told.get("notes", ())):
        print(note)
    # The pool is generated, the same number for each seed, or packed from the user's pictures,
    # perhaps in parts.
    made = [told["num_pool"] for told in facts.values() if told.get("num_pool")]
    packed = [told.get("num_pictures") or 0 for name, told in facts.items()
              if name.partition("/")[0] == "shards"]  # fmt: skip
    pool = made[0] if made else sum(packed)
    for stage in stages:
        told = facts.get(stage.name, {})
        if "seconds_per_sample" in told:
            told["num_samples"] = told["num_samples"] or round(pool * stage.config["pool"])
            told["seconds"] = told["epochs"] * told["num_samples"] * told["seconds_per_sample"]
    faults += _contradictions(config, stages, facts, out)
    require(not faults, "nothing was started:\n  " + "\n  ".join(dict.fromkeys(faults)))
    if out.is_dir():
        write_json(out / CHECKS_FILE, {"code": code} | kept)
    elif by_program:
        newest = dict(list((before | kept).items())[-_MOST_KEPT:])
        with contextlib.suppress(OSError):  # a dry run: its next one begins sooner
            write_json(cache / CHECKS_FILE, {"code": code} | newest)
    return facts


def code_digest(root: Path) -> str:
    """A hash of names, sizes and times of this project's modules."""
    paths = sorted(path for name in _CODE for path in (root / name).rglob("*.py"))
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    return digest({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats})


def kept_checks(folder: Path, code: str) -> dict[str, dict[str, Any]]:
    """The answers that a folder keeps, by key; none if other code gave them."""
    told = read_record_or_none(folder / CHECKS_FILE) or {}
    is_current = told.get("code") == code
    return {key: answer for key, answer in told.items() if is_current and isinstance(answer, dict)}


def ask(stages: Mapping[str, Stage], root: Path, **environment: str) -> list[dict[str, Any]]:
    """What the program of some stages says of each of them.

    Args:
        stages: Of one program.
        root: The repository.
        environment: Variables that the program sees besides.
    Raises:
        UserError: If it breaks.
    """
    checks = [stage.check for stage in stages.values()]
    program, words = checks[0][:2], [list(check[2:]) for check in checks]
    done = subprocess.run(
        [*program, EACH], cwd=root, env=os.environ | environment | {"PYTHONPATH": str(root)},
        input=json.dumps(words), capture_output=True, text=True, check=False,
    )  # fmt: skip
    is_detection = all(stage.kind == "detection" for stage in stages.values())
    said = as_settings(done.stdout) if is_detection else done.stdout
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if len(answers) < len(words):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the checks of {Path(program[1]).name} broke: {last}")
    return answers


def as_settings(text: str) -> str:
    """A message of `tools/train_voc.sh` with its options as settings of the experiment."""

    def setting(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return f"{_SETTINGS.get(name, f'detection.options.{name}')}={option[2] or '..'}"

    return _OPTION.sub(setting, text)


def _contradictions(
    config: PipelineConfig, stages: Sequence[Stage], facts: dict[str, Any], out: Path
) -> list[str]:
    """What fits by itself, but not together."""
    of_kind: dict[str, list[tuple[Stage, dict[str, Any]]]] = defaultdict(list)
    for stage in stages:
        if stage.name in facts:
            of_kind[stage.kind].append((stage, facts[stage.name]))
    faults = []
    for stage, backbone in (*of_kind["pretrain"], *of_kind["convert"]) if config.arms else ():
        for _, detector in of_kind["detection"]:
            for name in ("arch", "pixel_mean", "pixel_std", "input_format", "stride_in_1x1"):
                one, other = backbone[name], detector[name]
                if isinstance(one, list):
                    is_same = all(abs(a - b) < 0.01 for a, b in zip(one, other, strict=True))
                else:
                    is_same = one == other
                if not is_same:
                    faults.append(
                        f"{stage.title} makes a backbone with {name} {one}, but detection.config "
                        f"builds {other}; change one of them"
                    )
        branches = backbone.get("branches", [config.convert.branch])
        if config.convert.branch not in branches:
            faults.append(
                f"convert.branch {config.convert.branch}: {stage.title} has only "
                f"{', '.join(branches)}"
            )
    for stage, told in of_kind["pretrain"]:
        if 0 < told["num_samples"] < told["batch_size"]:
            faults.append(
                f"{stage.title}: data.batch_size {told['batch_size']} is more than the "
                f"{told['num_samples']} pictures of the pool"
            )
    # A stage that is stopped and resumed needs no more: checkpoints are replaced.
    needed = sum(told.get("disk_bytes", 0) for told in facts.values())
    place = next(path for path in (out, *out.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        faults.append(
            f"{out}: the stages leave about {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
            "are free; free some space, or choose another --out"
        )
    return faults


# -- the run --------------------------------------------------------------------------------------


def run_experiment(
    config: PipelineConfig,
    out: Path,
    command: list[str],
    limits: Limits,
    *,
    is_dry: bool = False,
    until: str | None = None,
    only: Callable[[str], bool] = lambda stage: True,
    **about: Any,
) -> int:
    """Plan, check and run an experiment; returns the exit status.

    Args:
        config: The experiment.
        out: Its folder.
        command: What a person types to continue.
        limits: How this call runs the stages.
        is_dry: Whether the plan is only shown.
        until: The last stage that this call runs, or a group of them; None: all.
        only: Whether this call runs a stage.
        about: Further keys of the results.
    """
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    require(place.is_dir(), f"{place} is a file; choose another --out")
    stages = build_stages(config, ROOT, out)
    # Repeated with --rerun it would begin again what it has to go on with.
    command = [word for before, word in itertools.pairwise(["", *command])
               if "--rerun" not in (before, word.partition("=")[0])]  # fmt: skip
    runner = Runner(ROOT, out, command, limits)
    held = runner.store.run.get("name")
    if held not in (None, config.name):
        raise UserError(f"{out} holds a run of {held!r}, not {config.name!r}; choose another --out")
    named = [("--rerun", name) for name in limits.rerun]
    named += [] if until is None else [("--until", until)]
    for option, name in named:
        if not any(is_named(stage.name, name) for stage in stages):
            names = ", ".join(stage.name for stage in stages[:20])
            raise UserError(
                f"{option} {name}: the stages are {names}" + ", .." * (len(stages) > 20)
            )
    last = max(n for n, s in enumerate(stages) if until is None or is_named(s.name, until))
    chosen = [stage for stage in stages[: last + 1] if only(stage.name)]
    if is_dry:
        decisions, facts = runner.plan(stages), check(config, chosen, ROOT, out)
        seconds = {stage.name: runner.expected_seconds(stage)
                   or facts.get(stage.name, {}).get("seconds") for stage in chosen}  # fmt: skip
        print_plan(chosen, decisions, seconds)
        return 0

    def before_first(decisions: Mapping[str, Decision]) -> None:
        check(config, chosen, ROOT, out)
        runner.store.open_run(
            config.name,
            plan=[stage.name for stage in stages],
            arms=list(config.arms),
            tables=[to_plain(table) for table in config.all_tables],
            config=to_plain(config),
            command=command,
            parallel=limits.parallel,
            dataset=os.path.relpath(dataset_folder(config, out, config.seeds.first), out),
            **provenance.describe(ROOT),
        )

    try:
        runner.run(
            stages, Progress(len(chosen)), chosen={stage.name for stage in chosen},
            before_first=before_first, after_each=lambda: results.write(out, **about),
        )  # fmt: skip
    except (TimeIsUp, RunFailed) as error:
        # The report's stage did not come: a page of what there is. If it came and failed, its own
        # message counts.
        from pipeline.report import report

        made = runner.store.stages.get("report", {})
        if not (made.get("current") and made["status"] == "failed"):
            report.write(out)
            if made:  # the page is no longer the stage's
                runner.store.update("report", status="stopped")
        if isinstance(error, TimeIsUp):
            print(error)
            return 3
        print(closing_lines(out))
        raise
    print(closing_lines(out))
    return 0


def print_plan(
    stages: Sequence[Stage],
    decisions: Mapping[str, Decision],
    seconds: Mapping[str, float | None],
) -> None:
    """Print what a run would do, a line for each stage, and how long what is known of it takes."""
    for stage in stages:
        decision, known = decisions[stage.name], seconds[stage.name]
        time = "-" if known is None else duration(known)
        print(f"{decision.action:<6}  {stage.title:<26}  {time:>11}  {decision.reason}")
    todo = [seconds[stage.name] for stage in stages if decisions[stage.name].action != "skip"]
    total, num_unknown = sum(filter(None, todo)), todo.count(None)
    unknown = f", without {num_unknown} of unknown time (-)" * (num_unknown > 0)
    stages_to_do = f"{len(todo)} stage{'s' * (len(todo) > 1)} to do"
    text = f"{stages_to_do}: about {duration(total)} added up{unknown}"
    print(text if todo else "nothing to do")


def closing_lines(out: Path) -> str:
    """Return what a person wants to know at the end."""
    found = results.assemble(out)
    lines = ["", *([found["question"]] if found.get("question") else [])]
    lines += [f"{told['answer']} {told['text']}" for told in results.findings(found)]
    lines += [f"warning: {item['file']} {item['fault']}" for item in found["damaged"]]
    names = ("results.json", "report.html")
    return "\n".join([*lines, *(str(out / name) for name in names if (out / name).exists())])
