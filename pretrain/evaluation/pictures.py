"""Pictures that a person looks at: the two views of some samples, and nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from common.files import write_json
from common.pictures import decode
from pretrain.config import DataConfig
from pretrain.data.crops import center_crop
from pretrain.data.mixture import Samples, Subset
from pretrain.data.shards import ShardIndex
from pretrain.evaluation.knn import nearest_rows
from pretrain.evaluation.probe import Probe, extract_features

TILE = 96  # pixels
GAP = 4
NUM_NEIGHBOURS = 6
MAX_BANK = 2048  # pictures that neighbours are looked for among
BEFORE, AFTER = "neighbours_before", "neighbours"  # files of the initial and of the last weights


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
        pictures = [] if index is None else [picture(index, sample)]
        rows.append([*pictures, *(view.cpu().numpy() for view in both)])
        described.append({"sample": str(sample) if index is None else index.key_name(sample)})
    _save_grid(folder / "pictures" / "views.jpg", rows)
    write_json(
        folder / "pictures" / "views.json",
        {"columns": ["picture", "view 1", "view 2"][index is None :], "rows": described},
    )


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
    with torch.random.fork_rng(devices=[]):  # an evaluation loader draws a number
        if probe is not None:
            queries, bank, excluded = _through_probe(backbone, probe, num_rows)
        elif index is not None:
            queries, bank, excluded = _through_training_set(backbone, index, num_rows, device, data)
        else:
            return
    k = min(NUM_NEIGHBOURS, len(bank.features) - (excluded is not None))
    values, nearest = nearest_rows(
        bank.features, queries.features, k, excluded=excluded, device=device
    )
    rows, described = [], []
    for query in range(len(queries.features)):
        ids = [int(i) for i in nearest[query]]
        rows.append([picture(queries.index, query), *(picture(bank.index, i) for i in ids)])
        described.append(
            {
                "query": queries.index.key_name(query),
                "query_label": queries.label_name(query),
                "neighbours": [bank.index.key_name(i) for i in ids],
                "neighbour_labels": [bank.label_name(i) for i in ids],
                "similarities": [round(float(v), 4) for v in values[query]],
            }
        )
    _save_grid(folder / "pictures" / f"{name}.jpg", rows)
    write_json(
        folder / "pictures" / f"{name}.json", {"num_bank": len(bank.features), "rows": described}
    )


@dataclass(frozen=True)
class _Looked:
    """Pictures and what the network makes of them.

    Attributes:
        index: Sample ``i`` has row ``i`` of the features.
        features: [n, d].
        labels: [n]; -1 where there is none.
    """

    index: Samples
    features: Tensor
    labels: Tensor

    def label_name(self, i: int) -> str | None:
        """The class of a sample, None where it is not known."""
        label = int(self.labels[i])
        if label < 0:
            return None
        return self.index.classes[label] if self.index.classes else str(label)


def _through_probe(
    backbone: nn.Module, probe: Probe, num_rows: int
) -> tuple[_Looked, _Looked, None]:
    """Queries of the validation set, bank of the training set."""
    queries, bank = spread(probe.val, num_rows), spread(probe.train, MAX_BANK)
    return (
        _Looked(queries, *probe.features(backbone, queries)),
        _Looked(bank, *probe.features(backbone, bank)),
        None,
    )


def _through_training_set(
    backbone: nn.Module, index: Samples, num_rows: int, device: torch.device, data: DataConfig
) -> tuple[_Looked, _Looked, Tensor]:
    """The first pictures are queries among all that are looked through; none finds itself."""
    features, labels, _ = extract_features(
        backbone, index, image_size=data.image_size, mean=data.pixel_mean, std=data.pixel_std,
        device=device, max_samples=MAX_BANK,
    )  # fmt: skip
    num = min(num_rows, len(features))
    bank = _Looked(index, features, labels)
    return _Looked(index, features[:num], labels[:num]), bank, torch.arange(num)


def spread(index: ShardIndex, most: int) -> Subset:
    """At most so many samples of a set, evenly over it, since it may be ordered by class."""
    num = min(most, index.num_samples)
    return Subset(index, np.linspace(0, index.num_samples - 1, num).astype(np.int64))


def picture(index: Samples, sample: int, side: int = TILE) -> np.ndarray:
    """A sample as the middle square of its picture, uint8 RGB [side, side, 3]."""
    return center_crop(decode(index.read_bytes(sample), where=index.describe(sample)), side)


def _save_grid(path: Path, rows: list[list[np.ndarray]]) -> None:
    """Tiles in rows with white gaps, as a JPEG."""
    step = TILE + GAP
    canvas = np.full((len(rows) * step - GAP, len(rows[0]) * step - GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            tile = cv2.resize(tile, (TILE, TILE), interpolation=cv2.INTER_AREA)
            canvas[r * step : r * step + TILE, c * step : c * step + TILE] = tile
    save_jpeg(path, canvas, quality=88)


def save_jpeg(path: Path, rgb: np.ndarray, *, quality: int) -> None:
    """Write uint8 RGB [h, w, 3]; the folder is made if need be."""
    ok, data = cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok, "OpenCV could not encode a JPEG"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
