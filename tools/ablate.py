"""Run grids of pretraining runs over seeds, compare their cells, and write tables and plots.

Examples:
  .venv/bin/python tools/ablate.py configs/studies/*.yaml --preset reproduce-cpu --out runs/study
  .venv/bin/python tools/ablate.py stop_gradient --out runs/study --list

The same command goes on where the last one stopped. DIR/report.html shows what came out.
Exit status: 0 all is finished; 1 runs failed; 2 wrong arguments or input; 3 time is up, call it
again; 128 + number: stopped by a signal. docs/pipeline.md explains grids, presets and verdicts.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.config import find_config, read_settings
from common.errors import command_parser, require, run_command, unknown, whole
from pipeline import study
from pipeline.experiment import add_run_options, limits_of, run_experiment
from pipeline.study import METRICS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("grids", nargs="+", metavar="GRID", help="a file, or a preset of configs/studies/")
    add("--preset", default="reproduce-cpu", metavar="NAME",
        help="scale of the study: a file of configs/studies/presets/, or a path "
        "(default: reproduce-cpu)")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    add("--data", metavar="NAME", help="which of the preset's sets (default: its first)")
    add("--metrics", metavar="A,B", help=f"of {', '.join(METRICS)} (default: the preset's)")
    add("--seeds", type=whole(1), metavar="N", help="how many seeds (default: the preset's)")
    add("--first-seed", type=int, metavar="N", help="the lowest seed (default: the preset's, 0)")
    add("--only", action="append", default=[], metavar="TEXT",
        help="run only cells with this in their grid or levels; may be repeated")  # fmt: skip
    add("--list", action="store_true", help="check the cells, show what would run, and stop")
    add_run_options(parser, max_failures=3)
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Make an experiment of the grids and run it."""
    path = find_config(options.preset, "studies/presets")
    grids = [find_config(name, "studies", "*.yaml") for name in options.grids]
    preset = read_settings(study.Preset, path)
    data = options.data or next(iter(preset.sets))
    require(data in preset.sets, f"--data: {unknown(f'set {data}', data, preset.sets)}")
    metrics = tuple(options.metrics.split(",")) if options.metrics else preset.metrics
    for name in metrics:
        require(name in METRICS, f"--metrics: {unknown(f'metric {name}', name, METRICS)}")
    limits = limits_of(
        options, parallel=preset.parallel, threads=1, gpus=preset.gpus, minutes=preset.max_minutes
    )
    first = preset.first_seed if options.first_seed is None else options.first_seed
    seeds = options.seeds or preset.seeds
    preset = replace(preset, metrics=metrics, seeds=seeds, first_seed=first)
    config = study.make_config(grids, preset, path, data)
    chosen = study.chosen_variants(config, options.only)
    out = options.out.resolve()

    def is_chosen(stage: str) -> bool:
        """Stages that belong to no cell run in any case."""
        variants = [name for name in chosen if name in stage.split("/")]
        return not options.only or all(chosen[name] for name in variants)

    return run_experiment(
        config, out, [sys.executable, *sys.argv], limits, is_dry=options.list, only=is_chosen
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
