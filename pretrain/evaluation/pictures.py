"""Pictures that a person looks at, in ``pictures/`` of a run's folder.

The two views of some samples, nearest neighbours before and after the training, and a map of the
features in two dimensions, where scikit-learn is installed. They are made by the first process
alone. None of it moves a random state or the weights: a run without pictures ends with the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from common.files import write_bytes, write_json
from common.pictures import BadPicture, decode
from pretrain.config import PretrainConfig
from pretrain.data.decode import center_crop
from pretrain.data.input_pipeline import InputPipeline
from pretrain.data.shards import Samples, ShardIndex, Subset
from pretrain.engine.trainer import Callback
from pretrain.evaluation.probe import Probe, extract_features
from pretrain.features.memory_bank import top_k
from pretrain.model.joint_embedding import NUM_LARGE, Views

TILE = 96  # pixels
GAP = 4
CAPTION = 16  # height of a line under a tile
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
        self._device = next(backbone.parameters()).device

    def on_start(self) -> None:
        """Of the initial weights.

        What an earlier run left in the folder goes, so that nothing is taken for this run's.
        """
        (self._folder / MAP).unlink(missing_ok=True)
        for name in ("views", BEFORE, AFTER):
            for kind in ("jpg", "json"):
                (self._folder / "pictures" / f"{name}.{kind}").unlink(missing_ok=True)
        if self._config.eval.num_pictures:
            first = self._input_pipeline.first_batch()
            self.save_views(first.samples.sample_ids, first.views)
            self.save_neighbours(BEFORE)

    def on_end(self) -> None:
        """Of the last weights, again if a finished run is resumed."""
        config = self._config
        if config.eval.num_pictures:
            self.save_neighbours(AFTER)
            if self._probe is not None and config.eval.num_map_points:
                num_points = config.eval.num_map_points
                save_map(self._folder, self._backbone, self._probe, num_points, config.seed)

    def save_views(self, ids: Int[Tensor, " n"], views: Views) -> None:
        """``views.jpg``: a row per sample with the picture, its two augmented views, small crops.

        A stream has the views only.
        """
        data, index = self._config.data, self._input_pipeline.samples
        std, mean = (
            views[0].new_tensor(x).view(3, 1, 1) for x in (data.pixel_std, data.pixel_mean)
        )
        rows, described = [], []
        for i, sample in enumerate(ids[: self._config.eval.num_pictures].tolist()):
            pictures = [] if index is None else [_tile(index, sample)]
            for view in views:
                pixels = ((view[i] * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0)
                pictures.append(pixels.cpu().numpy())
            rows.append(pictures)
            described.append({"sample": str(sample) if index is None else index.key_name(sample)})
        num_small = len(views) - NUM_LARGE
        small = [f"small crop {number + 1}" for number in range(num_small)]
        columns = ["picture", "view 1", "view 2", *small][index is None :]
        about = {"columns": columns, "rows": described}
        save_grid(self._folder / "pictures/views.jpg", rows, about)

    def save_neighbours(self, name: str) -> None:
        """``neighbours.jpg``: a query per row, then its nearest pictures in feature space.

        With a probe the queries are spread over its validation set and the bank over its training
        set, and the labels stand in the JSON; without one both are training pictures. Which
        pictures they are does not depend on the weights. A stream without a probe has nothing to
        look through: nothing is written. At most ``MAX_BANK + eval.num_pictures`` pictures pass the
        network, or without a probe ``MAX_BANK``. No random state moves.

        Args:
            name: Of the files, ``neighbours_before`` for those of the initial weights.
        """
        probe, data, excluded = self._probe, self._config.data, None
        num_rows, index = self._config.eval.num_pictures, self._input_pipeline.samples
        if probe is not None:
            queries, bank = _spread(probe.val, num_rows), _spread(probe.train, MAX_BANK)
            features, _ = probe.features(self._backbone, queries)
            bank_features, _ = probe.features(self._backbone, bank)
        elif index is not None:
            # The first pictures are queries among all that are looked at; none finds itself. The
            # training counts those that do not decode.
            queries = bank = index
            bank_features, _ = extract_features(
                self._backbone, index, data, self._device, max_samples=MAX_BANK, may_replace=True
            )
            features = bank_features[:num_rows]
            excluded = torch.arange(len(features))
        else:
            return
        k = min(NUM_NEIGHBOURS, len(bank_features) - (excluded is not None))
        values, nearest = top_k(
            features, bank_features, k, is_unit=False, excluded=excluded, device=self._device
        )

        def class_of(samples: Samples, label: int) -> str | None:
            if label < 0:
                return None
            return samples.classes[label] if samples.classes else str(label)

        rows, described, query_labels, bank_labels = [], [], queries.labels, bank.labels
        for query, neighbours in enumerate(nearest.tolist()):
            rows.append([_tile(queries, query), *(_tile(bank, i) for i in neighbours)])
            described.append(
                {
                    "query": queries.key_name(query),
                    "query_label": class_of(queries, int(query_labels[query])),
                    "neighbours": [bank.key_name(i) for i in neighbours],
                    "neighbour_labels": [class_of(bank, int(bank_labels[i])) for i in neighbours],
                    "similarities": [round(float(v), 4) for v in values[query]],
                }
            )
        about = {"num_bank": len(bank_features), "rows": described}
        save_grid(self._folder / f"pictures/{name}.jpg", rows, about)


def save_grid(
    path: Path,
    rows: list[list[np.ndarray]],
    described: dict[str, Any],
    captions: list[list[str]] | None = None,
) -> None:
    """Tiles in rows with white gaps, as a JPEG, and what they are, as JSON beside it.

    Args:
        path: Of the JPEG.
        rows: uint8 RGB [h, w, 3]; each is resized to TILE. Shorter rows end in white.
        described: For the JSON.
        captions: A few ASCII letters under each tile.
    """
    step, line = TILE + GAP, CAPTION if captions else 0
    width = max(map(len, rows)) * step - GAP
    canvas = np.full((len(rows) * (step + line) - GAP, width, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        top = r * (step + line)
        for c, tile in enumerate(row):
            tile = cv2.resize(tile, (TILE, TILE), interpolation=cv2.INTER_AREA)
            canvas[top : top + TILE, c * step : c * step + TILE] = tile
            if captions:
                place = (c * step + 2, top + TILE + CAPTION - 4)
                cv2.putText(canvas, captions[r][c], place, cv2.FONT_HERSHEY_SIMPLEX, 0.4,
                            (0, 0, 0), 1, cv2.LINE_AA)  # fmt: skip
    ok, data = cv2.imencode(".jpg", canvas[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert ok, "OpenCV could not encode a JPEG"
    write_bytes(path, data.tobytes())
    write_json(path.with_suffix(".json"), described)


def _spread(index: ShardIndex, most: int) -> Subset:
    """At most so many samples of a set, evenly over it, since it may be ordered by class."""
    num = min(most, index.num_samples)
    return Subset(index, np.linspace(0, index.num_samples - 1, num).astype(np.int64))


def _tile(index: Samples, sample: int) -> np.ndarray:
    """The tile of a sample's picture."""
    return tile_of(lambda: index.read_bytes(sample))


