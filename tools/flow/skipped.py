"""What was skipped, replaced, raised an alarm or failed: one list of a run, of others, of studies.

Nothing is left out silently, so a page without such a list says that there was nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from common.files import read_json_lines, read_json_or_none
from tools.flow import report_data, runs
from tools.flow.report_data import Run, is_number
from tools.flow.runs import RunInfo

KINDS = {
    "failed": "failed",
    "damaged": "missing or damaged files",
    "alarm": "alarms",
    "not finite": "steps that were not finite",
    "overflow": "steps beyond the loss scale",
    "replaced": "replaced samples",
    "left out": "left out",
    "not run": "not run, or not to the end",
    "noted": "notes",
}
"""Kind of an entry -> its heading, gravest first."""
MOST_OF_A_KIND = 50
_LOG_LINES = 3
_EMPTY_PICTURES = re.compile(r"Removed (\d+) images with no usable annotations")


@dataclass(frozen=True)
class Item:
    """One entry: what kind, where it happened, to what, and why."""

    kind: str
    where: str
    what: str
    why: str


def context(items: Iterable[Item]) -> dict[str, Any]:
    """What `skipped_section.html.j2` shows: `skipped`, rows of each kind, gravest first."""
    order = list(KINDS)
    ordered = sorted(items, key=lambda item: order.index(item.kind))
    groups = []
    for kind, found in groupby(ordered, lambda item: item.kind):
        rows = list(found)
        groups.append(
            {
                "kind": kind,
                "words": KINDS[kind],
                "count": len(rows),
                "rows": rows[:MOST_OF_A_KIND],
                "num_hidden": max(0, len(rows) - MOST_OF_A_KIND),
            }
        )
    return {"skipped": groups}


def of_pipeline(run: Run) -> list[Item]:
    """Entries of a pipeline's own stages."""
    items = [*_stages(run), *_packing(run), *_detection(run)]
    folder = run.out / "pretrain"
    if runs.is_run(folder):
        items += _of_run(runs.read(folder), "pretrain")
    skipped = run.json("pretrain/summary.json").get("num_skipped_samples")
    if skipped and not report_data.bad_samples(run):
        why = "did not decode during pretraining"
        items.append(Item("replaced", "pretrain", f"{skipped} samples", why))
    return items


def of_runs(found: Sequence[RunInfo], told: Sequence[Path] = ()) -> list[Item]:
    """Entries of runs that are compared; what is in a folder of `told` stands elsewhere."""
    items = []
    for run, label in zip(found, runs.names(found), strict=True):
        if run.folder in told:
            continue
        if run.state in ("failed", "damaged"):
            items.append(Item("failed", label, "the run", run.reason))
        elif run.state != "finished":
            items.append(Item("not run", label, f"{run.state} run", run.reason))
        items += _of_run(run, label)
        items += _bad_samples(run.folder / "bad_samples.jsonl", label)
    return items


def of_study(results: Mapping[str, Any], where: str) -> list[Item]:
    """Entries of a study or of trials, from its results."""
    items = []
    for entry in results["failures"]:
        what = f"{entry.get('cell') or entry.get('arm')}, seed {entry['seed']}"
        items.append(Item("failed", where, what, entry["reason"] or "no reason was kept"))
    for table in results.get("tables") or []:
        for entry in table["left_out"]:
            what = f"{table['title']}: {', '.join(entry['cells'].values())}"
            items.append(Item("left out", where, what, entry["reason"]))
    for status, number in results["counts"].items():
        if status in ("planned", "running", "stopped") and number:
            what = f"{number} of {results['counts']['cells']} runs"
            items.append(Item("not run", where, what, f"{status}, when the tables were written"))
    return list(dict.fromkeys(items))  # a cell is left out of the tables of each metric


def _stages(run: Run) -> list[Item]:
    items = []
    for row in report_data.stage_rows(run):
        if row["status"] == "finished":
            continue
        record = (run.ledger.get("stages") or {}).get(row["name"]) or {}
        if row["status"] == "failed":
            why = f"exit status {record.get('exit_status')}. {_log_end(run.out, row['name'])}"
            items.append(Item("failed", row["name"], "the stage", why.strip()))
        else:
            items.append(Item("not run", row["name"], "the stage", row["status"]))
    return items


