"""The map of the features: places against scikit-learn, figures against definitions, honesty."""

import json
import sys

import cv2
import numpy as np
import pytest
import torch
from sklearn import manifold
from torch import nn
from torch.nn import functional

from common.pictures import decode
from pretrain.config import DataConfig, EvalConfig
from pretrain.data.crops import center_crop
from pretrain.eval.feature_map import (
    fidelity,
    principal_components,
    same_class,
    save_initial,
    save_map,
    tsne,
)
from pretrain.eval.probe import Probe

CPU = torch.device("cpu")
DATA = DataConfig(image_size=32, batch_size=8)


class Pixels(nn.Module):
    """Features are the picture in few cells."""

    def __init__(self, cells=4):
        super().__init__()
        self.cells = cells

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, self.cells).flatten(1)


class Constant(nn.Module):
    """Collapsed features."""

    def forward(self, images):
        return torch.ones(len(images), 16) + 1e-9 * images.mean(dim=(1, 2, 3))[:, None]


@pytest.fixture
def probe(shards, make_shards):
    config = EvalConfig(probe_train=str(shards), probe_val=str(make_shards("val", num=40)), knn_k=3)
    return Probe.open(config, DATA, CPU)


def clusters(n=90, num=3, dim=20, spread=0.3):
    """Rows of length 1 around a few directions, and which direction."""
    labels = torch.arange(n) % num
    rows = torch.randn(num, dim)[labels] + spread * torch.randn(n, dim)
    return functional.normalize(rows, dim=1), labels


def read(folder):
    return json.loads((folder / "feature_map.json").read_text())


@pytest.mark.parametrize("k", [1, 5, 10])
def test_figures_equal_their_definitions(k):
    features, labels = clusters(n=60, spread=1.0)
    places = torch.randn(60, 2) + labels[:, None]
    found = fidelity(features, places, labels, k)
    expected = manifold.trustworthiness(features.numpy(), places.numpy(), n_neighbors=k)
    assert found["trustworthiness"] == pytest.approx(expected, abs=1e-12)
    kept, same, same_drawn = 0, 0, 0
    for i in range(60):
        others = [j for j in range(60) if j != i]
        by_cosine = sorted(
            others, key=lambda j: -float(features[i].double() @ features[j].double())
        )
        by_place = sorted(others, key=lambda j: float((places[i] - places[j]).double().norm()))
        kept += len(set(by_cosine[:k]) & set(by_place[:k]))
        same += sum(int(labels[j] == labels[i]) for j in by_cosine[:k])
        same_drawn += sum(int(labels[j] == labels[i]) for j in by_place[:k])
    assert found["neighbours_kept"] == pytest.approx(kept / 60 / k)
    assert found["same_class_features"] == pytest.approx(same / 60 / k)
    assert found["same_class_map"] == pytest.approx(same_drawn / 60 / k)
    shares = same_class(features, labels, k)
    assert list(shares) == ["0", "1", "2"]  # of 20 points each
    assert sum(shares.values()) / 3 == pytest.approx(found["same_class_features"])


def test_shares_of_each_class_by_hand():
    angle = torch.tensor([0.0, 0.01, 0.02, 0.5, 1.0, 1.01])
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.tensor([0, 0, 0, 4, 4, 0])
    assert same_class(features, labels, 1) == {"0": 0.75, "4": 0.0}
    assert same_class(features, labels, 2) == {"0": 0.75, "4": 0.25}


def test_a_map_that_is_the_features_is_perfect():
    angle = torch.rand(50) * 3
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    found = fidelity(features, features, torch.zeros(50, dtype=torch.int64), 7)
    assert (found["trustworthiness"], found["neighbours_kept"]) == (1.0, 1.0)


def test_tsne_separates_clusters_and_follows_its_seed_alone():
    features, labels = clusters()
    places = tsne(features, seed=0)
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


def test_file_holds_both_states_of_the_same_pictures(tmp_path, probe):
    save_initial(tmp_path, Pixels(1), probe, 30)
    save_map(tmp_path, Pixels(4), probe, 30, seed=0)
    found = read(tmp_path)
    val = probe.val
    numbers = np.linspace(0, 39, 30).astype(int)  # evenly over the set
    assert found["keys"] == [val.key_name(int(i)) for i in numbers]
    assert found["labels"] == [int(val.labels[i]) for i in numbers]
    assert found["classes"] == ["class-0", "class-1"]
    assert found["method"] == "t-SNE"
    assert found["library"].startswith("scikit-learn ")
    assert (found["missing"], found["note"], found["num_neighbours"]) == (None, None, 10)
    for name, cells in (("before", 1), ("after", 4)):
        rows, _ = probe.features(Pixels(cells), val)
        rows = functional.normalize(rows[torch.from_numpy(numbers)], dim=1)
        places = tsne(rows, seed=0)
        torch.testing.assert_close(torch.tensor(found[name]["x"]), places[:, 0], atol=1e-3, rtol=0)
        torch.testing.assert_close(torch.tensor(found[name]["y"]), places[:, 1], atol=1e-3, rtol=0)
        expected = fidelity(rows, places, torch.tensor(found["labels"]), 10)
        assert {key: found[name][key] for key in expected} == pytest.approx(expected)


