"""List the pretraining runs below a folder, or compare some of them."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, run_command
from common.files import finite
from pipeline.report import runs
from pipeline.report.charts import short_number
from pipeline.report.runs import FIGURES, RunInfo

EXAMPLE = """\
examples:
  .venv/bin/python tools/runs.py list runs
  .venv/bin/python tools/runs.py list runs --sort knn_top1 --json
  .venv/bin/python tools/runs.py compare runs/first runs/second

Exit status: 0 done; 2 wrong arguments or input. docs/watching_runs.md says what the columns mean.
"""
DASH = "-"
SORT_KEYS = ("run", "state", "updated", *FIGURES)
COLUMNS = {
    "step": "step", "epoch": "epoch", "epochs": "of", "loss": "loss", "knn_top1": "kNN",
    "online_top1": "online", "images_per_second": "img/s", "data_wait_share": "wait",
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    main_parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("list", help="a line for each run: state, position, figures")
    add.add_argument("folder", type=Path, metavar="FOLDER", help="folder that holds the runs")
    add.add_argument("--sort", choices=SORT_KEYS, default="run", metavar="KEY",
        help=f"one of {', '.join(SORT_KEYS)}; numbers highest first (default: run)")  # fmt: skip
    add.add_argument("--json", action="store_true", help="print JSON")
    add = commands.add_parser("compare", help="config keys that differ, figures")
    add.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    add.add_argument("--json", action="store_true", help="print JSON")
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for wrong arguments or input."""
    options = parser().parse_args(arguments)

    def work() -> int:
        if options.command == "list":
            _list(options.folder, options.sort, as_json=options.json)
        else:
            _compare(options.folders, as_json=options.json)
        return 0

    return run_command(work)


def _list(folder: Path, key: str, *, as_json: bool) -> None:
    found = sorted_runs([runs.read(place) for place in runs.find(folder)], key)
    if as_json:
        print(json.dumps(finite([run.as_json() for run in found]), indent=1))
    elif not found:
        print(f"{folder}: no runs")
    else:
        names = [str(run.folder.relative_to(folder)) for run in found]
        head = ["run", "state", *COLUMNS.values(), "commit", "last row"]
        print(
            table([head, *([name, *_cells(run)] for name, run in zip(names, found, strict=True))])
        )
        for name, run in zip(names, found, strict=True):
            if run.state not in ("finished", "running"):
                print(f"{name}: {run.state}: {run.reason}")
            for problem in run.problems:
                print(f"{name}: {problem}")


def sorted_runs(found: list[RunInfo], key: str) -> list[RunInfo]:
    """Text in the order of the alphabet; numbers highest first, then those without one."""
    values = [(run.as_json()[key], run) for run in found]
    if key in ("run", "state"):
        return [run for _, run in sorted(values, key=lambda pair: str(pair[0]))]
    ordered = sorted(values, key=lambda pair: (pair[0] is None, -(pair[0] or 0)))
    return [run for _, run in ordered]


def _cells(run: RunInfo) -> list[str]:
    """State, figures, commit, time of the last row."""
    figures = [run.figures[key] for key in COLUMNS]
    texts = [DASH if x is None else short_number(x).replace("\u2009", "") for x in figures]
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.updated)) if run.updated else DASH
    return [run.state, *texts, run.commit[:10] if run.commit else DASH, when]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _compare(folders: Sequence[Path], *, as_json: bool) -> None:
    if len(folders) < 2:
        raise UserError("compare needs at least two runs, e.g. compare runs/first runs/second")
    found = [runs.read(folder) for folder in folders]
    differing = runs.differences(found)
    if as_json:
        plain = [run.as_json() for run in found]
        print(json.dumps(finite({"runs": plain, "config": differing}), indent=1, default=str))
        return
    names = list(map(str, folders))
    heads = ["", "state", *COLUMNS.values(), "commit", "last row"]
    print(table(list(zip(heads, *([n, *_cells(r)] for n, r in zip(names, found, strict=True)),
                         strict=True))))  # fmt: skip
    print("\nconfig keys that differ:" if differing else "\nthe configs are the same")
    if differing:
        print(table([[key, *map(str, values)] for key, values in differing.items()]))
    for run, name in zip(found, names, strict=True):
        for problem in run.problems:
            print(f"{name}: {problem}")


if __name__ == "__main__":
    sys.exit(main())