def tile_of(read: Callable[[], bytes]) -> np.ndarray:
    """The middle square of a picture, uint8 RGB [TILE, TILE, 3]; grey where it does not decode."""
    try:
        return center_crop(decode(read(), where="picture"), TILE)
    except BadPicture:
        return np.full((TILE, TILE, 3), 128, np.uint8)


def save_map(
    folder: Path, backbone: nn.Module, probe: Probe, num_points: int, seed: int
) -> np.ndarray | None:
    """Write ``pictures/feature_map.png``. No random state moves.

    Args:
        folder: Of the run.
        backbone: With its last weights.
        probe: Its validation set is drawn.
        num_points: At most so many, evenly over the set.
        seed: Of t-SNE.
    Returns:
        The places [n, 2] by t-SNE (van der Maaten, Hinton, 2008); None, and no picture, without
        scikit-learn, below ``MIN_POINTS`` pictures, or where all features are the same.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError:
        return None
    samples = _spread(probe.val, num_points)
    if samples.num_samples < MIN_POINTS:
        return None
    features, _ = probe.features(backbone, samples)
    # Rows of length 1, so that Euclidean neighbours are those of the cosine.
    features = functional.normalize(features.float(), dim=1)
    if float(features.std(dim=0).norm()) < 1e-6:
        return None
    perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
    with threadpool_limits(1):  # the order of sums, and so the map, depends on their number
        places = TSNE(
            n_components=2, perplexity=perplexity, init="pca", random_state=seed % 2**32
        ).fit_transform(features.numpy())
    _draw(folder / MAP, places, samples)
    return places


def _draw(path: Path, places: np.ndarray, samples: Subset) -> None:
    """A colour and a mark for each of the most frequent classes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    labels, names = samples.labels, dict(enumerate(samples.classes or []))
    classes, counts = np.unique(labels, return_counts=True)
    frequent = sorted(classes[np.argsort(-counts, kind="stable")][:MAX_CLASSES])
    axes.scatter(*places[~np.isin(labels, frequent)].T, s=9, c="0.7", marker=".")
    for i, label in enumerate(frequent):
        name = names.get(int(label), str(label)).replace("$", r"\$")
        colour, mark = colormaps["tab10"](i % 10), "os^vDP*"[i % 7]
        axes.scatter(*places[labels == label].T, s=14, color=colour, marker=mark, label=name)
    title = f"t-SNE of the features of {samples.num_samples} validation pictures"
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
