"""Writes `report.html`: one page of a pipeline or a study that needs nothing but itself.

The functions above `context` gather what the page shows as plain values; what is missing stays
empty. Only stages that are finished with the present settings count.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from common import errors
from common.files import (
    NUMBER,
    Form,
    check_out_folder,
    has_form,
    is_number,
    read_json_lines,
    read_record_or_none,
    write_text,
)
from common.stats import mean_std
from pipeline import results
from pipeline.config import FROZEN
from pipeline.plan import RUN_FILE, read_run
from pipeline.report import charts, pictures, runs
from pipeline.report.pictures import Album, Arms
from pipeline.report.runs import Item, RunInfo
from pipeline.results import Detection

HERE = Path(__file__).resolve().parent
DASH = "\u2013"
ERROR_KINDS = (
    *("correct", "localisation", "confusion", "both", "duplicate", "background"),
    "missed",  # an object, not a detection
)
"""The template says what they are."""
GRAVITY = ("failed", "damaged", "alarm", "replaced", "left out", "not run", "noted")
"""Kinds of entries in "Skipped or failed", gravest first."""
MOST_VARIANTS = 6  # whose curves and pictures are shown; a study has more
MOST_OF_A_KIND = 50  # entries that are listed; all are counted
MOST_CLASSES = 20  # of the confusion matrix, the most frequent ones


# -- figures --------------------------------------------------------------------------------------


def seed_folders(out: Path, detection: Detection) -> dict[str, list[Path]]:
    """Arm -> the folders of its finished seeds, for the arms that ran."""
    return {arm: [out / f"detection/{arm}/seed-{row['seed']}" for row in rows]
            for arm, rows in detection.items() if rows}  # fmt: skip


def mean_curve(curves: Sequence[Mapping[float, float]]) -> charts.Line:
    """(x, mean, low, high) at the places that all curves share, one standard deviation around.

    A single curve is (x, y).
    """
    line = []
    for x in sorted(set.intersection(*map(set, curves))) if curves else []:
        values = mean_std([curve[x] for curve in curves])
        mean, std = values["mean"], values["std"]
        line.append((x, mean) if std is None else (x, mean, mean - std, mean + std))
    return line


def ap_curves(arms: Arms) -> dict[str, charts.Line]:
    """Arm -> AP50 over training iterations, mean over the seeds."""
    found = {}
    for arm, folders in arms.items():
        form = {"iteration": int}
        logs = [read_json_lines(folder / "curve.jsonl", form) for folder in folders]
        curves = [{row["iteration"]: row["AP50"] for row in log if is_number(row.get("AP50"))}
                  for log in logs if log]  # fmt: skip
        found[results.arm_title(arm)] = mean_curve(curves)
    return found


def precision_curves(arms: Arms) -> dict[str, charts.Line]:
    """Arm -> (recall, precision at an overlap of 0.5), mean over classes and seeds."""
    found = {}
    for arm, folders in arms.items():
        files = _contents(folders, "pr.json", "fa-pr-1", {"classes": dict})
        curves = [curve["0.50"].get("precision") for file in files
                  for curve in file["classes"].values()
                  if has_form(curve, {"0.50": dict})]  # fmt: skip
        known = [curve for curve in curves if isinstance(curve, list) and len(curve) == 101
                 and all(map(is_number, curve))]  # fmt: skip
        means = map(fmean, zip(*known, strict=True))
        found[results.arm_title(arm)] = [(level / 100, value) for level, value in enumerate(means)]
    return found


def class_rows(detection: Detection) -> list[tuple[str, list[float | None]]]:
    """(class, its AP in every arm that ran, mean over the seeds), in alphabetical order."""
    tables = [[_table(row.get("per_class")) for row in rows] for rows in detection.values() if rows]
    names = sorted({name for table in tables for row in table for name in row})
    return [(name, [_mean(row.get(name) for row in table) for table in tables]) for name in names]


def _mean(values: Iterable[Any]) -> float | None:
    return mean_std([value for value in values if is_number(value)])["mean"]


def _contents(folders: Iterable[Path], name: str, kind: str, form: Form) -> list[dict[str, Any]]:
    """What the files of a name hold, but for those that are of another format or form."""
    found = (read_record_or_none(folder / name, {"format": str, **form}) for folder in folders)
    return [content for content in found if content and content["format"] == kind]


def error_rows(arms: Arms) -> list[dict[str, Any]]:
    """What the detections of each arm are, means over its seeds; arms without `errors.json` not.

    `counts`: of the best-scored ones by kind, and `missed`; `gained`: AP50 if a kind were mended.
    """
    form, found = {"num_objects": int, "best_scored": dict, "AP50_gained": dict}, []
    for arm, folders in arms.items():
        if tables := _contents(folders, "errors.json", "fa-errors-1", form):
            row = {"title": results.arm_title(arm), "n": len(tables)}
            row["num_objects"] = tables[0]["num_objects"]
            for name, key in (("counts", "best_scored"), ("gained", "AP50_gained")):
                row[name] = {k: _mean(t[key].get(k) for t in tables) for k in ERROR_KINDS}
            found.append(row)
    return found


def confusion(folders: Sequence[Path]) -> tuple[list[str], list[list[float]]] | None:
    """What objects were taken for by the best-scored detections, mean over the seeds of an arm.

    Returns:
        The most frequent classes; for each of them, and last for detections that are on no object,
        duplicate or badly placed: counts by the class that was said, last of objects not found.
        None without `errors.json`.
    """
    form = {"classes": dict, "confusions": list}
    files = _contents(folders, "errors.json", "fa-errors-1", form)
    own = {"num_objects": int, "best_scored": dict}
    tables = [{name: row["best_scored"] for name, row in file["classes"].items()
               if has_form(row, own)} for file in files]  # fmt: skip
    if not any(tables):
        return None
    counts = {name: row["num_objects"] for name, row in files[0]["classes"].items()
              if name in tables[0]}  # fmt: skip
    names = sorted(sorted(counts, key=lambda name: -counts[name])[:MOST_CLASSES])
    matrix = [[0.0] * (len(names) + 1) for _ in range(len(names) + 1)]
    place = {name: number for number, name in enumerate(names)}
    for file, table in zip(files, tables, strict=True):
        taken = dict.fromkeys(names, 0)
        for row in file["confusions"]:
            if has_form(row, {"object": str, "taken_for": str, "count": NUMBER}):
                true, said = row["object"], row["taken_for"]
                if true in place and said in place:
                    matrix[place[true]][place[said]] += row["count"] / len(files)
                if true in place:
                    taken[true] += row["count"]
        for name in names:
            of = {kind: value if is_number(value := table.get(name, {}).get(kind)) else 0.0
                  for kind in ERROR_KINDS}  # fmt: skip
            at = place[name]
            false = of["localisation"] + of["both"] + of["duplicate"] + of["background"]
            matrix[at][at] += of["correct"] / len(files)
            matrix[-1][at] += false / len(files)
            matrix[at][-1] += max(0.0, of["missed"] - taken[name]) / len(files)
    return names, matrix


def confusion_charts(arms: Arms) -> list[tuple[str, Markup]]:
    """(arm, its confusion matrix), for the arms whose detections are shown."""
    chosen = [arm for arm in arms if not arm.endswith(FROZEN)] or [*arms]
    found = [(results.arm_title(arm), confusion(arms[arm])) for arm in chosen[: pictures.NUM_ARMS]]
    return [
        (title, charts.matrix_chart(f"Confusion matrix, {title}", [*told[0], "nothing there"],
                                    [*told[0], "not found"], told[1]))
        for title, told in found if told
    ]  # fmt: skip


# -- pictures -------------------------------------------------------------------------------------


def _dataset(path: Path) -> dict[str, Any] | None:
    """What dataset.json says, if the page can show it."""
    content = read_record_or_none(path) or {}
    is_sound = isinstance(content.get("classes", []), list)
    return content if is_sound and isinstance(content.get("splits", {}), dict) else None


# -- pretraining, and what ran --------------------------------------------------------------------


def _table(value: Any) -> Mapping[str, Any]:
    """A part of a file that should be a table; empty if it is none."""
    return value if isinstance(value, dict) else {}


def pretrainings(
    out: Path, run: Mapping[str, Any], stages: Iterable[str]
) -> dict[str, list[RunInfo]]:
    """The runs of every variant among some finished stages, by its label, in the order of seeds."""
    variants = _table(_table(run.get("config")).get("variants"))
    found: dict[str, list[RunInfo]] = defaultdict(list)
    for stage in stages:
        kind, _, tail = stage.partition("/")
        if kind == "pretrain":
            name = tail.partition("/seed-")[0] or "pretrained"
            label = str(_table(variants.get(name)).get("label") or name)
            with contextlib.suppress(errors.UserError):
                one = runs.read(out / stage)
                found[label].append(one)
    return found


def pretraining_curves(
    by_variant: Mapping[str, Sequence[RunInfo]], key: str
) -> dict[str, charts.Line]:
    """Variant -> a metric over epochs (steps where no epoch is given), mean over its runs."""
    return {
        label: mean_curve([curve for run in found if (curve := {
            float(place): float(row[key])
            for row in run.rows if row["kind"] in ("train", "knn") and is_number(row.get(key))
            and is_number(place := row.get("epoch", row["step"]))
        })])
        for label, found in by_variant.items()
    }  # fmt: skip


def stage_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per planned stage: status, seconds, memory; the report itself is being written."""
    rows = []
    for name in run.get("plan") or []:
        entry = run["stages"].get(name) or {"status": "not run", "current": True}
        status = entry["status"] if entry.get("current") else "not run with these settings"
        if name in run["damaged"]:
            status = "record damaged"
        row = {"name": name, "status": status, "resumed": entry.get("resumed")}
        row |= {"seconds": entry.get("seconds"), "memory": entry.get("peak_memory_bytes")}
        if name != "report":
            rows.append(row)
    return rows


