"""What `run_pipeline`, `ablate` and `run_trials` share: their options, and an experiment's run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import provenance
from common.config import to_plain
from common.errors import RunFailed, UserError, add_slurm_option, require
from pipeline import check, results
from pipeline.config import PipelineConfig
from pipeline.jobs import SlurmSettings
from pipeline.plan import build_stages, dataset_folder
from pipeline.progress import Progress, clock
from pipeline.run import SAVE_SECONDS, Decision, Limits, Runner, TimeIsUp, is_named

ROOT = Path(__file__).resolve().parents[1]


def add_run_options(main_parser: argparse.ArgumentParser, max_failures: int) -> None:
    """The options that say how long and where stages run."""
    add = main_parser.add_argument
    add(
        "--rerun",
        action="append",
        default=[],
        metavar="STAGE",
        help="run a stage (or a group of them) again though nothing changed; may be repeated",
    )
    add("--max-minutes", type=float, metavar="N",
        help=f"stop in time: {SAVE_SECONDS:g} s before, stages save; exit status 3")  # fmt: skip
    add(
        "--max-failures",
        type=int,
        default=max_failures,
        metavar="N",
        help=f"begin nothing more after more than N failures (default: {max_failures})",
    )
    group = main_parser.add_argument_group("where stages run")
    add = group.add_argument
    add(
        "--cluster",
        choices=("local", "slurm"),
        default="local",
        help="slurm: those that can resume are queued through submitit (default: local)",
    )
    add("--parallel", type=int, metavar="N", help="stages side by side")
    add("--gpus-per-run", type=int, metavar="N", help="SLURM: of each job (default: 0)")
    add("--cpus-per-run", type=int, metavar="N", help="threads of each, processors of a job")
    add("--time-minutes", type=int, default=240, metavar="T",
        help="SLURM: time limit; then the job is queued again (default: 240)")  # fmt: skip
    add("--partition", metavar="P", help="SLURM partition")
    add_slurm_option(group)


def limits_of(options: argparse.Namespace, **defaults: Any) -> Limits:
    """The limits that the command line asks for; `defaults` hold where it says nothing.

    Raises:
        UserError: For a number that cannot be.
    """
    least = {"seeds": 1, "parallel": 1, "cpus_per_run": 1, "time_minutes": 1, "gpus_per_run": 0}
    for name, smallest in (least | {"max_failures": 0}).items():
        value = getattr(options, name, None)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {smallest} or more")
    gpus = defaults.pop("gpus", 0)
    gpus = gpus if options.gpus_per_run is None else options.gpus_per_run
    given = {
        "parallel": options.parallel,
        "threads": options.cpus_per_run,
        "minutes": options.max_minutes,
    }
    chosen = defaults | {key: value for key, value in given.items() if value is not None}
    minutes = chosen.get("minutes")
    require(
        minutes is None or 60 * minutes > SAVE_SECONDS,
        f"--max-minutes {minutes or 0:g}: the last {SAVE_SECONDS:g} s are for saving; give more",
    )
    cluster = None
    if options.cluster == "slurm":
        cpus, further = options.cpus_per_run or 1, tuple(options.slurm_option)
        cluster = SlurmSettings(gpus, cpus, options.time_minutes, options.partition, further)
    return Limits(
        **chosen, rerun=tuple(options.rerun), max_failures=options.max_failures,
        retry_failed=getattr(options, "retry_failed", True),
        cluster=cluster,
    )  # fmt: skip


def run_experiment(
    config: PipelineConfig,
    out: Path,
    command: list[str],
    limits: Limits,
    write: Callable[[], None],
    *,
    is_dry: bool = False,
    until: str | None = None,
    only: Callable[[str], bool] = lambda stage: True,
    has_report: bool = False,
    config_file: str = "",
) -> int:
    """Plan, check and run an experiment; returns the exit status.

    Args:
        config: The experiment.
        out: Its folder.
        command: What a person types to continue.
        limits: How this call runs the stages.
        write: Writes results and tables; called after every stage.
        is_dry: Whether the plan is only shown.
        until: The last stage that this call runs, or a group of them; None: all.
        only: Whether this call runs a stage.
        has_report: Whether a page is written.
        config_file: Where the settings come from, for the page.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder")
    stages = build_stages(config, ROOT, out, has_report=has_report)
    runner = Runner(ROOT, out, command, limits)
    held = runner.store.run.get("name")
    if held not in (None, config.name):
        raise UserError(
            f"{out} holds a run of the pipeline {held!r}, not {config.name!r}; choose another --out"
        )
    named = [("--rerun", name) for name in limits.rerun]
    named += [("--until", until)] if until is not None else []
    for option, name in named:
        if not any(is_named(stage.name, name) for stage in stages):
            names = ", ".join(stage.name for stage in stages[:20])
            raise UserError(
                f"{option} {name}: the stages are {names}" + ", .." * (len(stages) > 20)
            )
    last = max(n for n, s in enumerate(stages) if until is None or is_named(s.name, until))
    chosen = [stage for stage in stages[: last + 1] if only(stage.name)]
    if is_dry:
        decisions = runner.plan(stages)
        facts = check.check(config, chosen, ROOT, out)
        total = 0.0
        for stage in chosen:
            decision = decisions[stage.name]
            seconds = runner.expected_seconds(stage) or facts.get(stage.name, {}).get("seconds")
            total += (seconds or 0.0) * (decision.action != "skip")
            time = "-" if seconds is None else clock(seconds)
            print(f"{decision.action:<6}  {stage.title:<26}  {time:>8}  {decision.reason}")
        print(f"about {clock(total)} added up, but for stages whose time is not known (-)")
        return 0

    def before_first(decisions: Mapping[str, Decision]) -> None:
        check.check(config, chosen, ROOT, out, print)
        runner.store.open_run(
            config.name,
            plan=[stage.name for stage in stages],
            arms=list(config.arms),
            tables=[to_plain(table) for table in config.all_tables],
            config=to_plain(config),
            config_file=config_file,
            command=command,
            parallel=limits.parallel,
            dataset=os.path.relpath(dataset_folder(config, out), out),
            **provenance.describe(ROOT),
        )

    try:
        runner.run(
            stages, Progress(len(chosen)), chosen={stage.name for stage in chosen},
            before_first=before_first, after_each=write,
        )  # fmt: skip
    except TimeIsUp as error:
        print(error)
        return 3
    except RunFailed:
        print(closing_lines(runner))
        raise
    print(closing_lines(runner))
    return 0


def closing_lines(runner: Runner) -> str:
    """Return what a person wants to know at the end."""
    records = [record for record in runner.store.stages.values() if record.get("current")]
    seconds = sum(record.get("seconds") or 0.0 for record in records)
    peak = max((record.get("peak_memory_bytes") or 0 for record in records), default=0)
    lines = [f"\nstages: {clock(seconds)} added up, peak memory of one {peak / 2**30:.2f} GiB"]
    lines += results.verdicts(results.assemble(runner.out))
    for name in ("results.json", "tables.md", "report.html"):
        if (runner.out / name).exists():
            lines.append(f"{name.partition('.')[0]}: {runner.out / name}")
    return "\n".join(lines)
