"""Detection trials: several initialisations x seeds, each one run of tools/train_voc.sh.

`{seed}` in the name of weights or of a data set stands for the seed: then each seed has its own
pretraining run or its own split, and the spread over seeds covers that as well.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import check_keys, read_yaml
from common.errors import UserError
from common.files import read_json_or_none, sha256_of
from common.stats import RULE, Contrast, compare, mean_std
from pipeline.grid.jobs import Step
from pipeline.grid.schedule import Work
from pipeline.grid.store import Row
from pipeline.stages import digest

FORMAT = "fa-trials-1"
METRICS = ("AP50", "AP", "AP75")
COCO_METRICS = ("coco_AP50", "coco_AP", "coco_AP75")  # by COCO's metric, on the same boxes
RANDOM = "random"
_PER_CLASS = {"AP": "per_class", "AP50": "per_class_AP50"}  # keys of result.json


@dataclass(frozen=True)
class Arm:
    """One initialisation with one seed.

    Attributes:
        name: In tables.
        seed: Of the detector's training.
        weights: Detectron2 weights with their card, or None for random ones.
        weights_digest: SHA-256 of what was given (before a conversion), or "random".
        data: The labelled set.
        fingerprint: Of weights, config, data and words: what decides the results but for the seed.
    """

    name: str
    seed: int
    weights: Path | None
    weights_digest: str
    data: Path
    fingerprint: str


@dataclass(frozen=True)
class Protocol:
    """What all arms share.

    Attributes:
        config: Detectron2's YAML.
        data: The labelled set, perhaps with `{seed}`.
        words: Further words for tools/train_voc.sh.
    """

    config: Path
    data: str
    words: tuple[str, ...]


def read_inits(words: Sequence[str]) -> dict[str, str | None]:
    """``["random", "byol=backbone.pkl"]`` -> {"random": None, "byol": "backbone.pkl"}.

    Raises:
        UserError: For names that come twice or cannot be.
    """
    found: dict[str, str | None] = {}
    for word in words:
        name, separator, file = word.partition("=")
        name = name.strip()
        if not name or not name.isprintable() or (not separator and name != RANDOM):
            raise UserError(f"--init {word!r}: give NAME=FILE, or random")
        if name in found:
            raise UserError(f"--init {name}: comes twice; choose another name")
        found[name] = None if not separator or file == RANDOM else file
    return found


def make_arm(
    name: str, file: str | None, seed: int, protocol: Protocol, out: Path, root: Path
) -> Arm:
    """An initialisation ready to be trained from; weights without a card are converted.

    Raises:
        UserError: If files are missing, or the conversion fails.
    """
    weights, weights_digest = None, RANDOM
    if file is not None:
        given = weights = Path(file.replace("{seed}", str(seed))).resolve()
        if not given.is_file():
            raise UserError(f"--init {name}: {given} does not exist")
        weights_digest = _bytes_digest(given)
        if not given.with_suffix(".json").is_file():
            weights = _converted(given, weights_digest, name, out, root)
    data = Path(protocol.data.replace("{seed}", str(seed))).resolve()
    fingerprint = digest(
        {
            "weights": weights_digest,
            "config": config_digest(protocol.config),
            "data": data_digest(data),
            "words": list(protocol.words),
        }
    )
    return Arm(name, seed, weights, weights_digest, data, fingerprint)


@functools.cache
def _bytes_digest(path: Path) -> str:
    return sha256_of(path)


def _converted(given: Path, weights_digest: str, name: str, out: Path, root: Path) -> Path:
    """Detectron2 weights made of a checkpoint or of torchvision's, MoCo's .. (once)."""
    weights = out / "weights" / f"{slug(name)}-{weights_digest[:8]}.pkl"
    if not (weights.is_file() and weights.with_suffix(".json").is_file()):
        weights.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(root / "tools/convert_to_d2.py"), str(given), str(weights)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise UserError(f"--init {name}: {said.removeprefix('error: ')}")
    return weights


def config_digest(config: Path) -> str:
    """Hash of a config and of those that it is based on (_BASE_).

    Raises:
        UserError: If one is missing.
    """
    texts, path = [], config
    while True:
        raw = read_yaml(path)
        texts.append(raw)
        base = raw.get("_BASE_")
        if not base or len(texts) > 10:
            return digest({"configs": json.loads(json.dumps(texts, default=str))})
        path = path.parent / str(base)


@functools.cache
def data_digest(data: Path) -> str:
    """Hash of a set's lists and annotations, and of the names and sizes of its pictures.

    Raises:
        UserError: If there is no such folder.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    found = []
    for path in sorted(data.rglob("*")):
        parts = path.relative_to(data).parts
        if not path.is_file() or not {"JPEGImages", "Annotations", "ImageSets"} & set(parts[:-1]):
            continue
        what = path.stat().st_size if "JPEGImages" in parts else sha256_of(path)
        found.append(["/".join(parts), what])
    return digest({"files": found, "card": read_json_or_none(data / "dataset.json")})


def make_work(arm: Arm, protocol: Protocol, out: Path, root: Path) -> Work:
    """An arm as a command."""
    seed = arm.seed
    folder = out / "trials" / f"{slug(arm.name)}-{arm.fingerprint[:8]}"
    result = folder / f"seed-{seed}" / "result.json"
    command = (
        *("bash", str(root / "tools/train_voc.sh")),
        *(RANDOM if arm.weights is None else str(arm.weights), "--config", str(protocol.config)),
        *("--data", str(arm.data), "--out", str(folder), "--seeds", str(seed)),
        *("--arm", arm.name, *protocol.words),
    )
    return Work(
        arm.fingerprint, seed, f"{arm.name}, seed {seed}", (Step("train_voc", command, result),),
        folder / f"seed-{seed}", lambda: read_result(result),
    )  # fmt: skip


