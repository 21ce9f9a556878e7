"""List the pretraining runs below a folder, or compare some of them."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import UserError, run_command
from common.files import finite, write_text
from tools.flow import runs, runs_page
from tools.flow.charts import short_number
from tools.flow.runs import FIGURES, RunInfo

EXAMPLE = """\
examples:
  .venv/bin/python tools/runs.py list runs
  .venv/bin/python tools/runs.py list runs --sort knn_top1 --json
  .venv/bin/python tools/runs.py compare runs/first runs/second --html runs/comparison.html

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
    add = commands.add_parser("compare", help="config keys that differ, figures, curves")
    add.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    group = add.add_mutually_exclusive_group()
    group.add_argument("--html", type=Path, metavar="OUT", help="write a page with the curves")
    group.add_argument("--json", action="store_true", help="print JSON, curves included")
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for wrong arguments or input."""
    options = parser().parse_args(arguments)

    def work() -> int:
        if options.command == "list":
            _list(options.folder, options.sort, as_json=options.json)
        else:
            _compare(options.folders, options.html, as_json=options.json)
        return 0

    return run_command(work)


def _list(folder: Path, key: str, *, as_json: bool) -> None:
    found = sorted_runs([runs.read(place) for place in runs.find(folder)], key)
    if as_json:
        print(json.dumps(finite([run.as_json() for run in found]), indent=1))
        return
    if not found:
        print(f"{folder}: no runs")
        return
    head = ["run", "state", *COLUMNS.values(), "commit", "last row"]
    lines = [[_name(run, folder), run.state, *_cells(run), *_origin(run)] for run in found]
    print(table([head, *lines]))
    for run in found:
        if run.state not in ("finished", "running"):
            print(f"{_name(run, folder)}: {run.state}: {run.reason}")
        for problem in run.problems:
            print(f"{_name(run, folder)}: {problem}")


def sorted_runs(found: list[RunInfo], key: str) -> list[RunInfo]:
    """Text in the order of the alphabet; numbers highest first, then those without one."""
    if key in ("run", "state"):
        return sorted(found, key=lambda run: str(run.as_json()[key]))

    def place(run: RunInfo) -> tuple[bool, float]:
        value = run.as_json()[key]
        return value is None, -(value or 0)

    return sorted(found, key=place)


def _name(run: RunInfo, folder: Path) -> str:
    name = str(run.folder.relative_to(folder))
    return run.folder.resolve().name if name == "." else name


def _cells(run: RunInfo) -> list[str]:
    values = [run.figures[key] for key in COLUMNS]
    return [DASH if x is None else short_number(x).replace("\u2009", "") for x in values]


def _origin(run: RunInfo) -> list[str]:
    when = (
        DASH if run.updated is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.updated))
    )
    return [run.commit[:10] if run.commit else DASH, when]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def _compare(folders: Sequence[Path], html: Path | None, *, as_json: bool) -> None:
    if len(folders) < 2:
        raise UserError("compare needs at least two runs, e.g. compare runs/first runs/second")
    found = [runs.read(folder) for folder in folders]
    differing = runs.differences(found)
    if as_json:
        print(json.dumps(finite(as_plain(found, differing)), indent=1, default=str))
    elif html is not None:
        page = runs_page.render(found)
        write_text(html, page)
        print(f"{html}: {len(found)} runs, {len(page.encode()) / 1e6:.2f} MB")
    else:
        _print_comparison(found, differing)


def as_plain(found: Sequence[RunInfo], differing: dict[str, list[Any]]) -> dict[str, Any]:
    """What ``compare --json`` prints."""
    return {
        "runs": [run.as_json() | {"curves": run.curves} for run in found],
        "config": differing,
    }


def _print_comparison(found: Sequence[RunInfo], differing: dict[str, list[Any]]) -> None:
    names = runs.names(found)
    rows = [["", *names], ["state", *(run.state for run in found)]]
    cells = [_cells(run) for run in found]
    rows += [[label, *(c[i] for c in cells)] for i, label in enumerate(COLUMNS.values())]
    rows.append(["commit", *(_origin(run)[0] for run in found)])
    print(table(rows))
    print("\nconfig keys that differ:" if differing else "\nthe configs are the same")
    if differing:
        print(table([[key, *map(str, values)] for key, values in differing.items()]))
    for run, name in zip(found, names, strict=True):
        for problem in run.problems:
            print(f"{name}: {problem}")


if __name__ == "__main__":
    sys.exit(main())
