"""What a labelled set holds, for people to look at before they read figures: `labels.json`."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from common.annotations.record import LabelledSet, PictureRecord, evenly
from detection.evaluation.evaluate import labelled_picture

NUM_SAMPLES = 6
NUM_SIZES = 10  # steps of a box's side, as a share of the picture's


def describe(data: LabelledSet) -> dict[str, Any]:
    """What labels.json holds (docs/files.md, section 5).

    A box's side is the root of its area, in pixels and as a share of the picture's. Samples are
    training pictures with objects, see `evenly`.
    """
    train = [picture for split in data.train for picture in split.pictures]
    shown = [picture for picture in train if picture.objects]
    return {
        "format": "fa-labels-1",
        "name": data.name,
        "classes": list(data.classes),
        "repaired": list(data.notes),
        "lists": [
            {"use": "training", "name": "+".join(split.name for split in data.train)}
            | _counts(train, data.classes),
            {"use": "test", "name": data.test.name} | _counts(data.test.pictures, data.classes),
        ],
        "samples": [labelled_picture(picture, data) for picture in evenly(shown, NUM_SAMPLES)],
    }  # fmt: skip


def _counts(pictures: Sequence[PictureRecord], classes: Sequence[str]) -> dict[str, Any]:
    """Counts of a list; `sizes`: boxes by side, in steps of a tenth of the picture's."""
    objects = [(picture, item) for picture in pictures for item in picture.objects]
    areas = [(i.box[2] - i.box[0]) * (i.box[3] - i.box[1]) for _, i in objects]
    sides = [math.sqrt(max(0.0, area)) for area in areas]
    shares = [side / math.sqrt(picture.width * picture.height)
              for side, (picture, _) in zip(sides, objects, strict=True)]  # fmt: skip
    sizes = Counter(min(NUM_SIZES - 1, int(NUM_SIZES * share)) for share in shares)
    of_class = Counter(item.class_name for _, item in objects)
    with_class = Counter(
        name for picture in pictures for name in {item.class_name for item in picture.objects}
    )
    return {
        "num_pictures": len(pictures),
        "num_empty": sum(not picture.objects for picture in pictures),
        "num_objects": len(objects),
        "num_ignored": sum(item.is_ignored for _, item in objects),
        "median_side": round(statistics.median(sides), 1) if sides else None,
        "sizes": [sizes[step] for step in range(NUM_SIZES)],
        "objects": {name: of_class[name] for name in classes},
        "pictures": {name: with_class[name] for name in classes},
    }
