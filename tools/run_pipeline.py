"""Command line of the pipeline: parses, runs the stages, writes results.json, names the report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common import provenance
from common.config import to_plain
from common.errors import RunFailed, UserError, run_command
from pipeline import results
from pipeline.config import PipelineConfig, load_config
from pipeline.plan import build_stages, dataset_folder
from pipeline.progress import Progress, clock
from pipeline.run import Runner, side_by_side
from pipeline.stages import Stage

ROOT = Path(__file__).resolve().parents[1]
EPILOG = """\
examples:
  bash tools/run_pipeline.sh demo
  bash tools/run_pipeline.sh demo detection.seeds=5
  bash tools/run_pipeline.sh photos --out runs/first pretrain.overrides.optim.epochs=40
  bash tools/run_pipeline.sh smoke --dry-run

A finished stage is skipped while nothing that it depends on has changed; a stopped or failed run
goes on where it stopped when the same command is given again. docs/pipeline.md tells the rest.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline; returns the exit status (0 done, 1 a stage failed, 2 wrong input)."""
    parsed = parse(arguments)
    return run_command(lambda: run(parsed))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bash tools/run_pipeline.sh",
        description="Pretrain, convert, fine-tune, compare with random initialisation, report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="smoke, demo, photos, or a pipeline YAML of one's own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<name>)")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and why")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage (or group of them)")
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    parsed.overrides += rest
    return parsed


def run(parsed: argparse.Namespace) -> int:
    """Build the stages and run them, or show what would run."""
    path = config_path(parsed.config)
    config = load_config(path, parsed.overrides)
    out = Path(parsed.out or Path("runs") / config.name).absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder")
    stages = build_stages(config, ROOT, out)
    until = last_stage(stages, parsed.until)
    command = ["bash", os.path.relpath(ROOT / "tools/run_pipeline.sh"), *sys.argv[1:]]
    parallel = side_by_side(config.detection.parallel, len(config.detection.arms))
    runner = Runner(ROOT, out, command, parallel)
    runner.store.check_name(config.name)
    if parsed.dry_run:
        return show_plan(runner, stages, until)
    shown = stages.index(next(s for s in stages if s.name == until)) + 1
    try:
        runner.run(
            stages,
            Progress(shown),
            until=until,
            before_first=lambda: describe(runner, config, path, command),
            after_each=lambda: results.write(out),
        )
    except RunFailed:
        print(closing_lines(runner, out))
        raise
    print(closing_lines(runner, out))
    return 0


def config_path(name: str) -> Path:
    """Return the YAML of a preset's name or a path.

    Raises:
        UserError: If there is neither.
    """
    preset = ROOT / "configs/pipeline" / f"{name}.yaml"
    if preset.is_file() and "/" not in name:
        return preset
    if Path(name).is_file():
        return Path(name)
    names = sorted(file.stem for file in preset.parent.glob("*.yaml"))
    raise UserError(f"{name} is neither a preset ({', '.join(names)}) nor a YAML file")


def last_stage(stages: list[Stage], until: str | None) -> str:
    """Return the name of the last stage to run; `random` means the last of `random/...`.

    Raises:
        UserError: If no stage is called so.
    """
    if until is None:
        return stages[-1].name
    found = [s.name for s in stages if s.name == until or s.name.startswith(f"{until}/")]
    if not found:
        raise UserError(f"--until {until}: the stages are {', '.join(s.name for s in stages)}")
    return found[-1]


def show_plan(runner: Runner, stages: list[Stage], until: str) -> int:
    """Print what each stage would do, and why."""
    for name, decision in runner.plan(stages).items():
        print(f"{decision.action:<6}  {name:<26}  {decision.reason}")
        if name == until:
            break
    return 0


def describe(runner: Runner, config: PipelineConfig, path: Path, command: list[str]) -> None:
    """Write what this run is into its folder."""
    runner.store.open_run(
        config.name,
        config=to_plain(config),
        config_file=path.name,
        command=command,
        parallel=runner.parallel,
        dataset=os.path.relpath(dataset_folder(config, runner.out), runner.out),
        **provenance.describe(ROOT),
    )


def closing_lines(runner: Runner, out: Path) -> str:
    """Return what a person wants to know at the end."""
    records = runner.store.stages.values()
    seconds = sum(record.get("seconds") or 0.0 for record in records if record.get("current"))
    peak = max((record.get("peak_memory_bytes") or 0 for record in records), default=0)
    lines = [f"\nstages: {clock(seconds)} added up, peak memory of one {peak / 2**30:.2f} GiB"]
    lines += results.verdicts(results.assemble(out))
    for name in ("results.json", "report.html"):
        if (out / name).exists():
            lines.append(f"{name.partition('.')[0]}: {out / name}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
