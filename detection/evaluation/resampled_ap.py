"""AP of a set whose pictures are counted several times or not at all, without matching again.

What a detection matches depends on its own picture alone. So the matches are found once, and a draw
of pictures only changes how often each of them counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from detection.evaluation.error_analysis import LEVELS, Detections, Objects, nearest

THRESHOLDS = tuple(range(50, 100, 5))  # percent of overlap
_BLOCK = 100  # draws at a time, which bounds the memory


@dataclass(frozen=True)
class Matches:
    """The detections of one class, best score first, as the metric sorts them.

    Attributes:
        image: (n,) number of the picture.
        hit: (thresholds, n) whether it matches an object.
        counted: (thresholds, n) whether it is right or wrong; not one on a difficult object.
        num_objects: (num_images,) objects of each picture that count.
    """

    image: np.ndarray
    hit: np.ndarray
    counted: np.ndarray
    num_objects: np.ndarray


def voc_matches(
    objects: Objects, detections: Detections, num_classes: int, num_images: int
) -> list[Matches]:
    """The matches of every class by VOC's rules, as Detectron2's `voc_eval` finds them."""
    overlap, target, _, _ = nearest(objects, detections)
    thresholds = np.array(THRESHOLDS)[:, None] / 100.0
    found = []
    for label in range(num_classes):
        rows = np.flatnonzero(detections.label == label)
        rows = rows[np.argsort(-detections.score[rows])]  # equal scores: in the order of voc_eval
        reaches = overlap[rows] > thresholds
        is_ignored = reaches & objects.difficult[target[rows]]
        # The best-scored one on each object matches it.
        hit = np.zeros_like(reaches)
        for own, claims in zip(hit, reaches & ~is_ignored, strict=True):
            places = np.flatnonzero(claims)
            own[places[np.unique(target[rows[places]], return_index=True)[1]]] = True
        counts = objects.image[(objects.label == label) & ~objects.difficult]
        num_objects = np.bincount(counts, minlength=num_images)
        found.append(Matches(detections.image[rows], hit, ~is_ignored, num_objects))
    return found


def coco_matches(evaluation: COCOeval, num_classes: int, num_images: int) -> list[Matches]:
    """The matches of every class that pycocotools found, for objects of all sizes."""
    num_sizes = len(evaluation.params.areaRng)  # the first one is all sizes
    found = []
    for label in range(num_classes):
        first = label * num_sizes * num_images
        pictures = [item for item in evaluation.evalImgs[first : first + num_images] if item]
        none = np.zeros((len(THRESHOLDS), 0), dtype=bool)
        num_objects = np.zeros(num_images, dtype=np.int64)
        for item in pictures:
            num_objects[item["image_id"] - 1] = np.count_nonzero(item["gtIgnore"] == 0)
        images = [item["image_id"] - 1 for item in pictures for _ in item["dtScores"]]
        scores = np.array([score for item in pictures for score in item["dtScores"]], dtype=float)
        order = np.argsort(-scores, kind="stable")
        matched, ignored = (
            np.concatenate([none, *(item[key] for item in pictures)], axis=1)[:, order].astype(bool)
            for key in ("dtMatches", "dtIgnore")
        )
        image = np.array(images, dtype=np.int64)[order]
        found.append(Matches(image, matched & ~ignored, ~ignored, num_objects))
    return found


def resampled_ap(
    classes: Sequence[Matches], counts: np.ndarray, metric_year: int | None
) -> dict[str, np.ndarray]:
    """AP, AP50 and AP75 in percent for draws of pictures.

    As in a whole set the mean is over the classes with an object that counts, here in the pictures
    of the draw: a class may be absent in some draws, and then has no part in their figures.
    Detections with equal scores keep the order that they have in the whole set.

    Args:
        classes: The matches of each class.
        counts: (draws, num_images) how often a draw holds each picture.
        metric_year: 2007: 11 levels of recall; 2012: area; None: 101 levels.

    Returns:
        (draws,) each; NaN where no class is present.
    """
    total = np.zeros((len(THRESHOLDS), len(counts)))
    num_present = np.zeros(len(counts))
    for matches in classes:
        num_objects = counts @ matches.num_objects
        num_present += num_objects > 0
        for start in range(0, len(counts), _BLOCK):
            block = slice(start, start + _BLOCK)
            drawn = counts[block][:, matches.image]
            total[:, block] += _by_threshold(matches, drawn, num_objects[block], metric_year)
    nothing = np.full_like(total, np.nan)
    by_threshold = np.divide(100 * total, num_present, out=nothing, where=num_present > 0)
    at_50, at_75 = (by_threshold[THRESHOLDS.index(place)] for place in (50, 75))
    return {"AP": by_threshold.mean(axis=0), "AP50": at_50, "AP75": at_75}


def _by_threshold(
    matches: Matches, drawn: np.ndarray, num_objects: np.ndarray, metric_year: int | None
) -> np.ndarray:
    """AP of one class in 0..1: (thresholds, draws); 0 where it is absent.

    Args:
        matches: Its detections.
        drawn: (draws, n) how often each of them is there.
        num_objects: (draws,) that count.
        metric_year: See `resampled_ap`.
    """
    num_seen = np.cumsum(drawn, axis=1)
    values = np.zeros((len(matches.hit), len(drawn)))
    for value, hit, counted in zip(values, matches.hit, matches.counted, strict=True):
        # Precision and recall where a detection is right; elsewhere recall does not grow.
        places, left_out = np.flatnonzero(hit), np.flatnonzero(~counted)
        num_right = np.cumsum(drawn[:, places], axis=1)
        num_counted = num_seen[:, places]
        if len(left_out):
            before = np.cumsum(np.pad(drawn[:, left_out], ((0, 0), (1, 0))), axis=1)
            num_counted = num_counted - before[:, np.searchsorted(left_out, places)]
        precision = num_right / np.maximum(num_counted, 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # Each share of the recall, or each level of it, has the highest precision from there on.
        recall = num_right / np.maximum(num_objects, 1)[:, None]
        if metric_year == 2012:
            share = np.diff(recall, axis=1, prepend=0.0)
        else:
            levels = LEVELS[metric_year]
            reached = np.searchsorted(levels, recall, side="right")
            share = np.diff(reached, axis=1, prepend=0) / len(levels)
        value[:] = (share * envelope).sum(axis=1)
    return values
