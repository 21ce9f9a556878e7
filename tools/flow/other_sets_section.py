"""What trained detectors find on other sets, as `tools/train_voc.sh --eval-on` left it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.flow import charts, gallery, results
from tools.flow import report_data as data
from tools.flow.config import ARMS
from tools.flow.files import read_json
from tools.flow.fingerprint import bytes_digest

NUM_PICTURES = 6
_SIDE_FILES = ("-pr", "-errors", "-detections")  # beside eval-on-NAME.json
_MODEL = "model_final.pth"


def context(run: data.Run) -> dict[str, Any]:
    """What `other_sets_section.html.j2` shows: a part for each set, in the order of their names."""
    names = {name for arm in ARMS for name in _names(run.out / f"detection/{arm}")}
    parts = [other_set(run, name) for name in sorted(names)]
    return {"other_sets": [part for part in parts if part["arms"] or part["outdated"]]}


def _names(arm: Path) -> set[str]:
    stems = {path.stem for path in arm.glob("seed-*/eval-on-*.json")}
    beside = {stem + end for stem in stems for end in _SIDE_FILES}
    return {stem.removeprefix("eval-on-") for stem in stems - beside}


def other_set(run: data.Run, name: str) -> dict[str, Any]:
    """Return the figures of every arm on one set, the paired differences, classes and pictures.

    `outdated`: seeds that were trained again since, as "arm/seed-N"; they count nowhere.
    """
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    outdated = []
    for arm in ARMS:
        for seed in run.results["detection"][arm]:
            folder = run.out / f"detection/{arm}/seed-{seed['seed']}"
            result = read_json(folder / f"eval-on-{name}.json")
            if not isinstance(result, dict):
                continue
            if is_outdated(folder, name, result):
                outdated.append(f"{arm}/{folder.name}")
            else:
                rows[arm].append(_row(seed["seed"], result))
    arms = [
        {"arm": arm, "words": data.ARM_WORDS[arm], "metrics": results.summarise(rows[arm]),
         "num_images": rows[arm][0]["num_test_images"]}
        for arm in ARMS if rows[arm]
    ]  # fmt: skip
    pairs = [
        {"title": results.PAIR_TITLES[pair], "difference": results.compare(rows, *both)}
        for pair, both in results.PAIRS.items()
        if all(rows[arm] for arm in both)
    ]
    return {
        "name": name, "arms": arms, "pairs": pairs, "outdated": outdated,
        "has_coco": any(row["metrics"]["coco_AP"]["n"] for row in arms),
        "classes": [_classes(rows, pair) for pair, both in results.PAIRS.items()
                    if all(rows[arm] for arm in both)],
        "shots": shots(run, name, rows),
    }  # fmt: skip


def is_outdated(folder: Path, name: str, result: Mapping[str, Any]) -> bool:
    """Whether the detector was trained again after it was evaluated on a set.

    Args:
        folder: Of the seed.
        name: Of the set.
        result: Content of eval-on-NAME.json.
    """
    model = folder / _MODEL
    if not model.is_file():  # a copy of the figures alone
        return False
    written = (folder / f"eval-on-{name}.json").stat().st_mtime
    return model.stat().st_mtime > written and bytes_digest(model) != result.get("model_sha256")


def _row(seed: int, result: Mapping[str, Any]) -> dict[str, Any]:
    coco = result.get("coco") or {}
    kept = (*results.METRICS, "per_class", "num_test_images")
    figures = {f"coco_{metric}": coco.get(metric) for metric in results.METRICS}
    return {"seed": seed} | figures | {key: result.get(key) for key in kept}


def _classes(rows: Mapping[str, Any], pair: str) -> dict[str, Any]:
    """Return (class, random, pretrained) of AP, means over the seeds, and their chart."""
    treated, control = (data.class_means(rows[arm], "per_class") for arm in results.PAIRS[pair])
    names = sorted(control.keys() | treated.keys())
    table = [(name, control.get(name), treated.get(name)) for name in names]
    title = results.PAIR_TITLES[pair]
    chart = charts.dumbbell_chart(f"AP per class, {title.lower()}", table)
    return {"title": title, "rows": table, "chart": chart}


def shots(run: data.Run, name: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first pictures of the set with the boxes of both arms, of the lowest seed."""
    pair = "fine_tuned" if any(rows[arm] for arm in results.PAIRS["fine_tuned"]) else "frozen"
    treated, control = results.PAIRS[pair]
    seeds = [{row["seed"] for row in rows[arm]} for arm in (control, treated) if rows[arm]]
    shared = set.intersection(*seeds) if seeds else set()
    seed = min(shared, default=None)
    found, folder = {}, None
    for arm in (control, treated) if seed is not None else ():
        place = run.out / f"detection/{arm}"
        boxes = read_json(place / f"seed-{seed}/eval-on-{name}-detections.json")
        if rows[arm] and isinstance(boxes, list):
            found[arm] = boxes
            folder = folder or (read_json(place / f"eval-on-{name}.json") or {}).get("set")
    pictures = gallery.rows(gallery.shared(found), Path(folder), NUM_PICTURES) if folder else []
    title = results.PAIR_TITLES[pair].lower()
    return {"pair": title, "seed": seed, "arms": list(found), "first": pictures}
