"""A map of the features in two dimensions, before and after training, and how far to trust it.

The same validation pictures of the probe, seen by the initial and by the last weights. t-SNE comes
from scikit-learn, which is an extra; without it the map is the first two principal components, and
the file says so.
"""

from __future__ import annotations

import math
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from common.files import write_json
from pretrain.data.subset import Subset
from pretrain.eval.pictures import picture, save_jpeg, spread
from pretrain.eval.probe import Probe

FORMAT = "fa-feature-map-1"
NAME = "feature_map.json"
SPRITE = "pictures/feature_map.jpg"
INITIAL = "features_before.npz"  # features of the initial weights, kept until the map is drawn
THUMBNAIL = 32  # pixels
MIN_POINTS = 8
NUM_NEIGHBOURS = 10  # of the figures
_PERPLEXITY = 30.0  # scikit-learn's default; less where there are few points
_SAME = 1e-6  # root mean square distance from the mean, of rows of length 1: no map below
WITHOUT_LIBRARY = (
    "scikit-learn is not installed (the extra `maps` of this package), so these are the first two "
    "principal components and no t-SNE"
)
NO_INITIAL = "the features of the initial weights were not kept: this run began without a map"
OTHER_INITIAL = (
    "the features of the initial weights are of other pictures or another picture size: the probe "
    "set or eval.image_size, eval.num_map_points were changed when the run was resumed"
)


def save_initial(folder: Path, backbone: nn.Module, probe: Probe, num_points: int) -> None:
    """Keep what the untrained network makes of the map's pictures. No random state moves."""
    samples = spread(probe.val, num_points)
    if samples.num_samples < MIN_POINTS:
        return
    rows = _features(backbone, probe, samples).numpy()
    np.savez(folder / INITIAL, features=rows, identity=np.array(_identity(probe, samples)))


def save_map(
    folder: Path, backbone: nn.Module, probe: Probe, num_points: int, seed: int
) -> dict[str, Any] | None:
    """Write ``feature_map.json`` and its thumbnails from the kept and the last features.

    Args:
        folder: Of the run.
        backbone: With its last weights.
        probe: Its validation set is drawn.
        num_points: At most so many, evenly over the set.
        seed: Of t-SNE.
    Returns:
        What was written; None where there are less than ``MIN_POINTS`` pictures.
    """
    samples = spread(probe.val, num_points)
    if samples.num_samples < MIN_POINTS:
        return None
    before, missing = _initial(folder, _identity(probe, samples))
    after = _features(backbone, probe, samples)
    labels = torch.from_numpy(samples.labels)
    columns = math.ceil(math.sqrt(samples.num_samples))
    _save_sprite(folder / SPRITE, samples, columns)
    library = _library()
    content = {
        "format": FORMAT,
        "method": "t-SNE" if library else "PCA",
        "library": library,
        "note": None if library else WITHOUT_LIBRARY,
        "seed": seed,
        "num_neighbours": _num_neighbours(samples.num_samples),
        "classes": samples.classes,
        "labels": labels.tolist(),
        "keys": [samples.key_name(i) for i in range(samples.num_samples)],
        "same_class_by_chance": _by_chance(labels),
        "thumbnails": {"file": SPRITE, "side": THUMBNAIL, "columns": columns},
        "missing": missing,
        "before": None if before is None else _drawn(before, labels, seed),
        "after": _drawn(after, labels, seed),
    }
    write_json(folder / NAME, content)
    return content


def _features(backbone: nn.Module, probe: Probe, samples: Subset) -> Float[Tensor, "n d"]:
    """Rows of length 1, so that Euclidean neighbours are those of the cosine."""
    with torch.random.fork_rng(devices=[]):  # an evaluation loader draws a number
        features, _ = probe.features(backbone, samples)
    return functional.normalize(features.float(), dim=1)


def _identity(probe: Probe, samples: Subset) -> str:
    """Which pictures, and in which size."""
    return f"{samples.fingerprint} {probe.config.image_size or probe.data.image_size}"