def skipped_items(
    out: Path, run: Mapping[str, Any], stages: Iterable[str], found: Iterable[RunInfo]
) -> list[Item]:
    """Everything that did not go as planned, gravest first.

    Args:
        out: The run's folder.
        run: Its record.
        stages: Those that are finished.
        found: Their pretraining runs.
    """
    items = []
    for row in stage_rows(run):
        if row["status"] != "finished":
            why = str(run["stages"].get(row["name"], {}).get("error") or row["status"])
            kind = "failed" if row["status"] == "failed" else "not run"
            items.append(Item(kind, row["name"], "the stage", why))
    for stage in stages:
        if stage.startswith(("shards", "probe_")):
            index = read_record_or_none(out / stage / "index.json", {"skipped": list}) or {}
            items += [Item("left out", stage, entry["file"], entry["reason"])
                      for entry in index.get("skipped", ())
                      if has_form(entry, {"file": str, "reason": str})]  # fmt: skip
    items += [Item("damaged", item["stage"], item["file"], item["fault"])
              for item in results.damaged_files(out, stages, has_details=True)]  # fmt: skip
    for one in found:
        items += runs.skipped(one, one.folder.relative_to(out).as_posix())
    return sorted(items, key=lambda item: GRAVITY.index(item.kind))


# -- the page -------------------------------------------------------------------------------------


