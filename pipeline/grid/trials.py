"""Detection trials: several initialisations x seeds, each one run of tools/train_voc.sh; tables.

`{seed}` in the name of weights or of a data set stands for the seed: then each seed has its own
pretraining run or its own split, and the spread over seeds covers that as well.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import check_keys, read_yaml
from common.errors import UserError
from common.files import read_json_or_none, sha256_of
from common.stats import RULE, Contrast, compare, mean_std
from pipeline.grid import documents
from pipeline.grid.data import run_tool
from pipeline.grid.documents import DASH, Section, Table, comparison_table, mean_text, overview
from pipeline.grid.jobs import Step
from pipeline.grid.schedule import Key, Row, Work, count_statuses
from pipeline.plan import config_bases
from pipeline.stages import digest

FORMAT = "fa-trials-1"
METRICS = ("AP50", "AP", "AP75")
COCO_METRICS = ("coco_AP50", "coco_AP", "coco_AP75")  # by COCO's metric, on the same boxes
ALL_METRICS = (*METRICS, *COCO_METRICS)
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

    @property
    def key(self) -> Key:
        """Of its row in the store."""
        return self.fingerprint, self.seed


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


def make_arm(name: str, file: str | None, seed: int, protocol: Protocol, out: Path) -> Arm:
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
            weights = out / "weights" / f"{slug(name)}-{weights_digest[:8]}.pkl"
        if not (weights.is_file() and weights.with_suffix(".json").is_file()):
            weights.parent.mkdir(parents=True, exist_ok=True)
            run_tool("tools/convert_to_d2.py", given, weights, where=f"--init {name}: ")
    data = Path(protocol.data.replace("{seed}", str(seed))).resolve()
    configs = [read_yaml(path) for path in (protocol.config, *config_bases(protocol.config))]
    decides = {
        "weights": weights_digest,
        "config": digest({"configs": json.loads(json.dumps(configs, default=str))}),
        "data": data_digest(data),
        "words": list(protocol.words),
    }
    return Arm(name, seed, weights, weights_digest, data, digest(decides))


_bytes_digest = functools.cache(sha256_of)


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
    steps = (Step("train_voc", command, result),)
    return Work(arm.key, steps, result.parent, lambda: read_result(result))


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
    coco = raw.get("coco") or {}  # not in results of older versions
    further = {metric: coco.get(metric.removeprefix("coco_")) for metric in COCO_METRICS}
    for metric, key in _PER_CLASS.items():
        further |= {f"{metric}:{name}": value for name, value in (raw.get(key) or {}).items()}
    # A class without test objects has no AP.
    return found | {key: float(value) for key, value in further.items() if value is not None}


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
    names = {arm.key: arm.name for arm in arms}
    mine = [row for row in rows if row.key in names]
    # Metric -> arm -> seed -> value; `AP:dog` is a metric of its own.
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in mine:
        if row.status == "finished":
            for metric, value in row.metrics.items():
                of_metric = values.setdefault(metric, {})
                of_metric.setdefault(names[row.key], {})[row.seed] = value
    classes = sorted({metric.partition(":")[2] for metric in values if ":" in metric})

    def by_arm(metric: str) -> dict[str, dict[int, float]]:
        return values.get(metric, {})

    def contrasts(metric: str, prefix: str = "") -> list[Contrast]:
        found = by_arm(metric)
        return [
            Contrast(f"{prefix}{a} - {b}", ((1, found.get(a, {})), (-1, found.get(b, {}))))
            for a, b in pairs
        ]

    counts = count_statuses(mine, len(arms))
    by_name: dict[str, Any] = {arm.name: {"weights_sha256": {}} for arm in arms}
    for arm in arms:
        by_name[arm.name]["weights_sha256"][str(arm.seed)] = arm.weights_digest
    for name, summary in by_name.items():
        summary |= {metric: _summary(by_arm(metric).get(name, {})) for metric in ALL_METRICS}
    return {
        "format": FORMAT,
        "rule": RULE,
        "seeds": sorted({arm.seed for arm in arms}),
        "is_complete": counts.get("finished", 0) == len(arms),
        "counts": counts,
        "arms": by_name,
        "comparisons": {metric: compare(contrasts(metric)) for metric in ALL_METRICS},
        "per_class": {
            metric: {
                "arms": {
                    name: {arm: _summary(v) for arm, v in by_arm(f"{metric}:{name}").items()}
                    for name in classes
                },
                # All classes and pairs are one family of comparisons.
                "comparisons": compare(
                    [c for name in classes for c in contrasts(f"{metric}:{name}", f"{name}: ")]
                ),
            }
            for metric in _PER_CLASS
        },
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


def write(out: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write results.json and the tables beside it; returns the files."""

    def named(metrics: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {**row, "name": f"{_word(metric)}, {row['name']}"}
            for metric in metrics
            for row in results["comparisons"][metric]
        ]

    sections = [_overview(results)]
    for metric in METRICS:
        if results["comparisons"][metric]:
            table = comparison_table("Paired differences", results["comparisons"][metric])
            sections.append(Section(metric, (), (table,)))
    coco = [row for row in named(COCO_METRICS) if row["n"]]
    if coco:
        caption = "Paired differences by COCO's metric; each of the three is a family of its own"
        sections.append(Section("COCO's metric", (), (comparison_table(caption, coco),)))
    arms = list(results["arms"])
    for metric, by_class in results["per_class"].items():
        rows = [
            (name, *(mean_text(by_arm.get(arm)) for arm in arms))
            for name, by_arm in by_class["arms"].items()
        ]
        tables = [Table("Percent, mean ± std", ("class", *arms), rows)]
        if by_class["comparisons"]:
            tables.append(comparison_table("Paired differences", by_class["comparisons"]))
        if rows:
            sections.append(Section(f"{metric} by class", (), tables))
    title = f"Detection trials on {results['data']}"
    return documents.write(out, title, results, sections, named(METRICS))


def _overview(results: Mapping[str, Any]) -> Section:
    finished, total = results["counts"].get("finished", 0), results["counts"]["cells"]
    state = (
        f"{finished} of {total} runs are finished. Seeds "
        f"{', '.join(map(str, results['seeds']))}; set {results['data']}, config "
        f"{results['config']}. Intervals cover what differs between the seeds: the detector's "
        "training, and pretraining or split where their names hold {seed}."
    )
    rows = [
        (name, str(arm["AP50"]["n"]), *(mean_text(arm[m]) for m in ALL_METRICS), "measured")
        for name, arm in results["arms"].items()
    ]
    further = []
    published = results["published"]
    if published is not None:
        further.append(
            f"Published rows: {published['protocol']}. [M]: recalled, not checked against the "
            "source. They compare with the measured ones only if the protocol is the same."
        )
        for row in published["rows"]:
            figures = (DASH if row.get(m) is None else f"{row[m]:g}" for m in ALL_METRICS)
            source = row["source"] + " [M]" * bool(row.get("recalled"))
            rows.append((row["init"], DASH, *figures, source))
    head = ("initialisation", "n", *map(_word, ALL_METRICS), "source")
    caption = "Percent, mean ± std over seeds, by the set's metric and by COCO's on the same boxes"
    return overview(results, state, Table(caption, head, rows), further)


def _word(metric: str) -> str:
    return metric.replace("coco_", "COCO ")


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:40] or "arm"
