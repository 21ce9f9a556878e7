"""Pictures that a person looks at, in ``pictures/`` of a run's folder.

The two views of some samples, nearest neighbours before and after the training, and a map of the
features in two dimensions: t-SNE, or PCA without scikit-learn. They are made by the first process
alone. None of it moves a random state or the weights: a run without pictures ends with the same
bits.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from common.files import write_json
from common.pictures import decode
from pretrain.config import DataConfig, PretrainConfig
from pretrain.data.decode import center_crop
from pretrain.data.input_pipeline import InputPipeline
from pretrain.data.shards import Samples, ShardIndex, Subset
from pretrain.engine.trainer import Callback
from pretrain.evaluation.probe import Probe, extract_features
from pretrain.features.memory_bank import top_k

TILE = 96  # pixels
GAP = 4
NUM_NEIGHBOURS = 6
MAX_BANK = 2048  # pictures that neighbours are looked for among
MIN_POINTS = 8  # of the map
MAX_CLASSES = 20  # in the map's legend; the points of rarer classes are grey
BEFORE, AFTER = "neighbours_before", "neighbours"  # files of the initial and of the last weights
MAP = "pictures/feature_map.png"
_PERPLEXITY = 30.0  # scikit-learn's default; less where there are few points


class RunPictures(Callback):
    """Views, galleries of neighbours before and after, and a map of the features.

    ``eval.num_pictures`` and ``eval.num_map_points`` say how much there is.

    Args:
        config: Of the run.
        folder: Of the run.
        backbone: Whose features are looked at.
        input_pipeline: Of the run.
        probe: Labelled sets; None: there is no map, and neighbours are training pictures.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        backbone: nn.Module,
        input_pipeline: InputPipeline,
        probe: Probe | None,
    ) -> None:
        self._config, self._folder, self._backbone = config, folder, backbone
        self._input_pipeline, self._probe = input_pipeline, probe

    def on_start(self) -> None:
        """Of the initial weights.

        What an earlier run left in the folder goes, so that nothing is taken for this run's.
        """
        (self._folder / MAP).unlink(missing_ok=True)
        for name in ("views", BEFORE, AFTER):
            for kind in ("jpg", "json"):
                (self._folder / "pictures" / f"{name}.{kind}").unlink(missing_ok=True)
        num, pipeline = self._config.eval.num_pictures, self._input_pipeline
        if num:
            first = pipeline.first_batch()
            ids, views = first.samples.sample_ids, first.views
            save_views(self._folder, pipeline.samples, ids, views, num, self._config.data)
            self._save_neighbours(BEFORE)

    def on_end(self) -> None:
        """Of the last weights, again if a finished run is resumed."""
        config, num_points = self._config, self._config.eval.num_map_points
        if not config.eval.num_pictures:
            return
        self._save_neighbours(AFTER)
        if self._probe is not None and num_points:
            save_map(self._folder, self._backbone, self._probe, num_points, config.seed)

    def _save_neighbours(self, name: str) -> None:
        save_neighbours(
            self._folder,
            self._backbone,
            self._input_pipeline.samples,
            self._probe,
            self._config.eval.num_pictures,
            self.trainer.device,
            self._config.data,
            name=name,
        )


# -- views and neighbours --