def dataset_folder(out: Path, run: Mapping[str, Any]) -> Path:
    """The labelled set of the first seed: as it lay to the run's folder, else where it lay."""
    folder, stated = out / (run.get("dataset") or "data"), run.get("config", {}).get("data")
    if not folder.is_dir() and has_form(stated, {"dataset": str}):
        return Path(stated["dataset"])
    return folder


def context(out: Path) -> dict[str, Any]:
    """Everything that the template shows of a run."""
    run, found = read_run(out), results.assemble(out)
    detection = {arm: rows for arm, rows in found["detection"].items() if rows}
    arms = seed_folders(out, detection)
    tables = found.get("tables") or results.arm_tables("Test set", detection)
    by_variant = pretrainings(out, run, found["stages"])
    few = by_variant if len(by_variant) <= MOST_VARIANTS else {}
    pretrained = [one for group in by_variant.values() for one in group]
    items = skipped_items(out, run, found["stages"], pretrained)
    by_kind: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_kind[item.kind].append(item)
    conversions = [name for name in found["stages"] if name.partition("/")[0] == "convert"]
    stages = stage_rows(run)
    album, dataset = Album(), dataset_folder(out, run)
    if arms and not dataset.is_dir():
        text = "no such folder, so no picture of it is shown; bring it back, make the page again"
        by_kind["noted"].append(Item("noted", "report", str(dataset), text))
    shown = pictures.detection_pictures(arms, dataset, album)
    findings, question = results.findings(found), found.get("question")
    if question:  # the first comparison answers it, a table shows the others
        answers = (place for place, told in enumerate(findings) if told["kind"] != "missing")
        findings = findings[: next(answers, len(findings)) + 1]
    labels = pictures.labelled_set(arms, dataset, album)
    return {
        "name": run.get("name") or out.name,
        "record": run,
        "is_study": "tables" in found,
        "question": question,
        "findings": findings,
        "answers": results.answer_table(found),
        "is_preliminary": any(row["status"] != "finished" for row in stages),
        "results": found,
        "command": " ".join(run.get("command") or []),
        "config": yaml.safe_dump(run.get("config") or {}, sort_keys=False, allow_unicode=True),
        "pictures": shown,
        "usual_score": pictures.usual_score(shown),
        "shown_classes": sorted({box["class"] for row in shown for boxes in
                                 (row["truth"], *(arm["found"] for arm in row["arms"]))
                                 for box in boxes}),
        "labels": labels,
        "size_chart": size_chart(labels),
        "album": album,
        "tables": tables,
        "difference_chart": difference_chart,
        "arms": [results.arm_title(arm) for arm in detection],
        "class_rows": class_rows(detection),
        "line_chart": charts.line_chart,
        "ap_curves": ap_curves(arms),
        "precision_curves": precision_curves(arms),
        "published": (read_record_or_none(out / "results.json") or {}).get("published"),
        "published_metrics": results.METRICS,
        "kinds": ERROR_KINDS,
        "errors": error_rows(arms),
        "confusions": confusion_charts(arms),
        "other_sets": found.get("other_sets"),
        "pretrainings": by_variant,
        "curves_of": functools.partial(pretraining_curves, few),
        "alarms": [item for item in items if item.kind == "alarm"],
        "pretraining_pictures": {label: pictures.pretraining_pictures(found[0].folder, album)
                                 for label, found in few.items()},
        "card": results.read_figures(out, conversions[0]) if conversions else None,
        "skipped": {kind: (len(some), some[:MOST_OF_A_KIND]) for kind, some in by_kind.items()},
        "most_of_a_kind": MOST_OF_A_KIND,
        "most_classes": MOST_CLASSES,
        "most_bytes": pictures.MOST_BYTES,
        "near_zero": results.near_zero,
        "dataset": _dataset(dataset / "dataset.json"),
        "stages": stages,
    }  # fmt: skip


