"""Trials: detectors trained from several given weights over seeds, as an experiment.

`{seed}` in the name of weights or of a data set stands for the seed: then each seed has its own
pretraining run or its own split, and the spread over seeds covers that as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import check_keys, read_yaml
from common.errors import UserError
from common.files import sha256_of
from pipeline.config import (
    RANDOM,
    Comparison,
    DataStageConfig,
    DetectionConfig,
    PipelineConfig,
    check_config,
)
from pipeline.results import METRICS
from pipeline.tables import DASH, Section, Table


def make_config(
    inits: Sequence[str], control: str | None, compare: Sequence[str], seeds: int, config: Path,
    data: str, words: Sequence[str],
) -> PipelineConfig:  # fmt: skip
    """An experiment of given weights.

    Args:
        inits: "random" or "NAME=FILE".
        control: The one that all are compared with; None: the first.
        compare: Further comparisons, "A:B".
        seeds: How many.
        config: Detectron2's YAML.
        data: The labelled set.
        words: Further words for tools/train_voc.sh.
    Raises:
        UserError: For names or files that there are not.
    """
    variants: dict[str, dict[str, str]] = {}
    for word in inits:
        name, separator, file = word.partition("=")
        if not name or (not separator and name != RANDOM):
            raise UserError(f"--init {word!r}: give NAME=FILE, or random")
        if name in variants:
            raise UserError(f"--init {name}: comes twice; choose another name")
        variants[name] = {"weights": file if separator else RANDOM}
    control = control or next(iter(variants))
    if control not in variants:
        raise UserError(f"--control {control}: give one of {', '.join(variants)}")
    pairs = [(name, control) for name in variants if name != control]
    for word in compare:
        treated, separator, other = word.partition(":")
        for name in (treated, other):
            if not separator or name not in variants:
                raise UserError(f"--compare {word}: give A:B with A and B of {', '.join(variants)}")
        if (treated, other) not in pairs:
            pairs.append((treated, other))

    # Two names for the same weights would be one arm.
    for seed in range(seeds):
        seen: dict[str, str] = {}
        for name, given in variants.items():
            path = Path(given["weights"].replace("{seed}", str(seed)))
            if given["weights"] != RANDOM and not path.is_file():
                raise UserError(f"--init {name}: {path} does not exist")
            content = RANDOM if given["weights"] == RANDOM else sha256_of(path)
            if seen.setdefault(content, name) != name:
                raise UserError(f"--init {name}: the same weights as {seen[content]}")
    return check_config(
        PipelineConfig(
            name="trials",
            data=DataStageConfig(kind="existing", dataset=data),
            variants=dict(variants),
            evaluations=("detection",),
            detection=DetectionConfig(
                str(config), words=tuple(words), seeds=seeds, arms=tuple(variants)
            ),
            comparisons=tuple(Comparison(f"{a} - {b}", {a: 1, b: -1}) for a, b in pairs),
        )
    )


def read_published(path: Path) -> tuple[Section, dict[str, Any]]:
    """Published rows with their sources: as a section of the tables, and as they stand in the file.

    Raises:
        UserError: If the file is not of the right form.
    """
    raw = read_yaml(path)
    check_keys(raw, {"protocol", "rows"}, {"protocol", "rows"}, str(path))
    rows = []
    for row in raw["rows"]:
        known = {"init", "source", "recalled", *METRICS}
        check_keys(row, known, {"init", "source"}, f"{path}: rows")
        figures = (DASH if row.get(m) is None else f"{row[m]:g}" for m in METRICS)
        rows.append((row["init"], *figures, row["source"] + " [M]" * bool(row.get("recalled"))))
    text = (
        f"{raw['protocol']}. [M]: recalled, not checked against the source. They compare with the "
        "measured ones only if the protocol is the same."
    )
    table = Table("Percent", ("initialisation", *METRICS, "source"), rows)
    return Section("Published rows", (text,), (table,)), raw
