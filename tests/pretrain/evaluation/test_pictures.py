"""The pictures a person looks at: which tiles stand where, and what the JSON says about them."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from common.pictures import decode
from pretrain.config import DataConfig, EvalConfig
from pretrain.data.decode import center_crop
from pretrain.data.loader import Loader, ViewDataset
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.shards import ShardIndex
from pretrain.evaluation import pictures
from pretrain.evaluation.pictures import GAP, TILE, save_neighbours, save_views
from pretrain.evaluation.probe import Probe

CPU = torch.device("cpu")
DATA = DataConfig(image_size=32, batch_size=8)


class Pixels(nn.Module):
    """Features that can be computed by hand: the picture in 4 x 4."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def tile(path, row, column):
    picture = cv2.imread(str(path))[:, :, ::-1].astype(int)
    step = TILE + GAP
    return picture[row * step : row * step + TILE, column * step : column * step + TILE]


def assert_alike(a, b):
    """Equal up to JPEG's losses."""
    assert np.abs(a - b.astype(int)).mean() < 6


def sample_tile(index, number):
    return center_crop(decode(index.read_bytes(number), where="test"), TILE)


@pytest.fixture
def index(shards):
    return ShardIndex.open(shards)


@pytest.fixture
def batch(index):
    dataset = ViewDataset(index, image_size=32, views=AugmentationPolicy.of("crops").views, seed=0)
    return next(iter(Loader(dataset, batch_size=8).epoch(0)))


def test_views_show_picture_and_both_views(tmp_path, index, batch):
    mean = torch.tensor(DATA.pixel_mean).view(3, 1, 1)
    std = torch.tensor(DATA.pixel_std).view(3, 1, 1)
    views = (batch.views.float() / 255 - mean) / std
    save_views(tmp_path, index, batch.sample_ids, views, 3, DATA)
    path = tmp_path / "pictures" / "views.jpg"
    assert cv2.imread(str(path)).shape == (3 * (TILE + GAP) - GAP, 3 * (TILE + GAP) - GAP, 3)
    described = json.loads((tmp_path / "pictures" / "views.json").read_text())
    assert described["columns"] == ["picture", "view 1", "view 2"]
    for row in range(3):
        number = int(batch.sample_ids[row])
        assert described["rows"][row] == {"sample": index.key_name(number)}
        assert_alike(tile(path, row, 0), sample_tile(index, number))
        for view in (0, 1):
            image = batch.views[view, row].permute(1, 2, 0).numpy()
            large = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
            assert_alike(tile(path, row, 1 + view), large)


def test_gaps_are_white(tmp_path, index, batch):
    save_views(tmp_path, index, batch.sample_ids, batch.views.float() / 255, 2, DATA)
    picture = cv2.imread(str(tmp_path / "pictures" / "views.jpg"))
    assert picture[TILE + 1 : TILE + GAP - 1].mean() > 245
    assert picture[:, TILE + 1 : TILE + GAP - 1].mean() > 245


def test_a_stream_shows_the_views_only(tmp_path, batch):
    save_views(tmp_path, None, batch.sample_ids, batch.views.float() / 255, 2, DATA)
    described = json.loads((tmp_path / "pictures" / "views.json").read_text())
    assert described["columns"] == ["view 1", "view 2"]
    assert described["rows"][1] == {"sample": str(int(batch.sample_ids[1]))}
    shape = cv2.imread(str(tmp_path / "pictures" / "views.jpg")).shape
    assert shape == (2 * (TILE + GAP) - GAP, 2 * (TILE + GAP) - GAP, 3)


def test_no_more_rows_than_the_batch(tmp_path, index, batch):
    save_views(tmp_path, index, batch.sample_ids, batch.views.float(), 50, DATA)
    described = json.loads((tmp_path / "pictures" / "views.json").read_text())
    assert len(described["rows"]) == 8


def by_hand(queries, bank, exclude_self):
    """Similarities in numpy and the order of the bank for each query."""
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    b = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    similarity = q @ b.T
    if exclude_self:
        np.fill_diagonal(similarity, -2)
    return similarity, np.argsort(-similarity, axis=1)


def features_by_hand(index):
    mean, std = np.array(DATA.pixel_mean), np.array(DATA.pixel_std)
    rows = []
    for i in range(index.num_samples):
        image = center_crop(decode(index.read_bytes(i), where="test"), 32) / 255
        cells = image.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3))
        rows.append(((cells - mean) / std).transpose(2, 0, 1).ravel())
    return np.array(rows)