def size_chart(labels: Mapping[str, Any] | None) -> Markup | None:
    """Share of the boxes by their side, of every list."""
    lines = {}
    for row in (labels or {}).get("lists", ()):
        total = sum(row["sizes"]) if all(map(is_number, row["sizes"])) else 0
        if total:
            lines[row["use"]] = [(10 * step + 5, 100 * count / total)
                                 for step, count in enumerate(row["sizes"])]  # fmt: skip
    label = "side of the box, % of the picture's"
    return charts.line_chart("Sizes of boxes, in percent", lines, label, from_zero=True)


def difference_chart(table: Mapping[str, Any]) -> Markup | None:
    """The paired differences of a table, with their intervals; None of single seeds."""
    if all(row["n"] < 2 for row in table["comparisons"]):
        return None
    rows = [(row["name"], row["differences"], row["mean"], row["student_t"])
            for row in table["comparisons"] if row["n"]]  # fmt: skip
    metric = table["metric"]
    return charts.interval_chart(f"Paired differences of {metric}, {table['name']}", rows, metric)


def render(out: Path) -> str:
    """The page of a run.

    Raises:
        UserError: If the folder holds no run.
    """
    errors.require(out.is_dir(), errors.no_such_file(out, "give the folder of a run", "folder"))
    errors.require((out / RUN_FILE).is_file(), f"{out} holds no run: {out / RUN_FILE} is missing")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    # The system's theme, unless one was chosen; light on paper.
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in colours.items())
                   for colours in (charts.LIGHT, charts.DARK))  # fmt: skip
    palette = (
        f":root {{ color-scheme: light; {light} }}\n"
        "@media screen and (prefers-color-scheme: dark) {\n"
        f'  :root:not([data-theme="light"]) {{ color-scheme: dark; {dark} }}\n}}\n'
        f'@media screen {{ :root[data-theme="dark"] {{ color-scheme: dark; {dark} }} }}\n'
    )
    return _template().render(
        context(out),
        policy=policy,
        style=Markup(palette + (HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
    )


@functools.cache
def _template() -> jinja2.Template:
    """Compiled once: a pipeline writes its page after every stage."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.ChainableUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "signed": lambda value, digits=1: number(value, digits, "+"),
        "clock": lambda value: errors.duration(value) if is_number(value) else DASH,
        "contents": re.compile(r'<section id="([^"]+)".*\n *<h2[^>]*>(.*)</h2>').findall,
        "gib": lambda value: f"{value / 2**30:.2f} GiB" if is_number(value) else DASH,
    }
    return environment.get_template("report.html.j2")


def number(value: Any, digits: int = 1, sign: str = "") -> str:
    """A number for a table, with a true minus; a dash where there is none."""
    return f"{value:{sign}.{digits}f}".replace("-", "\u2212") if is_number(value) else DASH


def write(out: Path) -> None:
    """Write the page of a run's folder, and say where."""
    write_text(out / "report.html", render(out))
    print(out / "report.html")


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a run's folder, and its results.json: other sets may have come since."""
    parser = errors.command_parser(
        "Write report.html and results.json of a run again, finished or not.\n\n"
        "Example:\n  .venv/bin/python pipeline/report/report.py runs/demo"
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="a pipeline's or study's run")
    options = parser.parse_args(arguments)

    def work() -> None:
        check_out_folder(options.out)
        write(options.out)
        old = read_record_or_none(options.out / "results.json") or {}
        results.write(options.out, **{key: old[key] for key in ("published",) if key in old})

    return errors.run_command(work)


if __name__ == "__main__":
    sys.exit(main())
