"""The pictures a person looks at: which tiles stand where, what the JSON says, the map."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from common.pictures import decode
from pretrain.config import DataConfig, EvalConfig, PretrainConfig
from pretrain.data.decode import center_crop
from pretrain.data.loader import Loader, ViewDataset
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.shards import ShardIndex
from pretrain.evaluation import pictures
from pretrain.evaluation.pictures import GAP, TILE, RunPictures, save_map
from pretrain.evaluation.probe import Probe

CPU = torch.device("cpu")
DATA = DataConfig(image_size=32, batch_size=8)


class Pixels(nn.Module):
    """Features that can be computed by hand: the picture in 4 x 4; notes how many it sees."""

    def __init__(self):
        super().__init__()
        self.one, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, images):
        self.seen.append(len(images))
        return self.one.detach() * functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def index(shards):
    return ShardIndex.open(shards)


@pytest.fixture(scope="module")
def val(make_shards):
    return make_shards("val", num=40)


@pytest.fixture
def batch(index):
    dataset = ViewDataset(index, image_size=32, views=AugmentationPolicy.of("crops").views, seed=0)
    return next(iter(Loader(dataset, batch_size=8).epoch(0)))


@pytest.fixture
def make_pictures(tmp_path):
    """A factory: make_pictures(training set, probe, num rows)."""

    def make(index, probe, num):
        config = replace(PretrainConfig(out="x"), data=DATA, eval=EvalConfig(num_pictures=num))
        return RunPictures(config, tmp_path, Pixels(), SimpleNamespace(samples=index), probe)

    return make


def open_probe(train, val):
    return Probe.open(EvalConfig(probe_train=str(train), probe_val=str(val), knn_k=3), DATA, CPU)


def described(tmp_path, name):
    return json.loads((tmp_path / "pictures" / f"{name}.json").read_text())


def tile(path, row, column):
    picture = cv2.imread(str(path))[:, :, ::-1].astype(int)
    step = TILE + GAP
    return picture[row * step : row * step + TILE, column * step : column * step + TILE]


def assert_alike(a, b):
    """Equal up to JPEG's losses."""
    assert np.abs(a - b.astype(int)).mean() < 6


def sample_tile(index, number):
    return center_crop(decode(index.read_bytes(number), where="test"), TILE)


def test_views_show_picture_and_both_views(tmp_path, index, batch, make_pictures):
    mean = torch.tensor(DATA.pixel_mean).view(3, 1, 1)
    std = torch.tensor(DATA.pixel_std).view(3, 1, 1)
    views = (batch.views.float() / 255 - mean) / std
    small = [torch.full((8, 3, 16, 16), level) for level in (-1.0, 1.0)]
    make_pictures(index, None, 3).save_views(batch.sample_ids, [*views, *small])
    columns = ["picture", "view 1", "view 2", "small crop 1", "small crop 2"]
    assert described(tmp_path, "views")["columns"] == columns
    dark, bright = (tile(tmp_path / "pictures" / "views.jpg", 2, n).mean() for n in (3, 4))
    assert dark < 80 < 160 < bright
    make_pictures(index, None, 3).save_views(batch.sample_ids, views)
    path, found = tmp_path / "pictures" / "views.jpg", described(tmp_path, "views")
    assert cv2.imread(str(path)).shape == (3 * (TILE + GAP) - GAP, 3 * (TILE + GAP) - GAP, 3)
    assert found["columns"] == ["picture", "view 1", "view 2"]
    for row in range(3):
        number = int(batch.sample_ids[row])
        assert found["rows"][row] == {"sample": index.key_name(number)}
        assert_alike(tile(path, row, 0), sample_tile(index, number))
        for view in (0, 1):
            image = batch.views[view, row].permute(1, 2, 0).numpy()
            large = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
            assert_alike(tile(path, row, 1 + view), large)


def test_a_stream_shows_the_views_only_and_no_more_than_the_batch(tmp_path, batch, make_pictures):
    make_pictures(None, None, 50).save_views(batch.sample_ids, batch.views.float() / 255)
    found = described(tmp_path, "views")
    assert found["columns"] == ["view 1", "view 2"]
    assert found["rows"] == [{"sample": str(number)} for number in batch.sample_ids.tolist()]
    make_pictures(None, None, 3).save_neighbours("neighbours")  # nothing to look through
    assert not (tmp_path / "pictures" / "neighbours.json").exists()


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


