"""A trained detector on another set with the same class names: `tools/train_voc.sh --eval-on DIR`.

Nothing is trained and nothing of a seed's own files changes; the result is written beside them.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from common import checkpoints, provenance
from common.errors import UserError
from common.files import read_json, sha256_of, write_json
from detection.dataset import VocSet, classes_without_objects, read_test_set
from detection.evaluation.voc import curves_file, evaluate_detector, measured
from detection.training.config import load_config
from detection.training.data import build_test_loader, register
from detection.training.run import is_finished, log_to, prepare, summarise
from detection.training.trainer import evaluated_part

logger = logging.getLogger(__name__)
_MODEL = "model_final.pth"
_REPEAT = "train it first, with the same command without --eval-on"


def evaluate_on(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate every finished seed of an arm on another set.

    Args:
        arguments: As tools.train_voc parses them, with `eval_on`; `seed_list` None means all seeds
            that are finished. If weights, config and data are given too, the seeds must have been
            trained with them.

    Returns:
        What OUT/eval-on-NAME.json holds: mean, standard deviation and number of seeds.

    Raises:
        UserError: If a seed is not finished, or the set does not fit the detector.
    """
    folders = _finished_seeds(arguments)
    results = [read_json(folder / "result.json") for folder in folders]
    classes = _common_classes(folders, results)
    voc = read_test_set(
        arguments.eval_on,
        classes,
        metric_year=arguments.metric_year or results[0]["metric_year"],
        test_split=arguments.eval_split,
    )
    name = result_name(arguments.eval_on, arguments.eval_split)
    overrides = [] if arguments.config else list(arguments.opts)
    if arguments.num_eval_images is not None:
        overrides += ["TEST.NUM_IMAGES", str(arguments.num_eval_images)]
    rows = []
    for folder, trained in zip(folders, results, strict=True):
        made_with = {
            "data_sha256": voc.digest(),
            "model_sha256": sha256_of(folder / _MODEL),
            "overrides": overrides,
        }
        file = folder / f"eval-on-{name}.json"
        if not _is_made(file, made_with, overwrite=arguments.overwrite):
            if arguments.threads:
                torch.set_num_threads(arguments.threads)
            log_to(folder)
            _evaluate_seed(folder, voc, name, trained, made_with)
        rows.append(read_json(file))
    summary = {
        "name": name,
        "set": str(voc.root.resolve()),
        **summarise(rows, [row["seed"] for row in rows]),
    }
    write_json(arguments.out / f"eval-on-{name}.json", summary)
    return summary


def result_name(root: Path, split: str | None) -> str:
    """NAME of eval-on-NAME.json: the set's folder, and the list if one was chosen."""
    parts = [root.resolve().name, *([split] if split else [])]
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)


def _finished_seeds(arguments: argparse.Namespace) -> list[Path]:
    """Folders of the seeds that shall be evaluated, all of them finished."""
    out, seeds = arguments.out, arguments.seed_list
    if not out.is_dir():
        raise UserError(f"{out}: no such folder; --out must hold trained seeds (seed-0, ..)")
    if seeds is None:
        found = [path for path in out.glob("seed-*") if (path / "result.json").is_file()]
        folders = sorted(found, key=lambda path: int(path.name.removeprefix("seed-")))
    else:
        folders = [out / f"seed-{seed}" for seed in seeds]
    if not folders:
        raise UserError(f"{out}: holds no finished seed (seed-N/result.json); {_REPEAT}")
    for folder in folders:
        for needed in ("result.json", "config.yaml", _MODEL):
            if not (folder / needed).is_file():
                raise UserError(f"{folder}: is not finished, {needed} is missing; {_REPEAT}")
    if arguments.config is not None:
        settings = prepare(arguments).settings
        for folder in folders:
            if not is_finished(folder, settings, overwrite=False):
                raise UserError(
                    f"{folder}: has no run.json, so its settings are unknown; {_REPEAT}"
                )
    return folders


def _common_classes(folders: Sequence[Path], results: Sequence[dict[str, Any]]) -> list[str]:
    """The detector's class names in order."""
    lists = []
    for folder, result in zip(folders, results, strict=True):
        names = result.get("classes")
        if names is None and not result.get("classes_without_test_objects"):
            names = list(result["per_class"])  # an older result: all classes, in order
        if names is None:
            raise UserError(
                f"{folder / 'result.json'}: has no list 'classes' (an older version made it), and "
                "not every class has an AP to take it from; train the seed again"
            )
        lists.append(names)
    if any(names != lists[0] for names in lists):
        raise UserError(f"{folders[0].parent}: its seeds have different classes; give --seeds")
    return lists[0]


def _is_made(file: Path, made_with: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether a result is there and made with the same model, set and overrides."""
    if overwrite or not file.is_file():
        return False
    old = read_json(file)
    changed = [key for key, value in made_with.items() if old.get(key) != value]
    if changed:
        raise UserError(
            f"{file}: was made with another {', '.join(changed)} (a set of the same folder name?); "
            "rename the folder, or replace the result with --overwrite"
        )
    return True


def _evaluate_seed(
    folder: Path, voc: VocSet, name: str, trained: dict[str, Any], made_with: dict[str, Any]
) -> None:
    """Evaluate one detector; the result is written last."""
    cfg = _saved_config(folder, made_with["overrides"])
    cfg.DATASETS.TEST = (register(voc)[1],)
    cfg.freeze()
    split = evaluated_part(voc.test, cfg.TEST.NUM_IMAGES)
    absent = classes_without_objects(split, voc.classes)
    if len(absent) == len(voc.classes):
        raise UserError(
            f"{voc.root}: no object of the detector's classes in the pictures evaluated, so there "
            "is no AP; choose another list with --eval-split"
        )
    last = evaluate_detector(
        cfg,
        _load_detector(cfg, folder / _MODEL),
        build_test_loader(cfg, cfg.DATASETS.TEST[0]),
        split,
        voc.classes,
        metric_year=voc.metric_year,
        root=voc.root,
        absent=absent,
    )
    write_json(folder / f"eval-on-{name}-detections.json", last["detections"])
    write_json(folder / f"eval-on-{name}-pr.json", curves_file(last, voc.metric_year))
    write_json(folder / f"eval-on-{name}-errors.json", last["errors"])
    result = {
        "name": name,
        "arm": trained["arm"],
        "seed": trained["seed"],
        **measured(last),
        "classes": list(voc.classes),
        "classes_without_test_objects": absent,
        "metric_year": voc.metric_year,
        **made_with,
        "versions": provenance.versions(),
    }
    write_json(folder / f"eval-on-{name}.json", result)
    shown = (result[key] for key in ("AP", "AP50", "AP75"))
    logger.info("%s on %s: AP %.1f  AP50 %.1f  AP75 %.1f", folder.name, name, *shown)


def _saved_config(folder: Path, overrides: Sequence[str]) -> CfgNode:
    """The config a seed was trained with; only TEST keys may be changed."""
    for key in overrides[::2]:
        if not key.startswith("TEST."):
            raise UserError(
                f"{key}: with --eval-on the detector's own config is used, only keys of TEST may "
                "be given; leave it out"
            )
    cfg = load_config(folder / "config.yaml", overrides)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _load_detector(cfg: CfgNode, path: Path) -> torch.nn.Module:
    """Build the detector and fill every tensor of it."""
    model = build_model(cfg)
    checkpoint = checkpoints.load_torch(str(path))
    try:
        model.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: does not fit the config.yaml beside it ({str(error).splitlines()[0]}); "
            f"{_REPEAT}"
        ) from error
    return model.eval()
