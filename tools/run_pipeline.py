"""Command line of the pipeline: parses, runs the stages, writes results.json, names the report."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from common import provenance
from common.config import find_config
from common.errors import command_parser, run_command
from pipeline.config import load_config
from pipeline.experiment import ROOT, add_run_options, limits_of, run_experiment
from pipeline.run import side_by_side

EPILOG = """\
examples:
  bash tools/run_pipeline.sh demo
  bash tools/run_pipeline.sh demo detection.seeds=5
  bash tools/run_pipeline.sh compare --out runs/compare seeds.pretraining=5
  bash tools/run_pipeline.sh smoke --dry-run

A finished stage is skipped while nothing that it depends on has changed; a stopped or failed run
goes on where it stopped when the same command is given again (docs/pipeline.md).
Exit status: 0 done; 1 a stage failed; 2 wrong arguments or input; 3 time is up; 128 + number:
stopped by a signal.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline; returns the exit status."""
    parser = command_parser(
        "Pretrain, convert, fine-tune, compare with random initialisation, report.",
        EPILOG,
        prog="bash tools/run_pipeline.sh",
    )
    add = parser.add_argument
    add("config", help="smoke, demo, compare, photos, or a YAML of one's own")
    add("overrides", nargs="*", metavar="key=value", help="settings to change")
    add("--out", metavar="DIR", help="folder of the run (default: runs/<name>)")
    add("--dry-run", action="store_true", help="check everything; show what would run, and why")
    add("--until", metavar="STAGE", help="stop after this stage (or group of them)")
    add_run_options(parser, max_failures=0)
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Run the stages of an experiment that a YAML holds, or show what would run."""
    config = load_config(find_config(options.config, "pipeline"), options.overrides)
    out = Path(options.out or Path("runs") / config.name).absolute()
    parallel = side_by_side(config.detection.parallel, len(config.arms) or len(config.all_variants))
    limits = limits_of(options, parallel=parallel)
    if limits.parallel > 1 and limits.threads is None:
        limits = replace(limits, threads=max(1, provenance.usable_cores() // limits.parallel))
    return run_experiment(
        config, out, ["bash", os.path.relpath(ROOT / "tools/run_pipeline.sh"), *sys.argv[1:]],
        limits, is_dry=options.dry_run, until=options.until,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