def _initial(folder: Path, identity: str) -> tuple[Tensor | None, str | None]:
    """The kept features, or why they are missing."""
    path = folder / INITIAL
    if not path.exists():
        return None, NO_INITIAL
    try:
        with np.load(path, allow_pickle=False) as kept:
            features, found = kept["features"], str(kept["identity"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        return None, f"{path.name} cannot be read: {error}"
    if found != identity:
        return None, OTHER_INITIAL
    return torch.from_numpy(features), None


def _drawn(features: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Places and figures of one state of the network."""
    start = time.process_time()
    deviation = float((features - features.mean(dim=0)).norm(dim=1).square().mean().sqrt())
    if not deviation > _SAME:
        return {"x": None, "y": None, "note": "all pictures have the same features: no map"}
    places = tsne(features, seed) if _library() else principal_components(features)
    k = _num_neighbours(len(features))
    figures = fidelity(features, places, labels, k)
    by_class = same_class(features, labels, k)
    x, y = ([round(float(value), 3) for value in column] for column in places.T)
    spent = round(time.process_time() - start, 3)
    drawn = {"x": x, "y": y, "note": None, **figures, "same_class_by_label": by_class}
    return drawn | {"processor_seconds": spent}


def tsne(features: Float[Tensor, "n d"], seed: int) -> Float[Tensor, "n 2"]:
    """Places by t-SNE (van der Maaten, Hinton, 2008), Barnes-Hut, from principal components.

    One thread: with several the order of sums, and so the map, would depend on their number.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    with threadpool_limits(1):
        places = TSNE(
            n_components=2, perplexity=perplexity, init="pca", random_state=seed % 2**32
        ).fit_transform(features.numpy())
    return torch.from_numpy(np.asarray(places, np.float32))


def principal_components(features: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
    """The first two, each with its largest value positive; 0 where there is no second one."""
    centred = (features - features.mean(dim=0)).double()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    places = torch.zeros(len(features), 2, dtype=torch.float64)
    num = min(2, len(s))
    places[:, :num] = u[:, :num] * s[:num]
    for column in places.T:
        column *= 1 if column[column.abs().argmax()] >= 0 else -1
    return places.float()


def fidelity(
    features: Float[Tensor, "n d"], places: Float[Tensor, "n 2"], labels: Int[Tensor, " n"], k: int
) -> dict[str, float]:
    """How far the map keeps the neighbours that points have among the features.

    Args:
        features: Rows of length 1.
        places: On the map.
        labels: Classes.
        k: Neighbours that are looked at; less than half the points.
    Returns:
        ``trustworthiness`` (Venna, Kaski, 2001): 1 where no point is among the k nearest on the map
        without being so among the features, less the further off it is there. ``neighbours_kept``:
        share of the k nearest among the features that are so on the map. ``same_class_features``
        and ``same_class_map``: share of the k nearest that have the point's class. All in [0, 1].
    """
    n = len(features)
    original, drawn = (_order(rows.double()) for rows in (features, places))
    rank = torch.empty_like(original)  # 0 for itself, 1 for the nearest
    rank.scatter_(1, original, torch.arange(n).expand(n, n).contiguous())
    near, near_drawn = original[:, 1 : k + 1], drawn[:, 1 : k + 1]
    too_far = (rank.gather(1, near_drawn) - k).clamp_min(0)
    is_kept = (near_drawn[:, :, None] == near[:, None, :]).any(dim=2)
    return {
        "trustworthiness": 1 - 2 * float(too_far.sum()) / (n * k * (2 * n - 3 * k - 1)),
        "neighbours_kept": float(is_kept.double().mean()),
        "same_class_features": float((labels[near] == labels[:, None]).double().mean()),
        "same_class_map": float((labels[near_drawn] == labels[:, None]).double().mean()),
    }


def same_class(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], k: int
) -> dict[str, float]:
    """For each class the share of the k nearest of its points that have it too, in [0, 1]."""
    near = _order(features.double())[:, 1 : k + 1]
    share = (labels[near] == labels[:, None]).double().mean(dim=1)
    return {str(int(c)): float(share[labels == c].mean()) for c in labels.unique()}


def _order(rows: Float[Tensor, "n d"]) -> Int[Tensor, "n n"]:
    """For each row all rows by their distance, itself first."""
    distances = torch.cdist(rows, rows)
    distances.fill_diagonal_(-1)
    return distances.argsort(dim=1, stable=True)


def _by_chance(labels: Int[Tensor, " n"]) -> float:
    """Share of the other points that have a point's class: what neighbours drawn by lot give."""
    counts = torch.bincount(labels).double()
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def _num_neighbours(num_points: int) -> int:
    return min(NUM_NEIGHBOURS, (num_points - 1) // 2)


def _library() -> str | None:
    """Name and version of what computes t-SNE; None where it is not installed."""
    try:
        import sklearn
    except ImportError:
        return None
    return f"scikit-learn {sklearn.__version__}"


def _save_sprite(path: Path, samples: Subset, columns: int) -> None:
    """All thumbnails in one picture, row by row, in the order of the points."""
    side, num = THUMBNAIL, samples.num_samples
    canvas = np.full((math.ceil(num / columns) * side, columns * side, 3), 255, np.uint8)
    for i in range(num):
        row, column = divmod(i, columns)
        y, x = row * side, column * side
        canvas[y : y + side, x : x + side] = picture(samples, i, side)
    save_jpeg(path, canvas, quality=80)