def _log_end(out: Path, stage: str) -> str:
    path = out / "logs" / f"{stage}.log"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    last = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return f"logs/{stage}.log ends: " + "\n".join(last[-_LOG_LINES:])


def _packing(run: Run) -> list[Item]:
    return [
        Item("left out", stage, str(entry.get("file")), str(entry.get("reason")))
        for stage in ("shards", "probe_train", "probe_val")
        for entry in run.json(f"{stage}/index.json").get("skipped") or []
    ]


def _detection(run: Run) -> list[Item]:
    """Pictures and classes that detection did not use; the arms share their set."""
    num_test = (run.json("data/dataset.json").get("splits") or {}).get("test")
    items = []
    for arm, rows in run.results["detection"].items():
        for row in rows:
            folder = run.out / f"detection/{arm}/seed-{row['seed']}"
            found = read_json_or_none(folder / "result.json") or {}
            items += [
                Item("left out", "detection", f"class {name}", "no object in the test pictures")
                for name in found.get("classes_without_test_objects") or []
            ]
            tested = found.get("num_test_images")
            if is_number(num_test) and is_number(tested) and tested < num_test:
                what = f"{num_test - tested} of {num_test} test pictures"
                items.append(Item("left out", "detection", what, "TEST.NUM_IMAGES"))
            number = _empty_pictures(folder / "log.txt")
            if number:
                what = f"{number} training pictures"
                items.append(Item("left out", "detection", what, "no object in them"))
    return list(dict.fromkeys(items))


def _empty_pictures(log: Path) -> int:
    """How many training pictures Detectron2 left out, by what it wrote last."""
    try:
        found = _EMPTY_PICTURES.findall(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def _of_run(run: RunInfo, where: str) -> list[Item]:
    """Damaged files, alarms, steps that were not finite, hung processes, notes."""
    items = [Item("damaged", where, *problem.split(" ", 1)) for problem in run.problems]
    steps = set()
    for path in sorted((run.folder / "nonfinite").glob("step-*.json")):
        row = read_json_or_none(path) or {}
        steps.add(row.get("step"))
        why = f"loss {_values(row.get('loss'))}, gradient norm {row.get('gradient_norm')}"
        what = f"step {row.get('step', '?')}"
        if row.get("policy") == "skip":
            what += ", left out"
        items.append(Item("not finite", where, what, f"{why}; batch: nonfinite/{path.name}"))
    for event in run.events:
        items += _event(event, where, steps)
    overflows = run.last_row.get("num_overflow_steps")
    if is_number(overflows) and overflows > 0:
        why = "gradients too large for the loss scale of fp16; it was lowered"
        items.append(Item("overflow", where, f"{overflows:g} steps", why))
    return items


def _event(event: Mapping[str, Any], where: str, steps_with_file: set[Any]) -> list[Item]:
    message, step = str(event.get("message")), event.get("step")
    if event.get("collapse"):
        return [Item("alarm", where, f"step {step}", message)]
    if "num_skipped_steps" in event:
        is_known = step in steps_with_file
        return [] if is_known else [Item("not finite", where, f"step {step}, left out", message)]
    if "knn_top1_initial" in event or message.startswith("stopped by "):
        return []  # a figure; the run's state tells of a stop
    return [Item("noted", where, f"step {step}", message)]


def _values(loss: Any) -> str:
    return ", ".join(map(str, loss)) if isinstance(loss, list) else str(loss)


def _bad_samples(path: Path, where: str) -> list[Item]:
    rows = [row for row in read_json_lines(path) if row]
    if not rows:
        return []
    number = len({str(row.get("sample")) for row in rows})
    what = f"{number} samples" if number > 1 else f"sample {rows[0].get('sample')}"
    return [Item("replaced", where, what, f"{rows[0].get('reason')} (the first; {path.name})")]
