"""What trained detectors find on other sets, as `tools/train_voc.sh --eval-on` left it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_json_or_none, sha256_of
from tools.flow import charts, detection_section, gallery, results
from tools.flow import report_data as data
from tools.flow.config import ARMS

NUM_PICTURES = 6
_SIDE_FILES = ("-pr", "-errors", "-detections")  # beside eval-on-NAME.json
_MODEL = "model_final.pth"
_KEPT = ("per_class", "num_test_images")


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
            result = read_json_or_none(folder / f"eval-on-{name}.json")
            if not isinstance(result, dict):
                continue
            if is_outdated(folder, name, result):
                outdated.append(f"{arm}/{folder.name}")
            else:
                rows[arm].append(results.seed_row(seed["seed"], result, _KEPT))
    arms = [
        {"arm": arm, "words": data.ARM_WORDS[arm], "metrics": results.summarise(rows[arm]),
         "num_images": rows[arm][0]["num_test_images"]}
        for arm in ARMS if rows[arm]
    ]  # fmt: skip
    has_coco = any(row["metrics"]["coco_AP"]["n"] for row in arms)
    pairs = [pair for pair, both in results.PAIRS.items() if all(rows[arm] for arm in both)]
    return {
        "name": name, "arms": arms, "outdated": outdated,
        "metrics": results.ALL_METRICS if has_coco else results.METRICS,
        "pairs": [pair_part(rows, pair) for pair in pairs],
        "shots": shots(run, name, rows),
    }  # fmt: skip


def pair_part(rows: Mapping[str, Any], pair: str) -> dict[str, Any]:
    """Return the paired differences of two arms, AP of every class and its chart."""
    title = results.PAIR_TITLES[pair]
    classes = data.per_class_rows(rows, pair, "per_class")
    return {
        "title": title,
        "difference": results.compare(rows, *results.PAIRS[pair]),
        "classes": classes,
        "chart": charts.dumbbell_chart(f"AP per class, {title.lower()}", classes),
    }


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
    return model.stat().st_mtime > written and sha256_of(model) != result.get("model_sha256")


def shots(run: data.Run, name: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first pictures of the set with the boxes of both arms, of the lowest seed."""
    file = f"eval-on-{name}-detections.json"
    pair, seed, arms = detection_section.saved_detections(run, rows, file)
    summaries = (run.json(f"detection/{arm}/eval-on-{name}.json") for arm in arms)
    folder = next((summary["set"] for summary in summaries if summary.get("set")), None)
    pictures = gallery.rows(gallery.shared(arms), Path(folder), NUM_PICTURES) if folder else []
    title = results.PAIR_TITLES[pair].lower()
    return {"pair": title, "seed": seed, "arms": list(arms), "first": pictures}
