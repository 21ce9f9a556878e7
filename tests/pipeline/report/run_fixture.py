"""Made-up run folders in the formats that docs/files.md describes: a pipeline's and a study's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.files import write_json as dump
from common.files import write_json_lines as dump_lines
from common.picture_draws import METRICS, NUM_DRAWS, write_draws

CLASSES = ("bird", "fish", "mammal", "plant", "tool")
ARM_LEVELS = {"random": 30.0, "pretrained": 38.0, "random_frozen": 12.0, "pretrained_frozen": 25.0}
RECORD = {"format": "fa-stage-2", "status": "finished", "current": True, "key": "0", "label": "",
          "error": None, "seconds": 61.25, "peak_memory_bytes": 900 << 20}  # fmt: skip


def ap50(arm: str, seed: int) -> float:
    """What `make_run` writes."""
    return ARM_LEVELS[arm] + 2.5 * math.sin(7 * seed + ARM_LEVELS[arm])


def picture(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path, quality=85)


def make_run(out: Path, seeds: int = 2) -> Path:
    """Write a finished run with `seeds` seeds of all four arms; returns its folder."""
    plan = ["data", "shards", "probe_train", "probe_val", "pretrain", "convert"]
    plan += [f"{arm}/seed-{seed}" for seed in range(seeds) for arm in ARM_LEVELS]
    for name in (*plan, "report"):
        dump(out / f"stages/{name}.json", RECORD)
    run = {"format": "fa-stage-2", "name": "made-up", "plan": [*plan, "report"], "dataset": "data"}
    run |= {"called": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef0123456789abcdef"}
    run |= {"command": ["bash", "tools/run_pipeline.sh", "demo", "x=<script>alert(1)</script>"]}
    run |= {"config": {"detection": {"seeds": 3}}, "versions": {"torch": "2.15.0"}}
    dump(out / "experiment.json", run)
    dataset = {"name": "made-up", "kind": "procedural", "classes": list(CLASSES), "pool": 2000}
    dump(out / "data/dataset.json", dataset | {"splits": {"train": 200, "test": 100}})
    skipped = [{"file": "broken.jpg", "reason": "does not decode"}]
    dump(out / "shards/index.json", {"format": "fa-shards-1", "skipped": skipped})
    for index in range(8):
        picture(out / f"data/VOC2007/JPEGImages/{index:06d}.jpg", 200, 160, index)
    _pretrain(out / "pretrain")
    card = {"arch": {"depth": 50}, "branch": "online", "num_tensors": 265, "dropped": ["a.weight"]}
    card |= {"stages": {"res5": 4.5e-7}, "max_relative_difference": 4.5e-7, "seconds": 1.5}
    dump(out / "convert/backbone.json", card)
    for arm in ARM_LEVELS:
        for seed in range(seeds):
            _detection(out / f"detection/{arm}/seed-{seed}", arm, ap50(arm, seed))
    return out


def change(path: Path, **facts: Any) -> None:
    """Change some keys of a JSON file."""
    dump(path, json.loads(path.read_text()) | facts)


def evaluate_elsewhere(out: Path, name: str, gain: float = -10.0) -> None:
    """What `--eval-on` leaves of every seed of a run: its own figures, `gain` points higher.

    In draw d pictures add d / 100 points to all models, and another d / 1000 to pretrained ones.
    """
    for path in sorted(out.glob("detection/*/seed-*/result.json")):
        own = json.loads(path.read_text())
        changed = {metric: own[metric] + gain for metric in METRICS}
        changed |= {"model_sha256": "0" * 64, "data_sha256": "d", "num_test_images": 90}
        dump(path.with_name(f"eval-on-{name}.json"), own | changed)
        more = np.arange(NUM_DRAWS) * (0.01 if path.parts[-3].startswith("random") else 0.011)
        draws = {metric: changed[metric] + more for metric in METRICS}
        write_draws(path.with_name(f"eval-on-{name}-draws.json"), draws, changed)
        for kind in ("detections", "pr", "errors"):
            if path.with_name(f"{kind}.json").exists():
                text = path.with_name(f"{kind}.json").read_text()
                path.with_name(f"eval-on-{name}-{kind}.json").write_text(text)


def _pretrain(folder: Path) -> None:
    rows: list[dict[str, Any]] = [{"kind": "knn", "step": 0, "epoch": 0.0, "knn_top1": 0.31}]
    for step in range(50, 1050, 50):
        share = step / 1000
        row = {"kind": "train", "step": step, "epoch": 20 * share, "loss": 4.8 - 2 * share}
        row |= {"fa_cosine": "nan" if step < 200 else 0.8, "effective_rank": 12 + 30 * share}
        rows.append(row | {"images_per_second": 180.0, "positive_cosine": 0.5 + 0.4 * share})
        if step % 250 == 0:
            knn = 0.31 + 0.4 * share
            rows.append({"kind": "knn", "step": step, "epoch": 20 * share, "knn_top1": knn})
    dump_lines(folder / "metrics.jsonl", rows)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 10')  # A killed writer's last line.
    summary = {"steps": 1000, "epochs": 20, "seconds": 700.0, "images_per_second": 181.5}
    dump(folder / "summary.json", summary | {"knn_top1": 0.71, "knn_top1_initial": 0.31})
    (folder / "config.yaml").write_text("data: {shards: shards}\n")
    dump(folder / "environment.json", {"commit": "0123456789abcdef"})
    for name in ("views", "neighbours_before", "neighbours"):
        picture(folder / f"pictures/{name}.jpg", 296, 196, len(name))
        labels = ["bird"] * 4 + ["fish"] * 2
        query = {"query": "q", "query_label": "bird", "neighbour_labels": labels}
        dump(folder / f"pictures/{name}.json", {"rows": [{}] if name == "views" else [query] * 3})


def _detection(folder: Path, arm: str, level: float) -> None:
    per_class = {name: level / 2 + 3 * index for index, name in enumerate(CLASSES)}
    result = {"arm": arm, "AP": level / 2, "AP50": level, "AP75": level / 3, "iterations": 400}
    coco = {"AP": level / 2 + 0.25, "AP50": level + 0.5, "AP75": level / 3 + 0.125}
    dump(folder / "result.json", result | {"per_class": per_class, "coco": coco})
    shares = {100: 0.3, 200: 0.7, 400: 1.0}
    curve = [{"iteration": i, "AP50": level * share} for i, share in shares.items()]
    dump_lines(folder / "curve.jsonl", curve)
    dump(folder / "detections.json", [_detections(i, arm) for i in range(8)])
    # Straight lines down to a recall of 0.8.
    falling = [max(0.0, level / 50 * (1 - recall / 80)) for recall in range(101)]
    classes = {name: {"0.50": {"precision": falling}} for name in CLASSES}
    dump(folder / "pr.json", {"format": "fa-pr-1", "classes": classes})
    lists = [{"use": use, "name": use, "num_pictures": n, "num_empty": 1, "num_objects": 2 * n,
              "num_ignored": 0, "median_side": 80.5, "sizes": [0, 0, 0, n, n, 0, 0, 0, 0, 0],
              "objects": dict.fromkeys(CLASSES, n), "pictures": dict.fromkeys(CLASSES, n - 1)}
             for use, n in (("training", 200), ("test", 100))]  # fmt: skip
    samples = [_detections(i, arm) for i in range(4)]
    labels = {"format": "fa-labels-1", "name": "made-up", "classes": list(CLASSES)}
    dump(folder / "labels.json", labels | {"lists": lists, "samples": samples, "repaired": []})
    kinds = ("localisation", "confusion", "both", "duplicate", "background", "missed")
    best = dict.fromkeys(kinds, 100 - level) | {"correct": level}
    gained = {kind: (place + 1) * level / 20 for place, kind in enumerate(kinds)}
    errors = {"format": "fa-errors-1", "num_objects": 100, "best_scored": best}
    own = {name: {"num_objects": 20, "best_scored": {k: v / 5 for k, v in best.items()}}
           for name in CLASSES}  # fmt: skip
    taken = [{"object": CLASSES[0], "taken_for": CLASSES[1], "count": 7}]
    dump(folder / "errors.json",
         errors | {"AP50_gained": gained, "classes": own, "confusions": taken})  # fmt: skip


def _detections(index: int, arm: str) -> dict[str, Any]:
    name, other = CLASSES[index % 5], CLASSES[(index + 2) % 5]
    is_good = arm.startswith("pretrained")
    shift = 4 if is_good else 30
    truth = [
        {"class": name, "box": [20, 30, 100, 120]},
        {"class": other, "box": [110, 50, 190, 150]},
    ]
    first = {"kind": "correct" if is_good else "localisation", "box": [20 + shift, 30, 100, 122]}
    found = [
        {"class": name, "score": 0.91, **first},
        {"class": name, "score": 0.42, "box": [112, 52, 188, 149], "kind": "confusion"},
        {"class": other, "score": 0.2, "box": [0, 0, 30, 30], "kind": "background"},
    ]
    about = {"file_name": f"VOC2007/JPEGImages/{index:06d}.jpg", "width": 200, "height": 160}
    return about | {"ground_truth": truth, "detections": found}


GAINS = (3.1, 2.8, 3.3, 2.7)


def make_study(out: Path) -> Path:
    """Two variants with four seeds of pretraining, a shared `random`; one pretraining failed."""
    plan = []
    for seed, gain in enumerate(GAINS):
        for variant, level in (("base", 50.0 + seed), ("fa", 50.0 + seed + gain)):
            stage = f"{variant}/seed-{seed}"
            dump(out / f"pretrain/{stage}/summary.json", {"knn_top1": level / 100})
            rows = [{"kind": "train", "step": step, "loss": level / step} for step in (10, 20)]
            dump_lines(out / f"pretrain/{stage}/metrics.jsonl", rows)
            dump(out / f"linear/{stage}/linear.json", {"top1": None if seed else level / 100})
            plan += [f"pretrain/{stage}", f"linear/{stage}"]
        for arm, level in (("random", 20.0), ("base", 24.0), ("fa", 24.0 + gain)):
            result = {"AP": level / 2, "AP50": level, "AP75": level / 4}
            dump(out / f"detection/{arm}/seed-{seed}/result.json", result)
            plan.append(f"{arm}/seed-{seed}")
    for number, name in enumerate(plan):
        dump(out / f"stages/{name}.json", RECORD | {"commit": "abc" if number else "abd"})
    failed = {"status": "failed", "error": "no <memory>", "label": "FA"}
    dump(out / "stages/pretrain/fa/seed-4.json", RECORD | failed)
    comparison = {"name": "fa - base", "terms": {"fa": 1, "base": -1}, "decides": True}
    rows = {name: name for name in ("random", "base", "fa")}
    table = {"name": "compare", "title": "", "claim": "fa helps", "rows": rows, "left_out": {}}
    run = {"format": "fa-stage-2", "name": "compare", "plan": [*plan, "pretrain/fa/seed-4"]}
    run |= {"arms": ["random", "base", "fa"], "tables": [table | {"comparisons": [comparison]}]}
    dump(out / "experiment.json", run)
    return out


def make_compare(out: Path, seeds: int = 4) -> Path:
    """As the preset `compare` leaves it: a question, and frozen backbones, which gain half."""
    run = json.loads((make_study(out) / "experiment.json").read_text())
    for seed, gain in enumerate(GAINS):
        for arm, level in (("random", 4.0), ("base", 8.0), ("fa", 8.0 + gain / 2)):
            stage = f"{arm}_frozen/seed-{seed}"
            result = {"AP": level / 2, "AP50": level, "AP75": level / 4}
            dump(out / f"detection/{stage}/result.json", result)
            dump(out / f"stages/{stage}.json", RECORD)
            run["plan"].append(stage)
    plan = [name for name in run["plan"] if int(name.rpartition("-")[2]) < seeds]
    arms = [*run["arms"], *(f"{arm}_frozen" for arm in run["arms"])]
    table = run["tables"][0] | {"claim": "", "rows": {arm: arm for arm in arms}}
    config = {"question": "Does FA help?", "seeds": {"pretraining": seeds}}
    change(out / "experiment.json", plan=plan, arms=arms, tables=[table], config=config)
    return out
