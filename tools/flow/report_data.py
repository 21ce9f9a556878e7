"""Gathers what the report shows from the files of a run; whatever is missing stays empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from PIL import Image

from common.files import read_json_lines, read_json_or_none
from tools.flow import gallery, results
from tools.flow.charts import Point
from tools.flow.config import ARMS

TILE_GAP = 4
"""White pixels between the tiles of the pictures that pretraining leaves."""
NUM_BAD_SAMPLES = 20
ARM_WORDS = {
    "random": "Random initialisation",
    "pretrained": "Pretrained",
    "random_frozen": "Random, backbone frozen",
    "pretrained_frozen": "Pretrained, backbone frozen",
}


@dataclass(frozen=True)
class Run:
    """The small files of a run's folder."""

    out: Path
    ledger: dict[str, Any]
    results: dict[str, Any]

    @classmethod
    def load(cls, out: Path) -> Run:
        """Read `stages.json` and assemble the results."""
        return cls(out, read_json_or_none(out / "stages.json") or {}, results.assemble(out))

    def finished(self, stage: str) -> bool:
        """Whether a stage's files belong to this run."""
        return stage in self.results["stages"]

    def json(self, name: str) -> Any:
        """Return a file's JSON, or an empty dictionary."""
        return read_json_or_none(self.out / name) or {}

    def dataset(self) -> Path:
        """Return the folder of the VOC-layout set."""
        return (self.out / (self.ledger.get("dataset") or "data")).resolve()


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per planned stage: status, seconds, memory."""
    records = run.ledger.get("stages") or {}
    rows = []
    for name in run.ledger.get("plan") or []:
        record = records.get(name) or {}
        status = record.get("status", "not run")
        if name == "report":
            continue  # It is just being written.
        if record and not record.get("current"):
            status = "not run with these settings"
        known = status == "finished"
        rows.append(
            {
                "name": name,
                "status": status,
                "seconds": record.get("seconds") if known else None,
                "memory": record.get("peak_memory_bytes") if known else None,
                "resumed": bool(record.get("resumed")) and known,
            }
        )
    return rows


def ap_curves(run: Run, arm: str, metric: str) -> dict[int, list[Point]]:
    """Return (iteration, AP) of every finished seed of an arm."""
    curves = {}
    for row in run.results["detection"][arm]:
        path = run.out / f"detection/{arm}/seed-{row['seed']}/curve.jsonl"
        points: dict[float, float] = {}
        for line in read_json_lines(path):
            x, y = line.get("iteration"), line.get(metric)
            if is_number(x) and is_number(y):
                points[float(x)] = float(y)
        if points:
            curves[row["seed"]] = sorted(points.items())
    return curves


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean at the iterations that all curves have."""
    if not curves:
        return []
    tables = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return [(x, math.fsum(table[x] for table in tables) / len(tables)) for x in shared]


def ap_curves_of_pair(
    run: Run, pair: str, metric: str
) -> dict[str, tuple[dict[int, list[Point]], list[Point]]]:
    """Return (iteration, AP) of `random` and of `pretrained`: every seed's, and their mean."""
    treated, control = results.PAIRS[pair]
    seeds = {
        "random": ap_curves(run, control, metric),
        "pretrained": ap_curves(run, treated, metric),
    }
    return {tone: (curves, mean_curve(list(curves.values()))) for tone, curves in seeds.items()}


def seed_rows(
    detection: Mapping[str, list[dict[str, Any]]], pair: str, metric: str
) -> list[tuple[int, float, float]]:
    """Return (seed, random, pretrained) of the seeds that ran in both arms.

    Args:
        detection: Rows of each arm, one a seed.
        pair: Of `results.PAIRS`.
        metric: Of `results.ALL_METRICS`.
    """
    treated, control = (results.values(detection[arm], metric) for arm in results.PAIRS[pair])
    return [(seed, control[seed], treated[seed]) for seed in sorted(treated.keys() & control)]


