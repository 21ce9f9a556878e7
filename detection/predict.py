"""A trained detector as a function: pictures in, boxes out.

    from detection.predict import load_detector

    detector = load_detector("runs/demo")        # or a seed's folder, or model_final.pth alone
    for found in detector("street.jpg", score=0.5):
        print(found.class_name, found.score, found.box)

Resizing, order of colours, thresholds and batches are those of the evaluation, so that its AP is
the AP of these boxes.
"""

import detection.compat
import detection.training.heads  # noqa: F401  (registers the C4 head)

# isort: split
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from common import checkpoints, pictures
from common.errors import UserError, no_such_file
from common.files import read_json, read_json_or_none
from detection.training.config import check_values, load_config, merged, read_description
from detection.training.data import BoxMapper

# Detectron2 makes these at run time.
# pyright: reportCallIssue=false
MODEL_FILE = "model_final.pth"
Pixels = np.ndarray  # uint8 [height, width, 3], RGB, upright
Picture = Pixels | str | Path  # or its file
_TRAIN = "train it with tools/train_voc.sh, or give another RUN"


@dataclass(frozen=True)
class Prediction:
    """One detected object.

    Attributes:
        class_name: As in the set that the detector was trained on.
        score: In 0..1.
        box: x0, y0, x1, y1 in continuous pixels of the upright picture: (0, 0, W, H) covers it.
    """

    class_name: str
    score: float
    box: tuple[float, float, float, float]


