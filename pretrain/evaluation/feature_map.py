"""A picture of the probe's features in two dimensions: t-SNE, or PCA without scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pretrain.evaluation.pictures import spread
from pretrain.evaluation.probe import Probe

NAME = "pictures/feature_map.png"
MIN_POINTS = 8
MAX_CLASSES = 20  # in the legend; the points of rarer classes are grey
_PERPLEXITY = 30.0  # scikit-learn's default; less where there are few points


def save_map(
    folder: Path, backbone: nn.Module, probe: Probe, num_points: int, seed: int
) -> Float[Tensor, "n 2"] | None:
    """Write ``pictures/feature_map.png``. No random state moves.

    Args:
        folder: Of the run.
        backbone: With its last weights.
        probe: Its validation set is drawn.
        num_points: At most so many, evenly over the set.
        seed: Of t-SNE.
    Returns:
        The places; None, and no picture, where there are less than ``MIN_POINTS`` pictures.
    """
    samples = spread(probe.val, num_points)
    if samples.num_samples < MIN_POINTS:
        return None
    with torch.random.fork_rng(devices=[]):  # an evaluation loader draws a number
        features, _ = probe.features(backbone, samples)
    # Rows of length 1, so that Euclidean neighbours are those of the cosine.
    features = functional.normalize(features.float(), dim=1)
    method, places = "t-SNE", tsne(features, seed)
    if places is None:
        method, places = "PCA", principal_components(features)
    names = dict(enumerate(samples.classes or []))
    title = f"{method} of the features of {samples.num_samples} validation pictures"
    _draw(folder / NAME, places, samples.labels, names, title)
    return places


def tsne(features: Float[Tensor, "n d"], seed: int) -> Float[Tensor, "n 2"] | None:
    """Places by t-SNE (van der Maaten, Hinton, 2008), Barnes-Hut, from principal components.

    One thread: with several the order of sums, and so the map, would depend on their number.
    None where scikit-learn is not installed, or where all rows are the same.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError:
        return None
    if float(features.std(dim=0).norm()) < 1e-6:
        return None
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


def _draw(
    path: Path, places: Tensor, labels: np.ndarray, names: dict[int, str], title: str
) -> None:
    """One colour and mark a class, the most frequent classes in the legend."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    found, counts = np.unique(labels, return_counts=True)
    shown = sorted(found[np.argsort(-counts, kind="stable")][:MAX_CLASSES])
    others = ~np.isin(labels, shown)
    axes.scatter(*places[torch.from_numpy(others)].T, s=9, c="0.7", marker=".")
    for i, label in enumerate(shown):
        points = places[torch.from_numpy(labels == label)]
        name = names.get(int(label), str(label)).replace("$", r"\$")
        axes.scatter(
            *points.T, s=14, color=colormaps["tab10"](i % 10), marker="os^vDP*"[i % 7], label=name
        )
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
