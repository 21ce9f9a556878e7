"""List the pretraining runs below a folder, compare some of them, or join seeds of several.

Examples:
  .venv/bin/python tools/runs.py list runs --sort knn_top1 --json
  .venv/bin/python tools/runs.py compare runs/first runs/second
  .venv/bin/python tools/runs.py join here/results.json there/results.json --out all.json

Exit status: 0 done; 2 wrong arguments or input. docs/running.md says what the columns mean.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from common.errors import UserError, command_parser, run_command
from common.files import finite, write_json
from pipeline.report import runs
from pipeline.report.charts import short_number
from pipeline.report.runs import FIGURES, RunInfo
from pipeline.results import findings, join

SORT_KEYS = ("run", "state", "updated", *FIGURES)
COLUMNS = {
    "step": "step", "epoch": "epoch", "epochs": "of", "loss": "loss", "knn_top1": "kNN",
    "online_top1": "online", "images_per_second": "img/s", "data_wait_share": "wait",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for wrong arguments or input."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("list", help="a line for each run: state, position, figures")
    add.set_defaults(work=_list)
    add.add_argument("folder", type=Path, metavar="FOLDER", help="folder that holds the runs")
    add.add_argument("--sort", choices=SORT_KEYS, default="run", metavar="KEY",
        help=f"one of {', '.join(SORT_KEYS)}; numbers highest first (default: run)")  # fmt: skip
    add.add_argument("--json", action="store_true", help="print JSON")
    add = commands.add_parser("compare", help="config keys that differ, figures")
    add.set_defaults(work=_compare)
    add.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    add.add_argument("--json", action="store_true", help="print JSON")
    add = commands.add_parser("join", help="judge the seeds of several runs of one experiment")
    add.set_defaults(work=_join)
    add.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results.json of a run")
    add.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it is written")
    options = parser.parse_args(arguments)
    return run_command(lambda: options.work(options))


def _list(options: argparse.Namespace) -> None:
    folder, key = options.folder, options.sort
    # Text in the order of the alphabet; numbers highest first, then runs without one.
    values = [(run.as_json()[key], run) for run in map(runs.read, runs.find(folder))]
    if key in ("run", "state"):
        values.sort(key=lambda pair: str(pair[0]))
    else:
        values.sort(key=lambda pair: (pair[0] is None, -(pair[0] or 0)))
    listed = {str(run.folder.relative_to(folder)): run for _, run in values}
    if options.json:
        print(json.dumps(finite([run.as_json() for run in listed.values()]), indent=1))
        return
    if not listed:
        print(f"{folder}: no runs")
        return
    print(table(_figure_rows("run", listed)))
    for name, run in listed.items():
        if run.state not in ("finished", "running"):
            print(f"{name}: {run.state}: {run.reason}")
    _print_problems(listed)


def _compare(options: argparse.Namespace) -> None:
    folders = options.folders
    if len(folders) < 2:
        raise UserError("compare needs at least two runs, e.g. compare runs/first runs/second")
    compared = {str(folder): runs.read(folder) for folder in folders}
    differing = runs.differences(list(compared.values()))
    if options.json:
        plain = [run.as_json() for run in compared.values()]
        print(json.dumps(finite({"runs": plain, "config": differing}), indent=1, default=str))
        return
    print(table(list(zip(*_figure_rows("", compared), strict=True))))
    print("\nconfig keys that differ:" if differing else "\nthe configs are the same")
    print(table([[key, *map(str, values)] for key, values in differing.items()]))
    _print_problems(compared)


def _join(options: argparse.Namespace) -> None:
    joined = join(options.files)
    write_json(options.out, joined)
    for told in findings(joined):
        print(told["answer"], told["text"])
    print(options.out)


def _figure_rows(corner: str, named: Mapping[str, RunInfo]) -> list[list[str]]:
    """A head and a row for each run: name, state, figures, commit, time of the last row."""
    rows = [[corner, "state", *COLUMNS.values(), "commit", "last row"]]
    for name, run in named.items():
        figures = [run.figures[key] for key in COLUMNS]
        texts = ["-" if x is None else short_number(x) for x in figures]
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.updated)) if run.updated else "-"
        rows.append([name, run.state, *texts, run.commit[:10] if run.commit else "-", when])
    return rows


def _print_problems(named: Mapping[str, RunInfo]) -> None:
    for name, run in named.items():
        for problem in run.problems:
            print(f"{name}: {problem}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first one to the left, the others to the right."""
    sides = ["left", *["right"] * (len(rows[0]) - 1)] if rows else None
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)


if __name__ == "__main__":
    sys.exit(main())
