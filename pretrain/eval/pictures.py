"""Pictures that a person looks at: the two views of some samples, and nearest neighbours."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from pretrain.config import DataConfig
from pretrain.data.mixture import Samples
from pretrain.data.views import center_crop, decode
from pretrain.engine.run_folder import write_json
from pretrain.eval.features import extract_features
from pretrain.eval.knn import nearest_rows
from pretrain.eval.probe import Probe

TILE = 96  # pixels
GAP = 4
NUM_NEIGHBOURS = 6
MAX_BANK = 2048  # pictures searched where there is no probe


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
        pictures = [] if index is None else [_picture(index, sample)]
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
) -> None:
    """``neighbours.jpg``: a query per row, then its nearest pictures in feature space.

    With a probe the queries are validation pictures and the bank is the probe's training set, and
    the labels stand in the JSON; without one both are training pictures. A stream without a probe
    has nothing to look through: nothing is written.
    """
    if probe is not None:
        bank_index, query_index = probe.train, probe.val
        bank, bank_labels = probe.features(backbone, bank_index)
        queries, labels = probe.features(backbone, query_index)
        chosen = np.linspace(0, len(queries) - 1, min(num_rows, len(queries))).astype(int)
    elif index is None:
        return
    else:
        bank_index = query_index = index
        bank, bank_labels, _ = extract_features(
            backbone, index, image_size=data.image_size, mean=data.pixel_mean, std=data.pixel_std,
            device=device, max_samples=MAX_BANK,
        )  # fmt: skip
        queries, labels = bank, bank_labels
        chosen = np.arange(min(num_rows, len(queries)))
    itself = torch.as_tensor(chosen) if probe is None else None
    k = min(NUM_NEIGHBOURS, len(bank) - (probe is None))
    values, nearest = nearest_rows(bank, queries[chosen], k, excluded=itself, device=device)
    names = bank_index.classes
    rows, described = [], []
    for row, query in enumerate(chosen):
        ids = [int(i) for i in nearest[row]]
        rows.append([_picture(query_index, int(query)), *(_picture(bank_index, i) for i in ids)])
        described.append(
            {
                "query": query_index.key_name(int(query)),
                "query_label": _name(names, int(labels[query])),
                "neighbours": [bank_index.key_name(i) for i in ids],
                "neighbour_labels": [_name(names, int(bank_labels[i])) for i in ids],
                "similarities": [round(float(v), 4) for v in values[row]],
            }
        )
    _save_grid(folder / "pictures" / "neighbours.jpg", rows)
    write_json(folder / "pictures" / "neighbours.json", {"rows": described})


def _name(names: list[str] | None, label: int) -> str | None:
    if label < 0:
        return None
    return names[label] if names else str(label)


def _picture(index: Samples, sample: int) -> np.ndarray:
    """A sample as the middle square of its picture, uint8 RGB."""
    return center_crop(decode(index.read_bytes(sample), where=index.describe(sample)), TILE)


def _save_grid(path: Path, rows: list[list[np.ndarray]]) -> None:
    """Tiles in rows with white gaps, as a JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    step = TILE + GAP
    canvas = np.full((len(rows) * step - GAP, len(rows[0]) * step - GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            tile = cv2.resize(tile, (TILE, TILE), interpolation=cv2.INTER_AREA)
            canvas[r * step : r * step + TILE, c * step : c * step + TILE] = tile
    ok, data = cv2.imencode(".jpg", canvas[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert ok, "OpenCV could not encode a JPEG"
    path.write_bytes(data.tobytes())