def test_neighbours_without_a_probe_leave_the_query_out(tmp_path, index):
    save_neighbours(tmp_path, Pixels(), index, None, 4, CPU, DATA)
    path = tmp_path / "pictures" / "neighbours.jpg"
    rows = json.loads((tmp_path / "pictures" / "neighbours.json").read_text())["rows"]
    features = features_by_hand(index)
    similarity, order = by_hand(features, features, exclude_self=True)
    assert len(rows) == 4
    for i, row in enumerate(rows):
        assert row["query"] == index.key_name(i)
        assert row["neighbours"] == [index.key_name(int(j)) for j in order[i, :6]]
        assert row["query"] not in row["neighbours"]
        expected = [similarity[i, j] for j in order[i, :6]]
        np.testing.assert_allclose(row["similarities"], expected, atol=1e-3)
        assert row["query_label"] == f"class-{int(index.labels[i])}"
        for column, j in enumerate(order[i, :6]):
            assert_alike(tile(path, i, 1 + column), sample_tile(index, int(j)))
        assert_alike(tile(path, i, 0), sample_tile(index, i))


def test_neighbours_of_a_probe_come_from_its_training_set(tmp_path, index, make_shards):
    queries = make_shards("queries", num=10)
    config = EvalConfig(probe_train=str(index.folder), probe_val=str(queries), knn_k=3)
    probe = Probe.open(config, DATA, CPU)
    save_neighbours(tmp_path, Pixels(), index, probe, 3, CPU, DATA)
    rows = json.loads((tmp_path / "pictures" / "neighbours.json").read_text())["rows"]
    chosen = [0, 4, 9]  # spread over the validation set, since it is ordered by class
    val = ShardIndex.open(queries)
    _, order = by_hand(features_by_hand(val), features_by_hand(index), exclude_self=False)
    for row, i in zip(rows, chosen, strict=True):
        assert row["query"] == val.key_name(i)
        assert row["neighbours"] == [index.key_name(int(j)) for j in order[i, :6]]
        labels = [f"class-{int(index.labels[j])}" for j in order[i, :6]]
        assert row["neighbour_labels"] == labels


def test_unlabelled_pictures_have_no_label(tmp_path, unlabelled_shards):
    index = ShardIndex.open(unlabelled_shards)
    save_neighbours(tmp_path, Pixels(), index, None, 2, CPU, DATA)
    rows = json.loads((tmp_path / "pictures" / "neighbours.json").read_text())["rows"]
    assert rows[0]["query_label"] is None
    assert rows[0]["neighbour_labels"] == [None] * 6


def test_few_pictures_have_few_neighbours(tmp_path, make_shards):
    index = ShardIndex.open(make_shards("few", num=3))
    save_neighbours(tmp_path, Pixels(), index, None, 8, CPU, replace(DATA, batch_size=2))
    rows = json.loads((tmp_path / "pictures" / "neighbours.json").read_text())["rows"]
    assert [len(row["neighbours"]) for row in rows] == [2, 2, 2]


def test_a_large_bank_is_thinned_out_evenly(tmp_path, index, make_shards, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BANK", 10)
    config = EvalConfig(
        probe_train=str(index.folder), probe_val=str(make_shards("few-queries", num=9)), knn_k=3
    )
    probe = Probe.open(config, DATA, CPU)
    seen = []
    backbone = Pixels()
    backbone.register_forward_hook(lambda module, given, _: seen.append(len(given[0])))
    save_neighbours(tmp_path, backbone, index, probe, 4, CPU, DATA)
    assert seen == [4, 10]  # no more pictures pass the network
    found = json.loads((tmp_path / "pictures" / "neighbours.json").read_text())
    assert found["num_bank"] == 10
    bank = np.linspace(0, 39, 10).astype(int)
    chosen = np.linspace(0, 8, 4).astype(int)
    queries = features_by_hand(probe.val)[chosen]
    _, order = by_hand(queries, features_by_hand(index)[bank], exclude_self=False)
    for row, nearest in zip(found["rows"], order, strict=True):
        assert row["neighbours"] == [index.key_name(int(bank[j])) for j in nearest[:6]]


@pytest.mark.parametrize("has_probe", [True, False])
def test_random_states_stay(tmp_path, index, has_probe):
    config = EvalConfig(probe_train=str(index.folder), probe_val=str(index.folder), knn_k=3)
    probe = Probe.open(config, DATA, CPU) if has_probe else None
    before = torch.get_rng_state()
    save_neighbours(tmp_path, Pixels(), index, probe, 2, CPU, DATA, name="neighbours_before")
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "pictures" / "neighbours_before.jpg").exists()
    assert not (tmp_path / "pictures" / "neighbours.jpg").exists()
