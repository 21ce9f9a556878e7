"""Pretrain, convert, fine-tune, compare with random initialisation, report.

Examples:
  bash tools/run_pipeline.sh --images my_pictures --labels my_labelled_pictures
  bash tools/run_pipeline.sh demo
  bash tools/run_pipeline.sh demo detection.seeds=5
  bash tools/run_pipeline.sh compare --out runs/compare seeds.pretraining=5
  bash tools/run_pipeline.sh smoke --dry-run

A finished stage is skipped while nothing that it depends on has changed; a stopped or failed run
goes on where it stopped when the same command is given again (docs/pipeline.md).
Exit status: 0 done; 1 a stage failed; 2 wrong arguments or input; 3 time is up; 128 + number:
stopped by a signal.
"""

import argparse
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from common import provenance
from common.config import find_config
from common.errors import command_parser, run_command
from common.files import write_text
from pipeline.auto import BUDGETS, YAML_FILE, prepare
from pipeline.config import load_config
from pipeline.experiment import ROOT, add_run_options, limits_of, run_experiment
from pipeline.run import side_by_side


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline; returns the exit status."""
    parser = command_parser(__doc__, prog="bash tools/run_pipeline.sh")
    add = parser.add_argument
    add("config", nargs="?", help="smoke, demo, photos, compare, or a YAML of one's own; none with "
        "--labels")  # fmt: skip
    add("overrides", nargs="*", metavar="key=value", help="settings to change")
    add("--out", metavar="DIR", help="folder of the run (default: runs/<name>)")
    own = parser.add_argument_group("two folders instead of a YAML, which is written into the run")
    add_own = own.add_argument
    add_own("--images", type=Path, metavar="DIR", help="pictures for pretraining, labelled or not "
            "(default: the labelled ones)")  # fmt: skip
    add_own("--labels", type=Path, metavar="DIR", help="labelled pictures as LabelImg, CVAT, "
            "Roboflow, Label Studio, COCO or YOLO tools write them, or a VOC devkit")  # fmt: skip
    add_own("--budget", choices=tuple(BUDGETS), help="of the whole run: 10 minutes (default), an "
            "hour, 10 hours; sizes and schedules are chosen for this machine")  # fmt: skip
    add("--dry-run", action="store_true", help="check everything; show what would run, and why")
    add("--until", metavar="STAGE", help="stop after this stage (or group of them)")
    add_run_options(parser, max_failures=0)
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    if options.labels is not None and options.config is not None:
        if "=" not in options.config:
            parser.error(f"{options.config}: give a YAML or preset, or --labels DIR, not both")
        options.overrides, options.config = [options.config, *options.overrides], None
    if options.labels is None and (options.images or options.budget):
        parser.error("--images and --budget go with --labels DIR, the labelled pictures")
    if options.labels is None and options.config is None:
        parser.error("give a preset, a YAML, or --images DIR --labels DIR")
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Run the stages of an experiment that a YAML holds, or show what would run."""
    if options.labels is not None:
        out = Path(options.out or Path("runs") / options.labels.absolute().name).absolute()
        text = prepare(
            options.images, options.labels, out, options.budget or "quick", options.overrides,
            is_dry=options.dry_run,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            path = out / YAML_FILE
            if options.dry_run:  # which writes nothing there
                path = Path(folder, YAML_FILE)
                write_text(path, text)
            config = load_config(path)
    else:
        config = load_config(find_config(options.config, "pipeline"), options.overrides)
        out = Path(options.out or Path("runs") / config.name).absolute()
    parallel = side_by_side(config.detection.parallel, len(config.arms) or len(config.all_variants))
    limits = limits_of(options, parallel=parallel)
    if limits.parallel > 1 and limits.threads is None:
        limits = replace(limits, threads=max(1, provenance.usable_cores() // limits.parallel))
    status = run_experiment(
        config, out, ["bash", os.path.relpath(ROOT / "tools/run_pipeline.sh"), *sys.argv[1:]],
        limits, is_dry=options.dry_run, until=options.until,
    )  # fmt: skip
    if status == 0 and config.arms and not (options.dry_run or options.until):
        python, program = (os.path.relpath(x) for x in (sys.executable, ROOT / "tools/predict.py"))
        words = shlex.join([python, program, os.path.relpath(out)])
        print(f"boxes on other pictures: {words} PICTURES --out DIR")
    return status


if __name__ == "__main__":
    sys.exit(main())
