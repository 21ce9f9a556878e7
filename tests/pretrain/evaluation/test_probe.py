"""The probe: what it refuses, and which options reach the classifier."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from pretrain.config import DataConfig, EvalConfig
from pretrain.data.shards import ShardIndex
from pretrain.evaluation import probe as probe_module
from pretrain.evaluation.probe import Probe, extract_features, normalise

CPU = torch.device("cpu")
DATA = DataConfig(image_size=32)


class MeanColour(nn.Module):
    """A backbone whose features can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return images.mean(dim=(2, 3))


@pytest.fixture
def config(shards):
    return EvalConfig(probe_train=str(shards), probe_val=str(shards), knn_k=3)


def test_no_probe_where_none_is_set():
    assert Probe.open(EvalConfig(), DATA, CPU) is None


def test_top1_of_a_set_in_itself_is_perfect_with_k_1(config):
    probe = Probe.open(replace(config, knn_k=1), DATA, CPU)
    assert probe.top1(MeanColour()) == 1.0


def test_k_and_temperature_reach_the_classifier(config, monkeypatch):
    seen = {}
    monkeypatch.setattr(probe_module, "knn_top1", lambda *_, **options: seen.update(options) or 0.5)
    changed = replace(config, knn_k=7, knn_temperature=0.3)
    assert Probe.open(changed, DATA, CPU).top1(MeanColour()) == 0.5
    assert seen == {"k": 7, "temperature": 0.3, "device": CPU}


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtype_of_the_config_is_what_the_bank_is_stored_in(config, name, monkeypatch):
    seen = []

    def look(bank, bank_labels, queries, labels, **_):
        seen.append((bank.dtype, queries.dtype))
        return 0.5

    monkeypatch.setattr(probe_module, "knn_top1", look)
    assert Probe.open(replace(config, knn_dtype=name), DATA, CPU).top1(MeanColour()) == 0.5
    assert seen == [(getattr(torch, name),) * 2]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_finds_the_same(config, name):
    exact = Probe.open(config, DATA, CPU).top1(MeanColour())
    assert 0 < exact < 1
    half = Probe.open(replace(config, knn_dtype=name), DATA, CPU).top1(MeanColour())
    assert half == pytest.approx(exact, abs=0.1)  # 4 of 40; three colours are a hard case


def test_image_size_is_the_probe_s_own_or_the_training_s(config):
    for own, expected in ((0, 32), (48, 48)):
        backbone = MeanColour()
        Probe.open(replace(config, image_size=own), DATA, CPU).top1(backbone)
        assert {shape[2:] for shape in backbone.seen} == {(expected, expected)}


def test_samples_without_labels_are_refused(config, unlabelled_shards):
    changed = replace(config, probe_val=str(unlabelled_shards))
    with pytest.raises(UserError, match=r"eval\.probe_val .*: 24 of 24 samples have no label"):
        Probe.open(changed, DATA, CPU)


def test_fewer_samples_than_k_are_refused(config):
    with pytest.raises(UserError, match=r"eval\.knn_k=41, but .* holds 40 samples; lower knn_k"):
        Probe.open(replace(config, knn_k=41), DATA, CPU)


def test_missing_folder_is_named(config):
    with pytest.raises(UserError, match="no-such-shards"):
        Probe.open(replace(config, probe_train="no-such-shards"), DATA, CPU)


# --- features


def features(index, backbone, **options):
    return extract_features(
        backbone, index, image_size=32, mean=DATA.pixel_mean, std=DATA.pixel_std, device=CPU,
        **options,
    )  # fmt: skip


def test_normalise_equals_numpy():
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (images.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(normalise(images, mean, std).numpy(), expected, atol=1e-6)
    assert images.dtype == torch.uint8


def test_features_come_in_index_order_whatever_the_batch(shards):
    index = ShardIndex.open(shards)
    whole = features(index, MeanColour())
    parts = features(index, MeanColour(), batch_size=7)
    torch.testing.assert_close(whole[0], parts[0])
    assert whole[2].tolist() == parts[2].tolist() == list(range(40))
    assert whole[1].tolist() == index.labels.tolist()


def test_max_samples_stops_after_the_batch_that_reaches_it(shards):
    found, labels, ids = features(
        ShardIndex.open(shards), MeanColour(), batch_size=7, max_samples=10
    )
    assert len(found) == len(labels) == len(ids) == 14


def test_half_precision_keeps_directions_of_features_that_it_could_not_hold(shards):
    class Large(MeanColour):
        def forward(self, images):
            return super().forward(images) * 1e6  # float16 ends at 65,504

    index = ShardIndex.open(shards)
    exact = features(index, MeanColour())[0]
    exact = exact / exact.norm(dim=1, keepdim=True)
    for dtype, tolerance in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        half, labels, _ = features(index, Large(), dtype=dtype, batch_size=7)
        assert half.dtype == dtype
        assert float((half.float() - exact).abs().max()) <= tolerance
        assert labels.tolist() == index.labels.tolist()


def test_batches_are_written_into_memory_that_is_allocated_once(shards, monkeypatch):
    shapes = []
    empty = torch.empty

    def counted(*shape, **options):
        if options.get("dtype") == torch.float16:
            shapes.append(shape)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", counted)
    found, _, _ = features(ShardIndex.open(shards), MeanColour(), batch_size=7, dtype=torch.float16)
    assert shapes == [(0, 0), (40, 3)]
    assert found._base is None  # neither a joined list nor a part of something larger


def test_each_batch_is_shown_with_its_labels(shards):
    seen = []
    index = ShardIndex.open(shards)
    _, labels, _ = features(
        index, MeanColour(), batch_size=16, dtype=torch.float16,
        each_batch=lambda x, y: seen.append((x, y)),
    )  # fmt: skip
    assert [len(x) for x, _ in seen] == [16, 16, 8]
    shown = torch.cat([x for x, _ in seen])
    assert torch.equal(shown, features(index, MeanColour())[0])  # as they are, not as stored
    assert torch.equal(torch.cat([y for _, y in seen]), labels)


def test_batch_norm_is_in_eval_mode_and_the_mode_comes_back(shards):
    class Net(MeanColour):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.modes = []

        def forward(self, images):
            self.modes.append(self.bn.training)
            return super().forward(self.bn(images))

    net = Net().train()
    before = net.bn.running_mean.clone()
    found, _, _ = features(ShardIndex.open(shards), net)
    assert set(net.modes) == {False}
    assert net.training
    assert net.bn.training
    assert torch.equal(net.bn.running_mean, before)
    assert not found.requires_grad