def read_result(path: Path) -> dict[str, float]:
    """AP, AP50, AP75, by COCO's metric too (not in older files), and per class as `AP:dog`.

    All are in percent.

    Raises:
        ValueError: If one is missing.
    """
    raw = read_json_or_none(path)
    if not isinstance(raw, dict) or not all(isinstance(raw.get(m), int | float) for m in METRICS):
        raise ValueError(f"{path.name}: lacks one of {', '.join(METRICS)}")
    found = {metric: float(raw[metric]) for metric in METRICS}
    coco = raw.get("coco") or {}
    for metric in COCO_METRICS:
        value = coco.get(metric.removeprefix("coco_"))
        if value is not None:
            found[metric] = float(value)
    for metric, key in _PER_CLASS.items():
        for name, value in (raw.get(key) or {}).items():
            if value is not None:  # a class without test objects has no AP
                found[f"{metric}:{name}"] = float(value)
    return found


def read_pairs(words: Sequence[str], names: Sequence[str], control: str) -> list[tuple[str, str]]:
    """The comparisons: every arm with the control, then those asked for.

    Raises:
        UserError: For arms that there are not.
    """
    pairs = [(name, control) for name in names if name != control]
    for word in words:
        treated, separator, other = word.partition(":")
        for name in (treated, other):
            if not separator or name not in names:
                raise UserError(f"--compare {word}: give A:B with A and B of {', '.join(names)}")
        if (treated, other) not in pairs:
            pairs.append((treated, other))
    return pairs


def read_published(path: Path) -> dict[str, Any]:
    """Published rows with their sources.

    Raises:
        UserError: If the file is not of the right form.
    """
    raw = read_yaml(path)
    check_keys(raw, {"protocol", "rows"}, {"protocol", "rows"}, str(path))
    for row in raw["rows"]:
        known = {"init", "source", "recalled", *METRICS}
        check_keys(row, known, {"init", "source"}, f"{path}: rows")
    return raw


def summarise(
    arms: Sequence[Arm],
    rows: Sequence[Row],
    pairs: Sequence[tuple[str, str]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the trials found.

    Args:
        arms: Each initialisation with each seed.
        rows: Of the store.
        pairs: What is compared: (treated, control).
        about: Config, data, versions ..
    Returns:
        `format`, `rule`, `seeds`, `is_complete`, `counts`, `arms`: {name: {"weights", metric: {n,
        mean, std, values}}}, `comparisons`: {metric: rows of `compare`}, `per_class`: {metric:
        {"arms": {class: {arm: ..}}, "comparisons": [..]}}, `failures`, and `about`.
    """
    names = {(arm.fingerprint, arm.seed): arm.name for arm in arms}
    mine = [row for row in rows if (row.fingerprint, row.seed) in names]
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in mine:
        if row.status == "finished":
            for key, value in row.metrics.items():
                by_arm = values.setdefault(key, {})
                by_arm.setdefault(names[row.fingerprint, row.seed], {})[row.seed] = value
    counts: dict[str, int] = {}
    for row in mine:
        counts[row.status] = counts.get(row.status, 0) + 1
    classes = sorted({key.partition(":")[2] for key in values if ":" in key})
    return {
        "format": FORMAT,
        "rule": RULE,
        "seeds": sorted({arm.seed for arm in arms}),
        "is_complete": counts.get("finished", 0) == len(arms),
        "counts": {"cells": len(arms), **counts},
        "arms": {
            name: {
                "weights_sha256": {
                    str(arm.seed): arm.weights_digest for arm in arms if arm.name == name
                }
            }
            | {
                metric: _summary(values.get(metric, {}).get(name, {}))
                for metric in (*METRICS, *COCO_METRICS)
            }
            for name in dict.fromkeys(arm.name for arm in arms)
        },
        "comparisons": {
            metric: compare(_contrasts(values.get(metric, {}), pairs))
            for metric in (*METRICS, *COCO_METRICS)
        },
        "per_class": {metric: _per_class(metric, classes, values, pairs) for metric in _PER_CLASS},
        "failures": [
            {"arm": row.label, "seed": row.seed, "reason": row.error}
            for row in mine
            if row.status == "failed"
        ],
        **about,
    }


def _summary(values: Mapping[int, float]) -> dict[str, Any]:
    ordered = dict(sorted(values.items()))
    return {**mean_std(list(ordered.values())), "values": ordered}


def _contrasts(
    values: Mapping[str, Mapping[int, float]],
    pairs: Sequence[tuple[str, str]],
    prefix: str = "",
) -> list[Contrast]:
    return [
        Contrast(f"{prefix}{a} - {b}", ((1, values.get(a, {})), (-1, values.get(b, {}))))
        for a, b in pairs
    ]


def _per_class(
    metric: str,
    classes: Sequence[str],
    values: Mapping[str, Mapping[str, Mapping[int, float]]],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """One metric by class; all classes and pairs are one family of comparisons."""
    by_class = {name: values.get(f"{metric}:{name}", {}) for name in classes}
    contrasts = [
        contrast
        for name, found in by_class.items()
        for contrast in _contrasts(found, pairs, f"{name}: ")
    ]
    return {
        "arms": {
            name: {arm: _summary(by_seed) for arm, by_seed in found.items()}
            for name, found in by_class.items()
        },
        "comparisons": compare(contrasts),
    }


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:40] or "arm"