def test_neighbours_without_a_probe_leave_the_query_out(tmp_path, index, make_pictures):
    before = torch.get_rng_state()
    make_pictures(index, None, 4).save_neighbours("neighbours_before")
    assert torch.equal(torch.get_rng_state(), before)
    path = tmp_path / "pictures" / "neighbours_before.jpg"
    rows = described(tmp_path, "neighbours_before")["rows"]
    features = features_by_hand(index)
    similarity, order = by_hand(features, features, exclude_self=True)
    assert len(rows) == 4
    for i, row in enumerate(rows):
        assert row["query"] == index.key_name(i)
        assert row["neighbours"] == [index.key_name(int(j)) for j in order[i, :6]]
        expected = [similarity[i, j] for j in order[i, :6]]
        np.testing.assert_allclose(row["similarities"], expected, atol=1e-3)
        assert row["query_label"] == f"class-{int(index.labels[i])}"
        for column, j in enumerate(order[i, :6]):
            assert_alike(tile(path, i, 1 + column), sample_tile(index, int(j)))
        assert_alike(tile(path, i, 0), sample_tile(index, i))


@pytest.mark.parametrize("max_bank", [10, 2048])
def test_neighbours_of_a_probe_come_from_its_training_set(
    tmp_path, index, val, make_pictures, monkeypatch, max_bank
):
    """Queries and a bank that is too large are thinned out evenly: a set may be in class order."""
    monkeypatch.setattr(pictures, "MAX_BANK", max_bank)
    before = torch.get_rng_state()
    made = make_pictures(index, open_probe(index.folder, val), 3)
    made.save_neighbours("neighbours")
    assert torch.equal(torch.get_rng_state(), before)
    assert made._backbone.seen == [3, min(max_bank, 40)]  # no more pictures pass the network
    found, queries = described(tmp_path, "neighbours"), ShardIndex.open(val)
    bank = np.linspace(0, 39, min(max_bank, 40)).astype(int)
    assert found["num_bank"] == len(bank)
    _, order = by_hand(features_by_hand(queries), features_by_hand(index)[bank], exclude_self=False)
    for row, i in zip(found["rows"], [0, 19, 39], strict=True):
        nearest = [int(bank[j]) for j in order[i, :6]]
        assert row["query"] == queries.key_name(i)
        assert row["neighbours"] == [index.key_name(j) for j in nearest]
        assert row["neighbour_labels"] == [f"class-{int(index.labels[j])}" for j in nearest]


def test_few_unlabelled_pictures_have_few_neighbours_and_no_label(
    tmp_path, make_shards, make_pictures
):
    index = ShardIndex.open(make_shards("few", num=3, classes=None))
    make_pictures(index, None, 8).save_neighbours("neighbours")
    rows = described(tmp_path, "neighbours")["rows"]
    assert [row["query_label"] for row in rows] == [None] * 3
    assert [row["neighbour_labels"] for row in rows] == [[None, None]] * 3


def test_the_map_shows_a_point_for_each_of_the_chosen_pictures(tmp_path, shards, val):
    before, backbone, probe = torch.get_rng_state(), Pixels(), open_probe(shards, val)
    places = save_map(tmp_path, backbone, probe, 30, seed=0)
    assert places.shape == (30, 2)
    assert backbone.seen == [30]
    assert torch.equal(torch.get_rng_state(), before)
    drawn = cv2.imread(str(tmp_path / "pictures/feature_map.png"))
    coloured = (drawn.max(axis=2).astype(int) - drawn.min(axis=2) > 60).astype(np.uint8)
    num_marks, _ = cv2.connectedComponents(coloured)
    assert num_marks - 1 > 20  # of 30 points some may touch; two more stand in the legend


class Clusters(nn.Module):
    """Three directions, in turn."""

    def forward(self, images):
        numbers = torch.arange(len(images)) % 3
        noise = torch.randn(len(images), 20, generator=torch.Generator().manual_seed(1))
        return torch.eye(20)[numbers] + 0.05 * noise


def test_the_map_separates_clusters_and_follows_its_seed_alone(tmp_path, shards, val):
    probe = open_probe(shards, val)
    places = save_map(tmp_path, Clusters(), probe, 100, seed=0)
    assert len(places) == 40, "there are no more"
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    numbers = np.arange(40) % 3
    same = numbers[:, None] == numbers
    assert distances[same].max() < distances[~same].min()
    torch.manual_seed(99)
    assert np.array_equal(save_map(tmp_path, Clusters(), probe, 100, seed=0), places)


def test_no_map_without_the_library_of_few_pictures_or_of_one_point(
    tmp_path, shards, val, make_shards, monkeypatch
):
    class Constant(nn.Module):
        def forward(self, images):
            return torch.ones(len(images), 16)

    few = open_probe(shards, make_shards("seven", num=7))
    assert save_map(tmp_path, Pixels(), few, 20, seed=0) is None
    assert save_map(tmp_path, Constant(), open_probe(shards, val), 20, seed=0) is None
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert save_map(tmp_path, Pixels(), open_probe(shards, val), 20, seed=0) is None
    assert list(tmp_path.iterdir()) == []