def test_chance_is_the_mean_over_all_pairs(tmp_path, probe):
    save_map(tmp_path, Pixels(), probe, 30, seed=0)
    found = read(tmp_path)
    labels = found["labels"]
    pairs = [a == b for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j]
    assert found["same_class_by_chance"] == pytest.approx(sum(pairs) / len(pairs))


def test_thumbnails_stand_in_the_order_of_the_points(tmp_path, probe):
    save_map(tmp_path, Pixels(), probe, 12, seed=0)
    about = read(tmp_path)["thumbnails"]
    assert about == {"file": "pictures/feature_map.jpg", "side": 32, "columns": 4}
    sprite = cv2.imread(str(tmp_path / about["file"]))[:, :, ::-1]
    assert sprite.shape == (96, 128, 3)
    for point, number in enumerate(np.linspace(0, 39, 12).astype(int)):
        data = probe.val.read_bytes(int(number))
        expected = center_crop(decode(data, where="test"), 32).astype(int)
        y, x = 32 * (point // 4), 32 * (point % 4)
        assert np.abs(sprite[y : y + 32, x : x + 32] - expected).mean() < 8


def test_without_the_library_the_map_is_a_pca_and_says_so(tmp_path, probe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    save_initial(tmp_path, Pixels(1), probe, 20)
    save_map(tmp_path, Pixels(), probe, 20, seed=0)
    found = read(tmp_path)
    assert (found["method"], found["library"]) == ("PCA", None)
    assert "scikit-learn is not installed (the extra `maps`" in found["note"]
    rows, _ = probe.features(Pixels(), probe.val)
    numbers = torch.from_numpy(np.linspace(0, 39, 20).astype(int))
    places = principal_components(functional.normalize(rows[numbers], dim=1))
    torch.testing.assert_close(torch.tensor(found["after"]["x"]), places[:, 0], atol=1e-3, rtol=0)


def test_missing_initial_features_are_told(tmp_path, probe):
    save_map(tmp_path, Pixels(), probe, 20, seed=0)
    found = read(tmp_path)
    assert found["before"] is None
    assert "features of the initial weights were not kept" in found["missing"]
    save_initial(tmp_path, Pixels(), probe, 30)
    save_map(tmp_path, Pixels(), probe, 20, seed=0)
    assert "are of other pictures or another picture size" in read(tmp_path)["missing"]
    (tmp_path / "features_before.npz").write_bytes(b"PK broken")
    save_map(tmp_path, Pixels(), probe, 20, seed=0)
    assert "features_before.npz cannot be read" in read(tmp_path)["missing"]


def test_collapsed_features_have_no_map(tmp_path, probe):
    save_initial(tmp_path, Pixels(), probe, 20)
    save_map(tmp_path, Constant(), probe, 20, seed=0)
    found = read(tmp_path)
    assert found["after"]["x"] is None
    assert found["after"]["note"] == "all pictures have the same features: no map"
    assert len(found["before"]["x"]) == 20


@pytest.mark.parametrize(("num", "k"), [(8, 3), (9, 4), (30, 10)])
def test_few_points_have_few_neighbours(tmp_path, probe, num, k):
    save_map(tmp_path, Pixels(), probe, num, seed=0)
    assert read(tmp_path)["num_neighbours"] == k


def test_less_than_eight_pictures_have_no_map(tmp_path, shards, make_shards):
    few = make_shards("seven", num=7)
    probe = Probe.open(EvalConfig(probe_train=str(shards), probe_val=str(few), knn_k=3), DATA, CPU)
    save_initial(tmp_path, Pixels(), probe, 20)
    assert save_map(tmp_path, Pixels(), probe, 20, seed=0) is None
    assert list(tmp_path.iterdir()) == []


def test_random_states_stay(tmp_path, probe):
    before = torch.get_rng_state()
    save_initial(tmp_path, Pixels(), probe, 20)
    save_map(tmp_path, Pixels(), probe, 20, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_more_pictures_pass_the_network(tmp_path, probe):
    seen = []
    backbone = Pixels()
    backbone.register_forward_hook(lambda module, given, _: seen.append(len(given[0])))
    save_initial(tmp_path, backbone, probe, 20)
    save_map(tmp_path, backbone, probe, 20, seed=0)
    assert seen == [20, 20]
