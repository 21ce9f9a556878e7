"""A trained detector on another set of the same classes: `tools/train_voc.sh --eval-on DIR`.

Nothing is trained and nothing of a seed's own files changes; the result is written beside them.
"""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import provenance
from common.annotations.record import SetChoice, read_set
from common.errors import UserError, require
from common.files import LOCK, held, sha256_of, write_json
from common.picture_draws import METRICS, draw_pictures, intervals, read_draws, write_draws
from common.threads import choose_threads
from detection.evaluation.evaluate import evaluate_detector
from detection.evaluation.resampled_ap import resampled_ap
from detection.predict import MODEL_FILE, finished_seeds, load_detector
from detection.training import run
from detection.training.data import build_test_loader, register

logger = logging.getLogger(__name__)
_REPEAT = "train it first, with the same command without --eval-on"


def evaluate_on(
    root: Path,
    out: Path,
    seeds: Sequence[int] | None,
    *,
    choice: SetChoice | None = None,
    overrides: Mapping[str, str] | None = None,
    num_threads: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluate every finished seed of an arm on another set.

    Args:
        root: The set.
        out: Holds the seeds.
        seeds: Which ones; None: all that are finished.
        choice: Its format, test list and metric (default: the one of the training).
        overrides: Dotted key of the detector's config -> value; keys of TEST only.
        num_threads: On the CPU; None: as many as there are free cores.
        overwrite: Whether a result that was made with another model or set is replaced.

    Returns:
        What OUT/eval-on-NAME.json holds: mean, standard deviation and number of seeds; and the
        interval of the mean over the pictures of the set.

    Raises:
        UserError: If a seed is not finished or being worked on, or the set does not fit the
            detector.
    """
    overrides = overrides or {}
    for key in overrides:
        if not key.startswith("TEST."):
            raise UserError(
                f"{key}: with --eval-on the detector's own config is used, only keys of TEST may "
                "change; leave it out"
            )
    folders = _seeds_to_evaluate(out, seeds)
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(held(folder / LOCK))
        if chosen := choose_threads(num_threads or 0):
            torch.set_num_threads(chosen)
        return _evaluate_seeds(root, out, folders, choice or SetChoice(), overrides, overwrite)


def _evaluate_seeds(
    root: Path,
    out: Path,
    folders: Sequence[Path],
    choice: SetChoice,
    overrides: Mapping[str, str],
    overwrite: bool,
) -> dict[str, Any]:
    """As `evaluate_on`, of the seeds in some folders."""
    results = []
    for folder in folders:
        result = run.read_result(folder / "result.json")
        if result is None:
            raise UserError(f"{folder / 'result.json'}: is damaged; {_REPEAT}")
        results.append(result)
    classes = results[0]["classes"]
    is_same = all(result["classes"] == classes for result in results)
    require(is_same, f"{out}: its seeds have different classes; give --seeds")
    data = read_set(root, replace(choice, classes=tuple(classes), test_only=True))
    trained_year = results[0].get("metric_year")
    if choice.metric_year is None and None not in (data.metric_year, trained_year):
        data = replace(data, metric_year=trained_year)
    name = result_name(root, choice.test_split)
    rows, all_draws = [], []
    for folder, result in zip(folders, results, strict=True):
        file, draws_file = (folder / f"eval-on-{name}{end}.json" for end in ("", "-draws"))
        made_with = {
            "data_sha256": data.digest(),
            "model_sha256": sha256_of(folder / MODEL_FILE),
            "overrides": [word for pair in overrides.items() for word in pair],
        }
        row = run.read_result(file)
        if file.is_file() and row is None:
            print(f"warning: {file} is damaged, and is made again", file=sys.stderr)
        if row is not None and not overwrite:
            changed = [key for key, value in made_with.items() if row.get(key) != value]
            if changed:
                raise UserError(
                    f"{file}: was made with another {', '.join(changed)} (a set of the same folder "
                    "name?); rename the folder, or replace the result with --overwrite"
                )
        draws = None if row is None or overwrite else read_draws(draws_file, row)
        if row is not None and draws is None and not overwrite:  # of an older version, or damaged
            state = "is damaged" if draws_file.is_file() else "is missing"
            print(f"warning: {draws_file} {state}; the seed is evaluated again", file=sys.stderr)
        if row is None or draws is None:
            run.log_to(folder)
            for note in data.notes:
                logger.info("%s: %s", root, note)
            detector = load_detector(folder / MODEL_FILE, overrides=overrides)
            loader = build_test_loader(detector.cfg, register(data)[1])
            evaluation = evaluate_detector(detector.cfg, detector.model, loader, data)
            assert evaluation is not None  # one process
            run.write_details(evaluation, folder, f"{file.stem}-")
            counts = draw_pictures(evaluation.num_images)
            draws = resampled_ap(evaluation.matches, counts, data.metric_year)
            row = {
                "name": name,
                "arm": result["arm"],
                "seed": result["seed"],
                **evaluation.to_json(),
                "classes": list(data.classes),
                "classes_without_test_objects": evaluation.absent,
                "metric_year": data.metric_year,
                "picture_interval": intervals([draws]),
                **made_with,
                "versions": provenance.versions(),
            }
            write_draws(draws_file, draws, row)
            write_json(file, row)  # last: its presence says "finished"
            figures = (row[key] for key in METRICS)
            logger.info("%s on %s: AP %.1f  AP50 %.1f  AP75 %.1f", folder.name, name, *figures)
        rows.append(row)
        all_draws.append(draws)
    summary = {
        "name": name,
        "set": str(data.root.resolve()),
        **run.summarise(rows, [row["seed"] for row in rows]),
        "picture_interval": intervals(all_draws),
    }
    write_json(out / f"eval-on-{name}.json", summary)
    return summary


def result_name(root: Path, split: str | None) -> str:
    """NAME of eval-on-NAME.json: the set's folder, and the list if one was chosen."""
    parts = [root.resolve().name, *([split] if split else [])]
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)


def _seeds_to_evaluate(out: Path, seeds: Sequence[int] | None) -> list[Path]:
    """Folders of the seeds to evaluate, all of them finished."""
    require(out.is_dir(), f"{out}: no such folder; --out must hold trained seeds (seed-0, ..)")
    folders = finished_seeds(out) if seeds is None else [out / f"seed-{seed}" for seed in seeds]
    require(bool(folders), f"{out}: holds no finished seed (seed-N/result.json); {_REPEAT}")
    for folder in folders:
        for needed in ("result.json", MODEL_FILE):
            is_there = (folder / needed).is_file()
            require(is_there, f"{folder}: is not finished, {needed} is missing; {_REPEAT}")
    return folders
