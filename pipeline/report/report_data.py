"""Gathers what the report shows from the files of a run; whatever is missing stays empty."""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from common.files import is_number, read_json_lines, read_json_or_none, sha256_of
from pipeline import results
from pipeline.config import ARMS
from pipeline.report import runs
from pipeline.report.charts import Point
from pipeline.report.runs import RunInfo
from pipeline.stages import read_run

ARM_TITLES = {
    "random": "Random initialisation",
    "pretrained": "Pretrained",
    "random_frozen": "Random, backbone frozen",
    "pretrained_frozen": "Pretrained, backbone frozen",
}
ERROR_KINDS = {
    "correct": "right class, overlap above 0.5, the first on its object",
    "localisation": "right class, overlap from 0.1 to 0.5",
    "confusion": "overlap above 0.5 with an object of another class",
    "both": "overlap from 0.1 to 0.5 with an object of another class",
    "duplicate": "a better-scored detection has the object already",
    "background": "overlap below 0.1 with every object",
}
SKIPPED_KINDS = {
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
NUM_FIRST, NUM_DIFFERENT, NUM_CONFUSIONS = 6, 6, 12
MOST_OF_A_KIND = 50  # entries of "Skipped or failed" that are listed; all are counted
_TILE_GAP = 4  # white pixels between the tiles of the pictures that pretraining leaves
_LEVELS = (0.25, 0.5, 0.75)  # of recall, in the table
_EMPTY_PICTURES = re.compile(r"Removed (\d+) images with no usable annotations")

Detection = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows of each arm, one a seed."""


@dataclass(frozen=True)
class PipelineRun:
    """The small files of a run's folder.

    Attributes:
        out: The folder.
        record: Content of `experiment.json`, and `stages`: the record of each.
        results: As `results.assemble` gives them.
    """

    out: Path
    record: dict[str, Any]
    results: dict[str, Any]

    @classmethod
    def load(cls, out: Path) -> PipelineRun:
        """Read the records and assemble the results."""
        return cls(out, read_run(out), results.assemble(out))

    def finished(self, stage: str) -> bool:
        """Whether a stage's files belong to this run."""
        return stage in self.results["stages"]

    def json(self, name: str) -> dict[str, Any]:
        """A file's JSON, or an empty dictionary."""
        content = read_json_or_none(self.out / name)
        return content if isinstance(content, dict) else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows that pretraining logged."""
        return read_json_lines(self.out / "pretrain/metrics.jsonl")

    def dataset(self) -> Path:
        """The folder of the VOC-layout set."""
        return (self.out / (self.record.get("dataset") or "data")).resolve()

    def seed_folders(self, arm: str) -> list[Path]:
        """The folders of an arm's finished seeds."""
        rows = self.results["detection"][arm]
        return [self.out / f"detection/{arm}/seed-{row['seed']}" for row in rows]


def stage_rows(run: PipelineRun) -> list[dict[str, Any]]:
    """One row per planned stage: status, seconds, memory; the report itself is being written."""
    rows = []
    for name in run.record.get("plan") or []:
        entry = (run.record.get("stages") or {}).get(name) or {}
        status = entry.get("status", "not run")
        if entry and not entry.get("current"):
            status = "not run with these settings"
        row = {"name": name, "status": status, "seconds": None, "memory": None, "resumed": False}
        if status == "finished":
            row["seconds"], row["memory"] = entry.get("seconds"), entry.get("peak_memory_bytes")
            row["resumed"] = bool(entry.get("resumed"))
        if name != "report":
            rows.append(row)
    return rows


# Average precision


def mean(values: Iterable[Any]) -> float | None:
    """The mean of the numbers among some values."""
    known = [float(value) for value in values if is_number(value)]
    return fmean(known) if known else None


def ap_curves_of_pair(
    run: PipelineRun, pair: str, metric: str
) -> dict[str, tuple[dict[int, list[Point]], list[Point]]]:
    """(iteration, AP) of `random` and of `pretrained`: every finished seed's, and their mean."""
    curves_of = {}
    for tone, arm in zip(("pretrained", "random"), results.PAIRS[pair], strict=True):
        curves = {}
        for row, folder in zip(run.results["detection"][arm], run.seed_folders(arm), strict=True):
            points = {
                float(line["iteration"]): float(line[metric])
                for line in read_json_lines(folder / "curve.jsonl")
                if is_number(line.get("iteration")) and is_number(line.get(metric))
            }
            if points:
                curves[row["seed"]] = sorted(points.items())
        curves_of[tone] = (curves, mean_curve(list(curves.values())))
    return {tone: curves_of[tone] for tone in ("random", "pretrained")}


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean at the iterations that all curves have."""
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    return [(x, fmean(table[x] for table in tables)) for x in shared]


def seed_rows(detection: Detection, pair: str, metric: str) -> list[tuple[int, float, float]]:
    """(seed, random, pretrained) of the seeds that ran in both arms.

    Args:
        detection: Rows of each arm, one a seed.
        pair: Of `results.PAIRS`.
        metric: Of `results.ALL_METRICS`.
    """
    treated, control = (results.values(detection[arm], metric) for arm in results.PAIRS[pair])
    return [(seed, control[seed], treated[seed]) for seed in sorted(treated.keys() & control)]


def per_class_rows(detection: Detection, pair: str) -> list[tuple[str, float | None, float | None]]:
    """(class, random, pretrained): means over the seeds, classes in alphabetical order.

    Args:
        detection: Rows of each arm.
        pair: Of `results.PAIRS`.
    """
    treated, control = (
        [row.get("per_class") or {} for row in detection[arm]] for arm in results.PAIRS[pair]
    )
    rows = [
        (name, mean(t.get(name) for t in control), mean(t.get(name) for t in treated))
        for name in sorted({name for table in (*control, *treated) for name in table})
    ]
    return [row for row in rows if row[1:] != (None, None)]


def precision_curves(run: PipelineRun, arm: str) -> dict[str, list[float]]:
    """Class -> precision at 101 levels of recall at an overlap of 0.5, mean over the seeds."""
    by_class: dict[str, list[list[float]]] = {}
    for folder in run.seed_folders(arm):
        content = _formatted(folder / "pr.json", "fa-pr-1")
        for name, curves in (content.get("classes") or {}).items():
            values = (curves.get("0.50") or {}).get("precision") or []
            if len(values) == 101 and all(map(is_number, values)):
                by_class.setdefault(name, []).append(values)
    return {name: mean_levels(curves) for name, curves in by_class.items()}


def mean_levels(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean at each level of recall; empty without curves."""
    return [fmean(column) for column in zip(*curves, strict=True)]


def reached(curve: Sequence[float]) -> list[Point]:
    """(recall, precision) up to the first level of recall that is not reached."""
    points = [(level / 100, value) for level, value in enumerate(curve)]
    last = next((i for i, value in enumerate(curve) if value == 0), len(curve) - 1)
    return points[: last + 1]


def precision_figures(curve: Sequence[float] | None) -> list[float | None]:
    """Precision at a quarter, half and three quarters of recall, and the highest recall."""
    if not curve:
        return [None] * (len(_LEVELS) + 1)
    highest = max((level / 100 for level, value in enumerate(curve) if value > 0), default=0.0)
    return [*(curve[round(100 * level)] for level in _LEVELS), highest]


def _formatted(path: Path, form: str) -> dict[str, Any]:
    """A file's content if it is of the right form, else nothing."""
    content = read_json_or_none(path)
    return content if isinstance(content, dict) and content.get("format") == form else {}


# Kinds of errors


def error_rows(run: PipelineRun) -> list[dict[str, Any]]:
    """What the detections of each arm are, means over its seeds; arms without `errors.json` not.

    `counts`: of the best-scored ones by kind, and `missed`; `gained`: AP50 if a kind were mended;
    `confusions`: {(class of the object, class it was taken for): count}.
    """
    rows = []
    for arm in ARMS:
        files = [_formatted(f / "errors.json", "fa-errors-1") for f in run.seed_folders(arm)]
        tables = [table for table in files if table]
        if not tables:
            continue
        pairs: dict[tuple[str, str], float] = defaultdict(float)
        for entry in (entry for table in tables for entry in table.get("confusions") or []):
            pairs[entry["object"], entry["taken_for"]] += entry["count"] / len(tables)
        kinds = (*ERROR_KINDS, "missed")
        best = [table.get("best_scored") or {} for table in tables]
        gained = [table.get("AP50_gained") or {} for table in tables]
        rows.append(
            {
                "arm": arm,
                "title": ARM_TITLES[arm],
                "n": len(tables),
                "num_objects": tables[0].get("num_objects"),
                "counts": {kind: mean(t.get(kind) for t in best) or 0.0 for kind in kinds},
                "gained": {kind: mean(t.get(kind) for t in gained) for kind in kinds[1:]},
                "confusions": pairs,
            }
        )
    return rows


def confusion_rows(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The most frequent confusions, by their sum over the arms of `error_rows`."""
    totals: dict[tuple[str, str], float] = defaultdict(float)
    for arm in arms:
        for key, count in arm["confusions"].items():
            totals[key] += count
    best = sorted(totals, key=lambda key: (-totals[key], key))[:NUM_CONFUSIONS]
    return [{"pair": k, "counts": [arm["confusions"].get(k, 0.0) for arm in arms]} for k in best]


# Pictures with boxes


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture that travels inside the page."""

    uri: str
    width: int
    height: int


def embed(picture: Path | Image.Image, max_side: int) -> EmbeddedPicture | None:
    """A picture as a JPEG data URI, made smaller if need be; None if its file does not open."""
    if isinstance(picture, Path):
        try:
            with Image.open(picture) as opened:
                picture = opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85, optimize=True)
    text = base64.b64encode(stream.getvalue()).decode()
    return EmbeddedPicture(f"data:image/jpeg;base64,{text}", picture.width, picture.height)


def displayed(picture: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best-scored detections of a picture, as many as it shows objects that count.

    Each has `correct`; detections on difficult objects are passed over.
    """
    truth = picture.get("ground_truth") or []
    most = max(1, sum(not item.get("difficult") for item in truth))
    detections = sorted(picture.get("detections") or [], key=lambda d: -d["score"])
    counted = [d for d in detections if d.get("kind", "ignored") != "ignored"]
    return [{**d, "correct": d["kind"] == "correct"} for d in counted[:most]]


def detection_pictures(
    run: PipelineRun, detection: Detection, file: str, dataset: Path | None
) -> dict[str, Any]:
    """Test pictures with the boxes of both arms of a pair, of their lowest seed.

    Args:
        run: The run.
        detection: Rows of each arm; of the fine-tuned pair where one of its arms ran.
        file: Name of the file with the boxes, in the folder of each seed.
        dataset: Folder that names of pictures are relative to; nothing outside it is read.
    Returns:
        `first`: the first pictures of the list; `different`: those of the others where the arms
        differ most in how many objects they find; `num_saved`: how many there are to choose from.
        Each has `item` (the first arm's entry), `arms` (arm -> boxes), `lead` (how many objects
        more the pretrained arm finds), `name` and `picture`.
    """
    pair = "fine_tuned" if any(detection[arm] for arm in results.PAIRS["fine_tuned"]) else "frozen"
    treated, control = results.PAIRS[pair]
    seed, by_arm = None, {}
    for arm in (control, treated):
        for row in detection[arm]:
            entries = read_json_or_none(run.out / f"detection/{arm}/seed-{row['seed']}" / file)
            if isinstance(entries, list) and seed in (None, row["seed"]):
                by_arm[arm] = {entry["file_name"]: entry for entry in entries}
                seed = row["seed"]
                break
    saved = []
    for name, item in by_arm[next(iter(by_arm))].items() if by_arm else ():
        if all(name in entries for entries in by_arm.values()):
            boxes = {arm: displayed(entries[name]) for arm, entries in by_arm.items()}
            num_found = [sum(box["correct"] for box in boxes[arm]) for arm in by_arm]
            lead = num_found[1] - num_found[0] if len(num_found) == 2 else 0
            saved.append({"item": item, "arms": boxes, "lead": lead})
    first = _opened(saved, dataset, NUM_FIRST)
    names = {row["item"]["file_name"] for row in first}
    rest = [row for row in saved if row["lead"] and row["item"]["file_name"] not in names]
    different = _opened(sorted(rest, key=lambda row: -abs(row["lead"])), dataset, NUM_DIFFERENT)
    return {
        "pair": results.PAIR_TITLES[pair].lower(),
        "seed": seed,
        "first": first,
        "different": different,
        "num_saved": len(saved),
    }


def _opened(rows: Sequence[dict[str, Any]], dataset: Path | None, count: int) -> list[dict]:
    """The first rows whose picture can be opened."""
    opened: list[dict] = []
    for row in rows:
        if dataset is None or len(opened) == count:
            break
        path = dataset / row["item"]["file_name"]
        if path.resolve().is_relative_to(dataset.resolve()):
            picture = embed(path, 480)
            if picture is not None:
                opened.append({**row, "name": path.name, "picture": picture})
    return opened


def sentence(item: Mapping[str, Any], boxes: Sequence[Mapping[str, Any]]) -> str:
    """What a picture shows, for those who do not see it."""
    truth = ", ".join(obj["class"] for obj in item.get("ground_truth") or []) or "nothing"
    detected = ", ".join(f"{box['class']} {box['score']:.2f} {box['kind']}" for box in boxes)
    return f"Labelled: {truth}. Detected: {detected or 'nothing'}."


# Other sets, as `tools/train_voc.sh --eval-on` left them


def other_sets(run: PipelineRun) -> list[dict[str, Any]]:
    """Figures of every arm on each other set, in the order of the sets' names.

    `detection`: rows of each arm; `outdated`: seeds that were trained again since, as
    "arm/seed-N", which count nowhere; `pictures`: as `detection_pictures`.
    """
    stems = {path.stem for path in run.out.glob("detection/*/seed-*/eval-on-*.json")}
    beside = {stem + end for stem in stems for end in ("-pr", "-errors", "-detections")}
    sets = []
    for name in sorted(stem.removeprefix("eval-on-") for stem in stems - beside):
        rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        outdated = []
        for arm in ARMS:
            for seed, folder in zip(
                run.results["detection"][arm], run.seed_folders(arm), strict=True
            ):
                path = folder / f"eval-on-{name}.json"
                result = read_json_or_none(path)
                if not isinstance(result, dict):
                    continue
                # Trained again since? Without a model the folder is a copy of the figures alone.
                model = folder / "model_final.pth"
                is_newer = model.is_file() and model.stat().st_mtime > path.stat().st_mtime
                if is_newer and sha256_of(model) != result.get("model_sha256"):
                    outdated.append(f"{arm}/{folder.name}")
                else:
                    kept = ("per_class", "num_test_images")
                    rows[arm].append(results.seed_row(seed["seed"], result, kept))
        summaries = [run.json(f"detection/{arm}/eval-on-{name}.json") for arm in ARMS]
        folder = next((Path(s["set"]) for s in summaries if s.get("set")), None)
        pictures = detection_pictures(run, rows, f"eval-on-{name}-detections.json", folder)
        if any(rows.values()) or outdated:
            sets.append(
                {"name": name, "detection": rows, "outdated": outdated, "pictures": pictures}
            )
    return sets


# Pretraining


def metric_curves(run: PipelineRun) -> dict[str, list[Point]]:
    """Every metric of pretraining over epochs (over steps where no epoch is given)."""
    curves: dict[str, list[Point]] = {}
    for row in run.metrics:
        x = row.get("epoch", row.get("step"))
        if row.get("kind") not in ("train", "knn") or not is_number(x):
            continue
        for key, value in row.items():
            if key not in ("kind", "step", "epoch") and is_number(value):
                curves.setdefault(key, []).append((float(x), float(value)))
    return curves


def collapse_alarms(run: PipelineRun) -> list[str]:
    """What the alarm of pretraining said, first alarm first."""
    return [str(row.get("message")) for row in run.metrics if row.get("collapse")]


def last_histogram(run: PipelineRun) -> dict[str, list[Point]]:
    """The outlines of pretraining's last histograms of cosines: (cosine, share of pairs)."""
    outlines: dict[str, list[Point]] = {}
    for row in run.metrics:
        if row.get("kind") != "similarity":
            continue
        for name in ("positives", "negatives"):
            shares = row.get(name)
            if isinstance(shares, list) and shares and all(map(is_number, shares)):
                width = 2 / len(shares)  # the bins cover [-1, 1]
                corners = [
                    (-1 + width * (i + side), share)
                    for i, share in enumerate(shares)
                    for side in (0, 1)
                ]
                outlines[name] = [(-1.0, 0.0), *corners, (1.0, 0.0)]
    return outlines


def picture_rows(run: PipelineRun, name: str) -> list[dict[str, Any]]:
    """The rows of a picture that pretraining left: `tiles` with what is known `about` them.

    Where rows and tiles do not fit together the whole picture is one tile.
    """
    path = run.out / f"pretrain/pictures/{name}.jpg"
    described = (read_json_or_none(path.with_suffix(".json")) or {}).get("rows") or []
    try:
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
    except (OSError, ValueError):
        return []
    step, rest = divmod(whole.height + _TILE_GAP, max(len(described), 1))
    columns, rest_across = divmod(whole.width + _TILE_GAP, step)
    if not described or rest or rest_across:
        return [{"tiles": [embed(whole, 1400)], "about": {}}]
    side = step - _TILE_GAP
    rows = []
    for y, about in zip(range(0, len(described) * step, step), described, strict=True):
        boxes = [(x, y, x + side, y + side) for x in range(0, columns * step, step)]
        rows.append({"tiles": [embed(whole.crop(box), 400) for box in boxes], "about": about})
    return rows


def neighbours(run: PipelineRun) -> dict[str, Any]:
    """Neighbours of the same queries before and after pretraining; empty without pictures.

    `rows`: for each query its class and its `states`, each with `tiles` (with their labels) and
    `num_same` of `k` neighbours that have the query's class, None where labels are not known;
    `totals`: (title, same, all) of each state. Neighbours before of other queries are left out.
    """
    before, after = picture_rows(run, "neighbours_before"), picture_rows(run, "neighbours")
    if not after:
        return {}
    galleries = {"After pretraining": after}
    queries = [row["about"].get("query") for row in after]
    if None not in queries and queries == [row["about"].get("query") for row in before]:
        galleries = {"Before pretraining": before, **galleries}
    states = {title: [_labelled(row) for row in rows] for title, rows in galleries.items()}
    totals = [
        (title, sum(row["num_same"] for row in rows), sum(row["k"] for row in rows))
        for title, rows in states.items()
        if all(row["num_same"] is not None for row in rows)
    ]
    rows = [
        {"query": row["about"].get("query_label"), "states": {t: states[t][i] for t in states}}
        for i, row in enumerate(after)
    ]
    return {
        "rows": rows,
        "totals": totals,
        "bank": run.json("pretrain/pictures/neighbours.json").get("num_bank"),
    }


def _labelled(row: Mapping[str, Any]) -> dict[str, Any]:
    query, tiles = row["about"].get("query_label"), row["tiles"]
    labels = list(row["about"].get("neighbour_labels") or [])
    shown = [query, *labels, *[None] * len(tiles)][: len(tiles)]
    num_same = None if query is None else sum(label == query for label in labels)
    return {"tiles": list(zip(tiles, shown, strict=True)), "num_same": num_same, "k": len(labels)}


# What was skipped, replaced, raised an alarm or failed: nothing is left out silently.


@dataclass(frozen=True)
class Item:
    """One entry: what kind, where it happened, to what, and why."""

    kind: str
    where: str
    what: str
    why: str


def skipped_groups(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Entries by kind, gravest first: `kind`, `title`, `count`, `rows` (the first ones)."""
    by_kind: dict[str, list[Item]] = {kind: [] for kind in SKIPPED_KINDS}
    for item in items:
        by_kind[item.kind].append(item)
    return [
        {"kind": kind, "title": SKIPPED_KINDS[kind], "count": len(rows)}
        | {"rows": rows[:MOST_OF_A_KIND]}
        for kind, rows in by_kind.items()
        if rows
    ]


def skipped_of_pipeline(run: PipelineRun) -> list[Item]:
    """Entries of a pipeline's own stages and of its pretraining."""
    items = []
    for row in stage_rows(run):
        record = (run.record.get("stages") or {}).get(row["name"]) or {}
        if row["status"] == "failed":
            log = run.out / "logs" / f"{row['name']}.log"
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            last = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            why = f"exit status {record.get('exit_status')}. The log ends: " + "\n".join(last[-3:])
            items.append(Item("failed", row["name"], "the stage", why))
        elif row["status"] != "finished":
            items.append(Item("not run", row["name"], "the stage", row["status"]))
    items += [
        Item("left out", stage, str(entry.get("file")), str(entry.get("reason")))
        for stage in ("shards", "probe_train", "probe_val")
        for entry in run.json(f"{stage}/index.json").get("skipped") or []
    ]
    items += _unused_by_detection(run)
    folder = run.out / "pretrain"
    if runs.is_run(folder):
        own = skipped_of_run(runs.read(folder), "pretrain")
        items += own
        number = run.json("pretrain/summary.json").get("num_skipped_samples")
        if number and not any(item.kind == "replaced" for item in own):
            why = "did not decode during pretraining"
            items.append(Item("replaced", "pretrain", f"{number} samples", why))
    return items


def _unused_by_detection(run: PipelineRun) -> list[Item]:
    """Pictures and classes that detection did not use; the arms share their set."""
    num_test = (run.json("data/dataset.json").get("splits") or {}).get("test")
    unused = []
    for folder in (folder for arm in ARMS for folder in run.seed_folders(arm)):
        result = read_json_or_none(folder / "result.json") or {}
        unused += [
            (f"class {name}", "no object in the test pictures")
            for name in result.get("classes_without_test_objects") or []
        ]
        tested = result.get("num_test_images")
        if is_number(num_test) and is_number(tested) and tested < num_test:
            unused.append((f"{num_test - tested} of {num_test} test pictures", "TEST.NUM_IMAGES"))
        log = folder / "log.txt"
        numbers = _EMPTY_PICTURES.findall(log.read_text(errors="replace")) if log.is_file() else []
        if numbers and int(numbers[-1]):
            unused.append((f"{int(numbers[-1])} training pictures", "no object in them"))
    return [Item("left out", "detection", what, why) for what, why in dict.fromkeys(unused)]


def skipped_of_run(run: RunInfo, where: str) -> list[Item]:
    """Damaged files, alarms, steps that were not finite, replaced samples, notes."""
    items = [Item("damaged", where, *problem.split(" ", 1)) for problem in run.problems]
    steps = set()
    for path in sorted((run.folder / "nonfinite").glob("step-*.json")):
        row = read_json_or_none(path) or {}
        steps.add(row.get("step"))
        left_out = ", left out" * (row.get("policy") == "skip")
        why = f"loss {row.get('loss')}, gradient norm {row.get('gradient_norm')}"
        what = f"step {row.get('step', '?')}{left_out}"
        items.append(Item("not finite", where, what, f"{why}; batch: nonfinite/{path.name}"))
    for event in run.events:
        message, step = str(event.get("message")), event.get("step")
        if event.get("collapse"):
            items.append(Item("alarm", where, f"step {step}", message))
        elif "num_skipped_steps" in event:
            if step not in steps:
                items.append(Item("not finite", where, f"step {step}, left out", message))
        # The page shows a figure and the run's state elsewhere.
        elif "knn_top1_initial" not in event and not message.startswith("stopped by "):
            items.append(Item("noted", where, f"step {step}", message))
    overflows = run.last_row.get("num_overflow_steps")
    if is_number(overflows) and overflows > 0:
        why = "gradients too large for the loss scale of fp16; it was lowered"
        items.append(Item("overflow", where, f"{overflows:g} steps", why))
    replaced: dict[str, str] = {}
    for row in filter(None, read_json_lines(run.folder / "bad_samples.jsonl")):
        replaced.setdefault(str(row.get("sample")), str(row.get("reason", "no reason was kept")))
    return items + [
        Item("replaced", where, f"sample {sample}", why) for sample, why in replaced.items()
    ]