class Detector:
    """A trained detector.

    Attributes:
        cfg: Its config, frozen.
        classes: Names in order.
        model: Detectron2's, in evaluation mode.
        batch_size: Pictures per forward pass in its evaluation.
        lowest_score: It gives no box with a lower one (SCORE_THRESH_TEST).
    """

    def __init__(self, cfg: CfgNode, classes: Sequence[str], model: nn.Module) -> None:
        self.cfg, self.classes, self.model = cfg, tuple(classes), model.eval()
        self.batch_size: int = cfg.TEST.IMS_PER_BATCH
        head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
        self.lowest_score: float = cfg.MODEL[head].SCORE_THRESH_TEST
        self._mapper = BoxMapper(cfg, is_train=False)

    def example(self, image: Pixels) -> dict[str, Any]:
        """What the model takes for a picture: the mapper of the evaluation makes it.

        Raises:
            UserError: If it is no array of pixels.
        """
        is_array = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
        if not is_array or image.shape[2] != 3 or not image.size:
            kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
            raise UserError(f"a picture is {kind}; give uint8 [height, width, 3], RGB, or a file")
        height, width = image.shape[:2]
        return {"image": self._mapper.of_pixels(image)[0], "height": height, "width": width}

    def predict(self, images: Sequence[Pixels]) -> list[list[Prediction]]:
        """All boxes of one batch, best score first, at most DETECTIONS_PER_IMAGE a picture.

        Pictures of different sizes are padded to the largest, as in the evaluation; so near the
        lower and right edges scores depend a little on the others. A batch of one is padded by less
        than the backbone's stride.
        """
        with torch.no_grad():
            outputs = self.model([self.example(image) for image in images])
        found = []
        for output in outputs:
            instances = output["instances"].to("cpu")
            columns = (instances.pred_classes, instances.scores, instances.pred_boxes.tensor)
            rows = zip(*(column.numpy() for column in columns), strict=True)
            boxes = []
            for label, score, corners in rows:
                # The shortest decimals that give the same float32 again.
                x0, y0, x1, y1 = (float(str(value)) for value in corners)
                box = (x0, y0, x1, y1)
                boxes.append(Prediction(self.classes[label], float(str(score)), box))
            found.append(boxes)
        return found

    @overload
    def __call__(
        self, given: Picture, *, score: float = 0.5, batch_size: int | None = None
    ) -> list[Prediction]: ...
    @overload
    def __call__(
        self, given: Sequence[Picture], *, score: float = 0.5, batch_size: int | None = None
    ) -> list[list[Prediction]]: ...
    def __call__(
        self, given: Picture | Sequence[Picture], *, score: float = 0.5,
        batch_size: int | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:  # fmt: skip
        """Detect objects.

        Args:
            given: A picture (pixels or the path of a file), or a list of them.
            score: Lowest score of a box; below `lowest_score` there are none.
            batch_size: Pictures per forward pass; None: as in the evaluation.

        Returns:
            The boxes of the picture, best score first; for a list, a list of them.

        Raises:
            BadPicture: If a file cannot be read or does not decode.
            UserError: If a picture is neither pixels nor a path.
        """
        if isinstance(given, np.ndarray | str | Path):
            return self([given], score=score, batch_size=batch_size)[0]
        size = batch_size or self.batch_size
        found = []
        for start in range(0, len(given), size):
            batch = [
                pictures.decode(pictures.read_file(Path(one)), where=str(one))
                if isinstance(one, str | Path)
                else one
                for one in given[start : start + size]
            ]
            found += self.predict(batch)
        return [[one for one in boxes if one.score >= score] for boxes in found]


def find_weights(path: Path) -> Path:
    """The weight file that a user's path means.

    Args:
        path: A weight file; a seed's folder; an arm's (its first finished seed); a pipeline run's
            (the first finished seed of the arm `pretrained`, or else of the arm with the best AP).

    Raises:
        UserError: If there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(no_such_file(path, _TRAIN))
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    finished = [_first_seed(arm) for arm in (path, path / "detection" / "pretrained")]
    others = [_first_seed(arm) for arm in sorted((path / "detection").glob("*"))]
    others.sort(key=lambda seed: -_average_precision(seed))
    seed = next((seed for seed in (*finished, *others) if seed is not None), None)
    if seed is None:
        raise UserError(
            f"{path}: holds no finished detector ({MODEL_FILE}, seed-N/ or detection/ARM/seed-N/ "
            f"with it and result.json); {_TRAIN}"
        )
    return seed / MODEL_FILE


def _first_seed(arm: Path) -> Path | None:
    """The finished seed of the lowest number that has its weights."""
    return next((seed for seed in finished_seeds(arm) if (seed / MODEL_FILE).is_file()), None)


def finished_seeds(arm: Path) -> list[Path]:
    """The folders seed-N of an arm that have a result, by number."""
    seeds = [file.parent for file in arm.glob("seed-*/result.json") if file.is_file()]
    numbered = [seed for seed in seeds if seed.name.removeprefix("seed-").isdecimal()]
    return sorted(numbered, key=lambda seed: int(seed.name.removeprefix("seed-")))


def _average_precision(seed: Path | None) -> float:
    result = read_json_or_none(seed / "result.json") if seed else None
    return float(result.get("AP") or 0) if isinstance(result, dict) else 0.0


def load_detector(
    path: Path | str, *, device: str | None = None, overrides: Mapping[str, str] | None = None
) -> Detector:
    """Load a detector that tools/train_voc.sh trained.

    Args:
        path: See `find_weights`. The file alone suffices: config and class names are in it. Files
            of version 0.1 need config.yaml and result.json beside them.
        device: "cpu", "cuda", ..; None: a GPU if there is one.
        overrides: Dotted key of its config -> value as text.

    Raises:
        UserError: If there is no detector, or what belongs to it is missing or does not fit.
    """
    has_gpu = torch.cuda.is_available()
    device = device or ("cuda" if has_gpu else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device) or (device != "cpu" and not has_gpu):
        there = "cpu, cuda or cuda:N" if has_gpu else "cpu: this machine has no GPU that torch uses"
        raise UserError(f"--device {device}: give {there}")
    weights = find_weights(Path(path))
    content = checkpoints.read(weights)
    if not is_detector(content):
        raise UserError(f"{weights}: holds no detector; give a {MODEL_FILE} of tools/train_voc.sh")
    if "detector" in content:
        cfg, classes = read_description(content["detector"], str(weights))
    else:
        cfg, classes = _read_beside(weights)
    if overrides:
        cfg = merged(cfg, overrides)
        check_values(cfg, weights)
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = ""
    cfg.freeze()
    checkpoints.check_finite(content["model"], weights)
    try:
        model = build_model(cfg)
        model.load_state_dict(content["model"])
    except (KeyError, ValueError, AssertionError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[:2]
        raise UserError(
            f"{weights}: its weights do not fit its config ({' '.join(reason)}); {_TRAIN}"
        ) from error
    return Detector(cfg, classes, model)


def is_detector(content: Any) -> bool:
    """Whether a checkpoint's content is a detector's, and no backbone's."""
    model = content.get("model") if isinstance(content, dict) else None
    heads = ("roi_heads.", "head.cls_")  # Faster R-CNN's, RetinaNet's
    return isinstance(model, dict) and any(str(key).startswith(heads) for key in model)


def _read_beside(weights: Path) -> tuple[CfgNode, tuple[str, ...]]:
    """Config and class names of a file that was written without them."""
    config, result = (weights.with_name(name) for name in ("config.yaml", "result.json"))
    missing = [file.name for file in (config, result) if not file.is_file()]
    if missing:
        raise UserError(
            f"{weights}: says nothing of its config and classes, and {' and '.join(missing)} "
            "is not beside it; copy them from the seed's folder, or train again"
        )
    cfg, content = load_config(config), read_json(result)
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, list) or len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise UserError(f"{result}: its classes are not those of {config.name}; {_TRAIN}")
    return cfg, tuple(str(name) for name in classes)
