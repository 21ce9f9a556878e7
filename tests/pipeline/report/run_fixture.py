"""A made-up run folder in the formats that docs/files.md describes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("bird", "fish", "mammal", "plant", "tool")
ARM_LEVELS = {"random": 30.0, "pretrained": 38.0, "random_frozen": 12.0, "pretrained_frozen": 25.0}


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def dump_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path, quality=85)


def make_run(out: Path, seeds: int = 3) -> Path:
    """Write a finished run with `seeds` seeds of all four arms; returns its folder."""
    plan = ["data", "shards", "probe_train", "probe_val", "pretrain", "convert"]
    plan += [f"{arm}/seed-{seed}" for seed in range(seeds) for arm in ARM_LEVELS]
    plan += ["report"]
    _records(out, plan)
    _data(out)
    _pretrain(out)
    _convert(out)
    for arm, level in ARM_LEVELS.items():
        for seed in range(seeds):
            _detection(out, arm, seed, level + 2.5 * math.sin(7 * seed + level))
    return out


def evaluate_elsewhere(out: Path, name: str, folder: Path, gain: float = -10.0) -> None:
    """What `--eval-on` leaves of every seed of a run: its own figures, `gain` points higher."""
    for index in range(10):
        picture(folder / f"VOC2007/JPEGImages/{index:06d}.jpg", 200, 160, index)
    for path in sorted(out.glob("detection/*/seed-*/result.json")):
        own = json.loads(path.read_text())
        changed = {metric: own[metric] + gain for metric in ("AP", "AP50", "AP75")}
        coco = {metric: value + gain for metric, value in own["coco"].items()}
        about = {"name": name, "num_test_images": 10, "coco": coco, "model_sha256": "0" * 64}
        dump(path.with_name(f"eval-on-{name}.json"), own | changed | about)
        for kind in ("detections", "pr", "errors"):
            text = path.with_name(f"{kind}.json").read_text()
            path.with_name(f"eval-on-{name}-{kind}.json").write_text(text)
        dump(path.parents[1] / f"eval-on-{name}.json", {"name": name, "set": str(folder)})


def _records(out: Path, plan: list[str]) -> None:
    record = {"format": "fa-stage-2", "status": "finished", "current": True, "key": "0"}
    record |= {"seconds": 61.25, "peak_memory_bytes": 900 << 20}
    for name in plan:
        status = "running" if name == "report" else "finished"
        dump(out / f"stages/{name}.json", record | {"status": status})
    dump(
        out / "experiment.json",
        {
            "format": "fa-stage-2",
            "name": "made-up",
            "plan": plan,
            "called": "2026-01-02T03:04:05+00:00",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "command": ["bash", "tools/run_pipeline.sh", "demo", "x=<script>alert(1)</script>"],
            "config": {"name": "made-up", "detection": {"seeds": 3}},
            "dataset": "data",
            "versions": {"python": "3.11.7", "torch": "2.15.0"},
            "machine": {"system": "Linux", "processor": "A CPU", "num_cores": 2},
        },
    )


def change_record(out: Path, stage: str, **facts: Any) -> None:
    """Change what the record of a stage says."""
    path = out / f"stages/{stage}.json"
    dump(path, json.loads(path.read_text()) | facts)


def _data(out: Path) -> None:
    dump(
        out / "data/dataset.json",
        {
            "format": "fa-dataset-1",
            "name": "made-up",
            "kind": "procedural",
            "classes": list(CLASSES),
            "splits": {"train": 200, "test": 100},
            "pool": 2000,
            "notes": "",
        },
    )
    for stage in ("shards", "probe_train", "probe_val"):
        skipped = [{"file": "broken.jpg", "reason": "does not decode"}] if stage == "shards" else []
        dump(out / stage / "index.json", {"format": "fa-shards-1", "skipped": skipped})
    for index in range(10):
        picture(out / f"data/VOC2007/JPEGImages/{index:06d}.jpg", 200, 160, index)


def _pretrain(out: Path) -> None:
    rows: list[dict[str, Any]] = [{"kind": "knn", "step": 0, "epoch": 0.0, "knn_top1": 0.31}]
    for step in range(10, 1010, 10):
        share = step / 1000
        rows.append(
            {
                "kind": "train",
                "step": step,
                "epoch": 20 * share,
                "loss": 4.8 - 2 * share + 0.1 * math.sin(step),
                "lr": 0.001 * (1 + math.cos(math.pi * share)) / 2,
                "images_per_second": 180 + 5 * math.sin(step / 50),
                "data_wait_share": 0.02,
                "feature_std": 0.05 + 0.02 * share,
                "effective_rank": 12 + 30 * share,
                "fa_cosine": "nan" if step < 50 else 0.8,
                "positive_cosine": 0.5 + 0.4 * share,
                "positive_cosine_std": 0.2 - 0.05 * share,
                "negative_cosine": 0.4 * (1 - share),
                "negative_cosine_std": 0.1,
                "neighbour_age": 3.5,
                "self_hit_rate": 0.25,
                "neighbour_label_agreement": 0.3 + 0.4 * share,
            }
        )
        if step % 100 == 0:
            rows.append(_histograms(step, 20 * share))
        if step % 250 == 0:
            knn = 0.31 + 0.4 * share
            rows.append({"kind": "knn", "step": step, "epoch": 20 * share, "knn_top1": knn})
    dump_lines(out / "pretrain/metrics.jsonl", rows)
    with (out / "pretrain/metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 10')  # A killed writer's last line.
    dump(
        out / "pretrain/summary.json",
        {
            "steps": 1000,
            "epochs": 20,
            "seconds": 700.0,
            "images_per_second": 181.5,
            "knn_top1": 0.71,
            "knn_top1_initial": 0.31,
            "num_samples": 2000,
            "num_skipped_samples": 1,
            "peak_memory_bytes": 1 << 30,
        },
    )
    (out / "pretrain/config.yaml").write_text("data: {shards: shards}\n")
    dump(out / "pretrain/environment.json", {"commit": "0123456789abcdef"})
    _grid(out / "pretrain/pictures/views", 3, [{"sample": f"{i:06d}"} for i in range(6)])
    rows = []
    for i in range(6):
        labels = [CLASSES[i % 5]] * 4 + [CLASSES[(i + 1) % 5]] * 2
        rows.append({"query": f"q{i}", "query_label": CLASSES[i % 5], "neighbour_labels": labels})
    _grid(out / "pretrain/pictures/neighbours", 7, rows)


def _histograms(step: int, epoch: float) -> dict[str, Any]:
    """Positives between 0.8 and 1, negatives half each side of 0."""
    shares = {"positives": [0.0] * 18 + [0.25, 0.75]}
    shares["negatives"] = [0.0] * 9 + [0.5, 0.5] + [0.0] * 9
    return {"kind": "similarity", "step": step, "epoch": epoch, **shares}


def _grid(stem: Path, columns: int, rows: list[dict[str, Any]]) -> None:
    picture(stem.with_suffix(".jpg"), columns * 100 - 4, len(rows) * 100 - 4, columns)
    dump(stem.with_suffix(".json"), {"rows": rows})


def _convert(out: Path) -> None:
    dump(
        out / "convert/backbone.json",
        {
            "format": "fa-d2-1",
            "arch": {"depth": 50, "width_per_group": 16},
            "preprocessing": {"pixel_mean": [123.675, 116.28, 103.53], "input_format": "RGB"},
            "branch": "online",
            "weights_sha256": "ab" * 32,
            "num_tensors": 265,
            "dropped": ["projector.0.weight"],
            "stages": {"res2": 1e-7, "res3": 2e-7, "res4": 3e-7, "res5": 4.5e-7},
            "max_relative_difference": 4.5e-7,
            "seconds": 1.5,
        },
    )


def _detection(out: Path, arm: str, seed: int, ap50: float) -> None:
    folder = out / f"detection/{arm}/seed-{seed}"
    per_class = {name: ap50 / 2 + 3 * index for index, name in enumerate(CLASSES)}
    dump(
        folder / "result.json",
        {
            "arm": arm,
            "seed": seed,
            "AP": ap50 / 2,
            "AP50": ap50,
            "AP75": ap50 / 3,
            "per_class": per_class,
            "per_class_AP50": {name: value * 2 for name, value in per_class.items()},
            "iterations": 400,
            "seconds": 120.0,
            "frozen": arm.endswith("_frozen"),
            "metric_year": 2012,
            "peak_memory_bytes": 1 << 30,
            "coco": {"AP": ap50 / 2 + 0.25, "AP50": ap50 + 0.5, "AP75": ap50 / 3 + 0.125},
        },
    )
    shares = {100: 0.3, 200: 0.7, 300: 0.9, 400: 1.0}
    dump_lines(
        folder / "curve.jsonl",
        [
            {"iteration": i, "AP": ap50 * s / 2, "AP50": ap50 * s, "AP75": ap50 * s / 3}
            for i, s in shares.items()
        ],
    )
    dump(folder / "detections.json", [_detections(i, arm, seed) for i in range(10)])
    dump(folder / "pr.json", _curves(ap50))
    dump(folder / "errors.json", _errors(ap50))


def _curves(ap50: float) -> dict[str, Any]:
    """Straight lines down to a recall of 0.8: from 2 x AP50, by class."""
    levels = [level / 100 for level in range(101)]
    classes = {}
    for index, name in enumerate(CLASSES):
        top = min(1.0, (ap50 + 3 * index) / 50)
        precision = [round(max(0.0, top * (1 - level / 0.8)), 4) for level in levels]
        classes[name] = {"0.50": {"precision": precision, "max_recall": 0.79}}
    return {"format": "fa-pr-1", "metric_year": 2012, "recall": levels, "classes": classes}


def _errors(ap50: float) -> dict[str, Any]:
    """Of 20 objects a class, a share of `ap50` found; every kind costs what its place says."""
    kinds = ("localisation", "confusion", "both", "duplicate", "background")

    def row(count: int) -> dict[str, Any]:
        correct = round(count * ap50 / 100)
        wrong = [(count - correct) // 5] * 4
        wrong.append(count - correct - sum(wrong))
        best = {"correct": correct, **dict(zip(kinds, wrong, strict=True))}
        gained = {kind: (place + 1) * ap50 / 20 for place, kind in enumerate((*kinds, "missed"))}
        return {
            "num_objects": count,
            "best_scored": {**best, "missed": count - correct},
            "all": {**best, "ignored": 0, "missed": count - correct, "unseen": 0},
            "AP50": ap50,
            "AP50_gained": {**gained, "all_false": ap50, "all_missed": 0.5},
        }

    return {
        "format": "fa-errors-1",
        "num_images": 100,
        **row(20 * len(CLASSES)),
        "classes": {name: row(20) for name in CLASSES},
        "confusions": [{"object": "bird", "taken_for": "fish", "count": round(ap50)}],
    }


def _detections(index: int, arm: str, seed: int) -> dict[str, Any]:
    name, other = CLASSES[index % 5], CLASSES[(index + 2) % 5]
    shift = 4 if arm.startswith("pretrained") else 30
    truth = [
        {"class": name, "box": [20, 30, 100, 120], "difficult": False},
        {"class": other, "box": [110, 50, 190, 150], "difficult": False},
    ]
    first = "correct" if shift == 4 else "localisation"
    found = [
        {"class": name, "score": 0.91, "box": [20 + shift, 30, 100 + shift, 122], "kind": first},
        {"class": name, "score": 0.42, "box": [112, 52, 188, 149], "kind": "confusion"},
        {"class": other, "score": 0.2, "box": [0, 0, 30, 30], "kind": "background"},
    ]
    return {
        "file_name": f"VOC2007/JPEGImages/{index:06d}.jpg",
        "width": 200,
        "height": 160,
        "ground_truth": truth,
        "detections": found,
    }
