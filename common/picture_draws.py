"""Bootstrap over the pictures of a test set: the draws, their file, intervals.

All models see the same draws of a set, so that their figures can be averaged and subtracted draw by
draw. An interval says how far figures of these models move with the pictures. It does not cover
other seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import Form, read_record_or_none, write_json
from common.stats import LEVEL

NUM_DRAWS = 1000
FILE_FORMAT = "fa-draws-1"
METRICS = ("AP", "AP50", "AP75")
_MADE_WITH: Form = {"data_sha256": str, "model_sha256": str, "num_test_images": int}

# Metric -> (NUM_DRAWS,) percent; NaN where a draw holds no object that counts.
Draws = Mapping[str, np.ndarray]


def draw_pictures(num_pictures: int) -> np.ndarray:
    """How often each picture comes in each draw: (NUM_DRAWS, num_pictures), always the same.

    A single picture cannot be resampled: (0, 1). numpy keeps the raw numbers of PCG64 from version
    to version, which it does not promise of its distributions.
    """
    if num_pictures < 2:
        return np.zeros((0, num_pictures), dtype=np.int32)
    raw = np.random.PCG64(0).random_raw((NUM_DRAWS, num_pictures))
    pictures = (raw % num_pictures).astype(np.int64)
    places = pictures + num_pictures * np.arange(NUM_DRAWS)[:, None]
    counts = np.bincount(places.ravel(), minlength=places.size)
    return counts.reshape(places.shape).astype(np.int32)


def interval(figures: Sequence[np.ndarray]) -> list[float] | None:
    """The 95 % percentile interval of the mean of some figures: [low, high].

    Args:
        figures: Of each model its figure, or a difference, in every draw: (NUM_DRAWS,). Draws with
            a NaN are left out.
    Returns:
        None if there is no draw.
    """
    means = np.mean(figures, axis=0) if len(figures) else np.empty(0)
    means = means[~np.isnan(means)]
    if not len(means):
        return None
    return np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def intervals(models: Sequence[Draws]) -> dict[str, list[float] | None]:
    """The `interval` of the mean over some models, by metric."""
    return {metric: interval([draws[metric] for draws in models]) for metric in METRICS}


def write_draws(path: Path, draws: Draws, result: Mapping[str, Any]) -> None:
    """Write the figures of a model in all draws; `result` holds what they were made with."""
    content = {"format": FILE_FORMAT} | {key: result[key] for key in _MADE_WITH}
    write_json(path, content | {metric: draws[metric].tolist() for metric in METRICS})


def read_draws(path: Path, result: Mapping[str, Any]) -> Draws | None:
    """What `write_draws` wrote; None where it is missing, damaged, or of another result."""
    form = {"format": str, **_MADE_WITH, **dict.fromkeys(METRICS, list)}
    content = read_record_or_none(path, form)
    wanted = {"format": FILE_FORMAT} | {key: result.get(key) for key in _MADE_WITH}
    if content is None or any(content[key] != wanted[key] for key in wanted):
        return None
    try:  # None becomes NaN
        draws = {metric: np.array(content[metric], dtype=float) for metric in METRICS}
    except (TypeError, ValueError):
        return None
    shape = (0 if content["num_test_images"] == 1 else NUM_DRAWS,)
    return draws if all(values.shape == shape for values in draws.values()) else None