def save_views(
    folder: Path,
    index: Samples | None,
    ids: Tensor,
    views: Tensor,
    num_rows: int,
    data: DataConfig,
) -> None:
    """``views.jpg``: a row per sample with the picture and its two augmented views.

    A stream (no ``index``) has the views only.
    """
    std = views.new_tensor(data.pixel_std).view(1, 3, 1, 1)
    mean = views.new_tensor(data.pixel_mean).view(1, 3, 1, 1)
    rows, described = [], []
    for i in range(min(num_rows, views.shape[1])):
        sample = int(ids[i])
        both = ((views[:, i] * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
        pictures = [] if index is None else [_tile(index, sample)]
        rows.append([*pictures, *(view.cpu().numpy() for view in both)])
        described.append({"sample": str(sample) if index is None else index.key_name(sample)})
    _save_grid(folder / "pictures" / "views.jpg", rows)
    columns = ["picture", "view 1", "view 2"][index is None :]
    write_json(folder / "pictures" / "views.json", {"columns": columns, "rows": described})


def save_neighbours(
    folder: Path,
    backbone: nn.Module,
    index: Samples | None,
    probe: Probe | None,
    num_rows: int,
    device: torch.device,
    data: DataConfig,
    *,
    name: str = AFTER,
) -> None:
    """``neighbours.jpg``: a query per row, then its nearest pictures in feature space.

    With a probe the queries are spread over its validation set and the bank over its training set,
    and the labels stand in the JSON; without one both are training pictures. Which pictures they
    are does not depend on the weights. A stream without a probe has nothing to look through:
    nothing is written. At most ``MAX_BANK + num_rows`` pictures pass the network, or without a
    probe ``MAX_BANK``. No random state moves.

    Args:
        folder: Of the run; the files lie in ``pictures/``.
        backbone: Image to pooled features.
        index: Training pictures.
        probe: Labelled sets, or None.
        num_rows: Number of queries.
        device: Where the backbone is.
        data: Size and normalisation of pictures where there is no probe.
        name: Of the files, ``neighbours_before`` for those of the initial weights.
    """
    excluded = None
    with torch.random.fork_rng(devices=[]):  # an evaluation loader draws a number
        if probe is not None:
            queries, bank = _spread(probe.val, num_rows), _spread(probe.train, MAX_BANK)
            features, labels = probe.features(backbone, queries)
            bank_features, bank_labels = probe.features(backbone, bank)
        elif index is not None:
            # The first pictures are queries among all that are looked through; none finds itself.
            queries = bank = index
            bank_features, bank_labels, _ = extract_features(
                backbone,
                index,
                image_size=data.image_size,
                mean=data.pixel_mean,
                std=data.pixel_std,
                device=device,
                max_samples=MAX_BANK,
            )
            features, labels = bank_features[:num_rows], bank_labels[:num_rows]
            excluded = torch.arange(len(features))
        else:
            return
    k = min(NUM_NEIGHBOURS, len(bank_features) - (excluded is not None))
    values, nearest = top_k(
        features, bank_features, k, is_unit=False, excluded=excluded, device=device
    )

    def class_of(samples: Samples, label: int) -> str | None:
        if label < 0:
            return None
        return samples.classes[label] if samples.classes else str(label)

    rows, described = [], []
    for query, neighbours in enumerate(nearest.tolist()):
        rows.append([_tile(queries, query), *(_tile(bank, i) for i in neighbours)])
        described.append(
            {
                "query": queries.key_name(query),
                "query_label": class_of(queries, int(labels[query])),
                "neighbours": [bank.key_name(i) for i in neighbours],
                "neighbour_labels": [class_of(bank, int(bank_labels[i])) for i in neighbours],
                "similarities": [round(float(v), 4) for v in values[query]],
            }
        )
    _save_grid(folder / "pictures" / f"{name}.jpg", rows)
    report = {"num_bank": len(bank_features), "rows": described}
    write_json(folder / "pictures" / f"{name}.json", report)


def _spread(index: ShardIndex, most: int) -> Subset:
    """At most so many samples of a set, evenly over it, since it may be ordered by class."""
    num = min(most, index.num_samples)
    return Subset(index, np.linspace(0, index.num_samples - 1, num).astype(np.int64))


def _tile(index: Samples, sample: int) -> np.ndarray:
    """The middle square of a sample's picture, uint8 RGB [TILE, TILE, 3]."""
    return center_crop(decode(index.read_bytes(sample), where=index.describe(sample)), TILE)


def _save_grid(path: Path, rows: list[list[np.ndarray]]) -> None:
    """Tiles in rows with white gaps, as a JPEG."""
    step = TILE + GAP
    canvas = np.full((len(rows) * step - GAP, len(rows[0]) * step - GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            tile = cv2.resize(tile, (TILE, TILE), interpolation=cv2.INTER_AREA)
            canvas[r * step : r * step + TILE, c * step : c * step + TILE] = tile
    ok, data = cv2.imencode(".jpg", canvas[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert ok, "OpenCV could not encode a JPEG"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


# -- the map --


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
    samples = _spread(probe.val, num_points)
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
    _draw(folder / MAP, places, samples.labels, names, title)
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
    classes, counts = np.unique(labels, return_counts=True)
    frequent = sorted(classes[np.argsort(-counts, kind="stable")][:MAX_CLASSES])
    others = ~np.isin(labels, frequent)
    axes.scatter(*places[torch.from_numpy(others)].T, s=9, c="0.7", marker=".")
    for i, label in enumerate(frequent):
        points = places[torch.from_numpy(labels == label)].T
        name = names.get(int(label), str(label)).replace("$", r"\$")
        colour, mark = colormaps["tab10"](i % 10), "os^vDP*"[i % 7]
        axes.scatter(*points, s=14, color=colour, marker=mark, label=name)
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
