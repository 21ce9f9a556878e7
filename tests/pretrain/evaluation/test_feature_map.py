"""The picture of the features: places against scikit-learn, what is drawn, what stays untouched."""

import sys

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pretrain.config import DataConfig, EvalConfig
from pretrain.evaluation.pictures import principal_components, save_map, tsne
from pretrain.evaluation.probe import Probe

CPU = torch.device("cpu")
DATA = DataConfig(image_size=32, batch_size=8)


class Pixels(nn.Module):
    """Features are the picture in few cells."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


class Constant(nn.Module):
    """Collapsed features."""

    def forward(self, images):
        return torch.ones(len(images), 16)


@pytest.fixture
def probe(shards, make_shards):
    config = EvalConfig(probe_train=str(shards), probe_val=str(make_shards("val", num=40)), knn_k=3)
    return Probe.open(config, DATA, CPU)


def clusters(n=90, num=3, dim=20, spread=0.3):
    """Rows of length 1 around a few directions, and which direction."""
    labels = torch.arange(n) % num
    rows = torch.randn(num, dim)[labels] + spread * torch.randn(n, dim)
    return functional.normalize(rows, dim=1), labels


def chosen_features(probe, num):
    """Of pictures evenly over the validation set."""
    rows, _ = probe.features(Pixels(), probe.val)
    return functional.normalize(rows[torch.from_numpy(np.linspace(0, 39, num).astype(int))], dim=1)


def test_tsne_separates_clusters_and_follows_its_seed_alone():
    features, labels = clusters()
    places = tsne(features, seed=0)
    assert places is not None
    distances = torch.cdist(places, places)
    same = labels[:, None] == labels
    assert float(distances[same].max()) < float(distances[~same].min())
    torch.manual_seed(99)
    assert torch.equal(tsne(features, seed=0), places)


def test_principal_components_equal_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    features, _ = clusters(spread=1.0)
    found = principal_components(features)
    expected = PCA(2, svd_solver="full").fit_transform(features.double().numpy())
    torch.testing.assert_close(found.abs(), torch.from_numpy(expected).abs().float())
    assert (found.max(dim=0).values > -found.min(dim=0).values).all()


def test_a_single_direction_has_no_second_component():
    line = torch.linspace(0, 1, 9)[:, None]
    found = principal_components(line)
    torch.testing.assert_close(found[:, 0].sort().values, line[:, 0] - 0.5)
    assert torch.equal(found[:, 1], torch.zeros(9))


def test_picture_shows_a_point_for_each_of_the_chosen_pictures(tmp_path, probe):
    places = save_map(tmp_path, Pixels(), probe, 30, seed=0)
    torch.testing.assert_close(places, tsne(chosen_features(probe, 30), seed=0))
    drawn = cv2.imread(str(tmp_path / "pictures/feature_map.png"))
    assert drawn.shape[0] > 400
    coloured = (drawn.max(axis=2).astype(int) - drawn.min(axis=2) > 60).astype(np.uint8)
    num_marks, _ = cv2.connectedComponents(coloured)
    assert num_marks - 1 > 20  # of 30 points some may touch; two more stand in the legend


def test_without_the_library_the_picture_is_a_pca(tmp_path, probe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    places = save_map(tmp_path, Pixels(), probe, 20, seed=0)
    torch.testing.assert_close(places, principal_components(chosen_features(probe, 20)))
    assert (tmp_path / "pictures/feature_map.png").exists()


def test_collapsed_features_are_one_point(tmp_path, probe):
    places = save_map(tmp_path, Constant(), probe, 20, seed=0)
    torch.testing.assert_close(places, torch.zeros(20, 2))
    assert (tmp_path / "pictures/feature_map.png").exists()


def test_less_than_eight_pictures_have_no_map(tmp_path, shards, make_shards):
    few = make_shards("seven", num=7)
    probe = Probe.open(EvalConfig(probe_train=str(shards), probe_val=str(few), knn_k=3), DATA, CPU)
    assert save_map(tmp_path, Pixels(), probe, 20, seed=0) is None
    assert list(tmp_path.iterdir()) == []


def test_random_states_stay_and_no_more_pictures_pass_the_network(tmp_path, probe):
    before = torch.get_rng_state()
    seen = []
    backbone = Pixels()
    backbone.register_forward_hook(lambda module, given, _: seen.append(len(given[0])))
    save_map(tmp_path, backbone, probe, 20, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert seen == [20]