def metric_curves(run: Run) -> dict[str, list[Point]]:
    """Return every metric of pretraining over epochs (over steps where no epoch is given)."""
    curves: dict[str, list[Point]] = {}
    for row in read_json_lines(run.out / "pretrain/metrics.jsonl"):
        x = row.get("epoch", row.get("step"))
        if row.get("kind") not in ("train", "knn") or not is_number(x):
            continue
        for key, value in row.items():
            if key not in ("kind", "step", "epoch") and is_number(value):
                curves.setdefault(key, []).append((float(x), float(value)))
    return curves


def collapse_alarms(run: Run) -> list[str]:
    """Return what the alarm of pretraining said, first alarm first."""
    rows = read_json_lines(run.out / "pretrain/metrics.jsonl")
    return [str(row.get("message")) for row in rows if row.get("collapse")]


def last_histogram(run: Run) -> dict[str, list[Point]]:
    """Return the outlines of pretraining's last histograms of cosines: (cosine, share of pairs)."""
    outlines: dict[str, list[Point]] = {}
    for row in read_json_lines(run.out / "pretrain/metrics.jsonl"):
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


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number (NaN is written as text or null)."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def per_class_rows(
    detection: Mapping[str, Sequence[Mapping[str, Any]]], pair: str, key: str
) -> list[tuple[str, float | None, float | None]]:
    """Return (class, random, pretrained): means over the seeds, classes in alphabetical order.

    Args:
        detection: Rows of each arm, one a seed.
        pair: Of `results.PAIRS`.
        key: The table of a row that has a figure for every class.
    """
    treated, control = results.PAIRS[pair]
    tables = [_class_means(detection[arm], key) for arm in (control, treated)]
    names = sorted(set().union(*tables))
    return [(name, tables[0].get(name), tables[1].get(name)) for name in names]


def _class_means(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    collected: dict[str, list[float]] = {}
    for row in rows:
        for name, value in (row.get(key) or {}).items():
            if is_number(value):
                collected.setdefault(name, []).append(float(value))
    return {name: math.fsum(values) / len(values) for name, values in collected.items()}


def picture_rows(run: Run, name: str) -> list[dict[str, Any]]:
    """Return the rows of a picture that pretraining left: tiles with what is known about them.

    Where rows and tiles cannot be told apart the whole picture is one tile.
    """
    path = run.out / f"pretrain/pictures/{name}.jpg"
    described = (read_json_or_none(path.with_suffix(".json")) or {}).get("rows") or []
    try:
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
    except (OSError, ValueError):
        return []
    step, rest = divmod(whole.height + TILE_GAP, max(len(described), 1))
    columns, rest_across = divmod(whole.width + TILE_GAP, step)
    if not described or rest or rest_across:
        return [{"tiles": [gallery.embed_image(whole, 1400)], "about": {}}]
    side = step - TILE_GAP
    return [
        {
            "tiles": [
                gallery.embed_image(whole.crop((x, y, x + side, y + side)), 400)
                for x in range(0, columns * step, step)
            ],
            "about": about,
        }
        for y, about in zip(range(0, len(described) * step, step), described, strict=True)
    ]


def bad_samples(run: Run) -> dict[str, Any]:
    """Return the samples that pretraining replaced, the first in rows; empty if there are none.

    `limit` is how many different ones each process bore before it stopped, None if unknown.
    """
    rows = [row for row in read_json_lines(run.out / "pretrain/bad_samples.jsonl") if row]
    if not rows:
        return {}
    try:
        text = (run.out / "pretrain/config.yaml").read_text(encoding="utf-8")
        limit = yaml.safe_load(text)["data"]["max_bad_samples"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        limit = None
    different = len({str(row.get("sample")) for row in rows})
    shown = rows[:NUM_BAD_SAMPLES]
    return {"count": len(rows), "different": different, "limit": limit, "rows": shown}


def arm_rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per arm with mean and deviation of every metric."""
    return [
        {"arm": arm, "words": ARM_WORDS[arm], "metrics": run.results["summary"][arm]}
        for arm in ARMS
        if run.results["detection"][arm]
    ]
