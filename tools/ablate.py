"""Run grids of pretraining runs over seeds, compare their cells, and write tables and plots."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common import provenance
from common.errors import UserError, run_command
from pipeline.grid import data, study
from pipeline.grid.grid import METRICS, Plan, Preset, make_plan, read_grid, read_preset
from pipeline.grid.jobs import Executor
from pipeline.grid.schedule import (
    FOLDER,
    Key,
    Store,
    Work,
    add_run_options,
    check_run_options,
    exit_status,
    run_work,
)
from pipeline.stages import lock

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "configs/studies/presets"
EXAMPLE = """\
examples:
  .venv/bin/python tools/ablate.py configs/studies/*.yaml --preset reproduce-cpu --out runs/study
  .venv/bin/python tools/ablate.py configs/studies/stop_gradient.yaml --out runs/study --list
  .venv/bin/python tools/ablate.py configs/studies/*.yaml --preset reproduce-gpu --out runs/gpu \\
      --cluster slurm --parallel 16 --partition gpu --slurm-option account=vision

Cells that several grids share run once. The same command goes on where the last one stopped.
DIR/job_results holds every run, DIR/results.json and DIR/tables.md what they say.
Exit status: 0 all is finished; 1 runs failed; 2 wrong arguments or input; 3 time is up, call it
again; 128 + number: stopped by a signal. docs/pipeline.md explains grids, presets and verdicts.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    main_parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = main_parser.add_argument
    add("grids", nargs="+", type=Path, metavar="GRID.yaml", help="of configs/studies/")
    add("--preset", default="reproduce-cpu", metavar="NAME",
        help="scale of the study: a file of configs/studies/presets/, or a path "
        "(default: reproduce-cpu)")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    add("--data", metavar="NAME", help="which of the preset's sets (default: its first)")
    add("--metrics", metavar="A,B", help=f"of {', '.join(METRICS)} (default: the preset's)")
    add("--seeds", type=int, metavar="N", help="seeds 0..N-1 (default: the preset's)")
    add("--only", action="append", default=[], metavar="TEXT",
        help="run only cells with this in their grid or levels; may be repeated")  # fmt: skip
    add("--list", action="store_true", help="show the cells and what is done, and stop")
    add_run_options(main_parser)
    return main_parser


def main(arguments: Sequence[str] | None = None, executor: Executor | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        arguments: Of the command line.
        executor: Takes the runs instead of submitit; for tests.
    """
    started = time.monotonic()
    options = parser().parse_args(arguments)
    options.out = options.out.resolve()

    def work() -> int:
        with lock(options.out):
            return _run(options, executor, started)

    return run_command(work)


def _run(options: argparse.Namespace, executor: Executor | None, started: float) -> int:
    preset, set_name = chosen_preset(options)
    grids = [read_grid(path, preset.name) for path in options.grids]
    folder = options.out / "data" / set_name
    prepared = data.prepare(set_name, preset.sets[set_name], folder)
    plan = make_plan(grids, preset, prepared)
    work = {
        (name, seed): study.make_work(cell, seed, options.out, ROOT, prepared, preset.metrics)
        for seed in range(preset.seeds)
        for name, cell in plan.cells.items()
    }
    check_cells(plan, work)
    store = Store(options.out / FOLDER)
    for key in work:
        cell = plan.cells[key[0]]
        store.plan(key, cell.label, cell.axes, cell.settings)
    if options.list:
        show_list(plan, preset, store)
        return 0
    todo = [item for item in work.values() if is_due(store, item, plan, preset, options)]
    outcome = run_work(
        *(todo, store, options, executor, started),
        parallel=preset.parallel, gpus=preset.gpus, max_minutes=preset.max_minutes,
    )  # fmt: skip
    about = provenance.describe(ROOT)
    found = study.summarise(plan, store.rows(), preset, set_name, about)
    for path in study.write(options.out, found):
        print(path)
    return exit_status(outcome, found["counts"])


def chosen_preset(options: argparse.Namespace) -> tuple[Preset, str]:
    """The preset with the command line's changes, and the name of the set.

    Raises:
        UserError: For what does not exist.
    """
    path = PRESETS / f"{options.preset}.yaml"
    if not path.is_file():
        path = Path(options.preset)
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
            raise UserError(f"--preset {options.preset}: no such preset; there are {known}")
    preset = read_preset(path)
    set_name = options.data or next(iter(preset.sets))
    if set_name not in preset.sets:
        raise UserError(f"--data {set_name}: {preset.name} has {', '.join(preset.sets)}")
    metrics = tuple(options.metrics.split(",")) if options.metrics else preset.metrics
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics {unknown[0]}: give some of {', '.join(METRICS)}")
    check_run_options(options)
    seeds = options.seeds or preset.seeds
    return replace(preset, metrics=metrics, seeds=seeds), set_name


def check_cells(plan: Plan, work: dict[Key, Work]) -> None:
    """Refuse, before any run, every cell whose config does not load or that cannot train.

    Raises:
        UserError: Naming them all.
    """
    from pretrain.config import load_config

    refused = []
    for name, cell in plan.cells.items():
        command = work[name, 0].steps[0].command
        try:
            load_config(command[2], [word for word in command[3:] if "=" in word])
        except UserError as error:
            refused.append(f"{'/'.join(cell.axes)}: {cell.label}: {error}")
    if refused:
        raise UserError("cells that cannot run (name them in left_out):\n  " + "\n  ".join(refused))


def is_due(
    store: Store, work: Work, plan: Plan, preset: Preset, options: argparse.Namespace
) -> bool:
    """Whether a cell is to be run by this call; one that lacks a metric asked for is."""
    row = store.row(work.key)
    if options.only:
        names = [
            text
            for grid, levels in plan.cells[row.fingerprint].axes.items()
            for text in (grid, ", ".join(levels.values()))
        ]
        if not any(part in name for part in options.only for name in names):
            return False
    if row.status == "failed":
        return options.retry_failed
    has_all = all(step.product.exists() for step in work.steps)
    return row.status != "finished" or not has_all or not set(preset.metrics) <= set(row.metrics)


def show_list(plan: Plan, preset: Preset, store: Store) -> None:
    """Print grids, cells, and the status of each seed."""
    for grid in plan.grids:
        print(f"{grid.name}: {grid.title}")
        for axes, _ in grid.cells():
            name = plan.fingerprint(grid, axes)
            states = [store.row((name, seed)).status for seed in range(preset.seeds)]
            others = [other for other in plan.cells[name].axes if other != grid.name]
            shared = f"  (also in {', '.join(others)})" if others else ""
            print(f"  {name[:12]}  {', '.join(axes.values())}: {' '.join(states)}{shared}")
        for cells, reason in grid.left_out:
            print(f"  left out: {', '.join(cells.values())}: {reason}")
    print(f"{len(plan.cells)} cells x {preset.seeds} seeds = {len(plan.cells) * preset.seeds} runs")


if __name__ == "__main__":
    sys.exit(main())
