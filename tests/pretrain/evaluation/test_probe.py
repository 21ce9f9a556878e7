"""The kNN probe: features of frozen networks, kNN against a loop, refusals, which options count."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from common.errors import UserError
from pretrain.config import DataConfig, EvalConfig
from pretrain.data.shards import ShardIndex
from pretrain.evaluation import probe as probe_module
from pretrain.evaluation.probe import Probe, extract_features, knn_grid
from pretrain.features.memory_bank import top_k

CPU = torch.device("cpu")
DATA = DataConfig(image_size=32)


def data(m=60, n=25, d=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator)
    bank_labels = torch.randint(classes, (m,), generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    bank = centres[bank_labels] + 1.2 * torch.randn(m, d, generator=generator)
    queries = centres[labels] + 1.2 * torch.randn(n, d, generator=generator)
    return bank, bank_labels, queries, labels


def knn(*sets, k, temperature):
    return knn_grid(*sets, ks=[k], temperatures=[temperature])[0][0]


def by_hand(bank, bank_labels, queries, labels, k, temperature):
    def unit(row):
        norm = math.sqrt(sum(x * x for x in row))
        return [x / norm for x in row]

    entries = [unit(row) for row in bank.tolist()]
    correct = 0
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        u = unit(query)
        similarity = [sum(a * b for a, b in zip(u, e, strict=True)) for e in entries]
        nearest = sorted(range(len(entries)), key=lambda i: -similarity[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            vote = math.exp(similarity[i] / temperature)
            votes[int(bank_labels[i])] = votes.get(int(bank_labels[i]), 0) + vote
        correct += max(votes, key=votes.__getitem__) == label
    return correct / len(labels)


@pytest.mark.parity
@pytest.mark.parametrize("chunk", [7, 1024])
def test_a_grid_equals_a_loop_in_each_cell_and_compares_once(chunk, monkeypatch):
    calls = []
    monkeypatch.setattr(probe_module, "top_k", lambda *a, **o: calls.append(a[2]) or top_k(*a, **o))
    monkeypatch.setattr(probe_module, "QUERY_CHUNK", chunk)
    sets, ks, temperatures = data(), [20, 1, 5, 60], [0.07, 1.0]
    grid = knn_grid(*sets, ks=ks, temperatures=temperatures)
    assert calls == [60]
    for row, k in zip(grid, ks, strict=True):
        for value, temperature in zip(row, temperatures, strict=True):
            assert 0.3 < value < 1
            assert value == pytest.approx(by_hand(*sets, k, temperature))


@pytest.mark.parametrize("temperature", [0.011, 1e-3, 1e-50])
def test_a_low_temperature_leaves_the_vote_to_the_nearest(temperature):
    sets = data()
    if temperature > 0.01:  # float64 holds exp(1 / 0.011)
        assert knn(*sets, k=20, temperature=temperature) == by_hand(*sets, 20, temperature)
    else:
        assert knn(*sets, k=20, temperature=temperature) == knn(*sets, k=1, temperature=1.0)


def by_numpy(bank, queries, k):
    """All similarities at once, in float64, sorted whole."""
    bank, queries = (x.double().numpy() for x in (bank, queries))
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    similarity = queries @ bank.T
    order = np.argsort(-similarity, axis=1)[:, :k]
    return np.take_along_axis(similarity, order, axis=1), order


@pytest.mark.parity
@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1, 1), (7, 59), (100, 100)])
def test_nearest_equal_numpy_whatever_the_chunks(k, chunk, bank_chunk):
    """Also where a bank chunk holds fewer rows than k."""
    bank, _, queries, _ = data()
    values, rows = top_k(
        queries, bank, k, is_unit=False, chunk_rows=chunk, chunk_entries=bank_chunk
    )
    expected, order = by_numpy(bank, queries, k)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)
    assert rows.tolist() == order.tolist()


@pytest.mark.parametrize("bank_chunk", [1, 9, 100])
def test_excluded_rows_are_not_found(bank_chunk):
    bank, *_ = data()
    itself = torch.arange(len(bank))
    values, rows = top_k(bank, bank, 59, is_unit=False, excluded=itself, chunk_entries=bank_chunk)
    expected, order = by_numpy(bank, bank, 60)
    assert rows.tolist() == order[:, 1:].tolist()
    np.testing.assert_allclose(values.numpy(), expected[:, 1:], atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_precision_is_within_its_rounding(dtype, tolerance):
    """Both rows of a pair of unit vectors are rounded: similarities move by 2 x 2^-11, 2 x 2^-8."""
    bank, bank_labels, queries, labels = data(m=3000, n=400, d=8)
    bank, queries = (x / x.norm(dim=1, keepdim=True) for x in (bank, queries))
    values, _ = top_k(queries.to(dtype), bank.to(dtype), 20, is_unit=False, chunk_entries=500)
    expected, _ = by_numpy(bank, queries, 20)
    assert 0 < np.abs(values.numpy() - expected).max() <= tolerance
    exact = knn(bank, bank_labels, queries, labels, k=20, temperature=0.07)
    half = knn(bank.to(dtype), bank_labels, queries.to(dtype), labels, k=20, temperature=0.07)
    assert 0.3 < exact < 1
    assert half == pytest.approx(exact, abs=0.01)


class LargestTensor(TorchFunctionMode):
    """Notes the bytes of the largest tensor that an operation gives."""

    num_bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.numel() * result.element_size())
        return result


def test_no_tensor_is_larger_than_the_similarities_of_a_chunk(monkeypatch):
    """Whatever the size of the bank: a float32 copy of this one would take 1.2 MB."""
    monkeypatch.setattr(probe_module, "QUERY_CHUNK", 50)
    monkeypatch.setattr(probe_module, "BANK_CHUNK", 1000)
    bank, bank_labels, queries, labels = data(m=6000, n=100, d=50)
    bank, queries, before = bank.half(), queries.half(), (bank.half(), queries.half())
    with LargestTensor() as largest:
        knn(bank, bank_labels, queries, labels, k=20, temperature=0.07)
    assert largest.num_bytes <= bank.untyped_storage().nbytes() == 600_000
    assert torch.equal(bank, before[0])  # both are left as they are
    assert torch.equal(queries, before[1])


def test_k_and_temperature_matter():
    """One near neighbour of the right class against many a little further."""
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.43589], [0.9, -0.43589]])
    sets = bank, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    grid = knn_grid(*sets, ks=[1, 3], temperatures=[0.07, 1.0])
    assert grid == [[1.0, 1.0], [1.0, 0.0]]


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


def test_k_and_temperature_reach_the_classifier(config, monkeypatch):
    assert Probe.open(replace(config, knn_k=1), DATA, CPU).top1(MeanColour()) == 1.0
    seen = {}
    monkeypatch.setattr(probe_module, "knn_grid", lambda *_, **o: seen.update(o) or [[0.5]])
    changed = replace(config, knn_k=7, knn_temperature=0.3)
    assert Probe.open(changed, DATA, CPU).top1(MeanColour()) == 0.5
    assert seen == {"ks": [7], "temperatures": [0.3], "device": CPU}


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_finds_the_same(config, name):
    exact = Probe.open(config, DATA, CPU).top1(MeanColour())
    assert 0 < exact < 1
    probe = Probe.open(replace(config, knn_dtype=name), DATA, CPU)
    assert probe.features(MeanColour(), probe.val)[0].dtype == getattr(torch, name)
    assert probe.top1(MeanColour()) == pytest.approx(exact, abs=0.1)  # 4 of 40; a hard case


def test_what_cannot_work_is_refused(config, unlabelled_shards):
    for changes, message in (
        ({"probe_val": str(unlabelled_shards)}, r"eval\.probe_val .*: 24 of 24 samples have no la"),
        ({"knn_k": 41}, r"eval\.knn_k=41, but .* holds 40 samples; lower knn_k"),
        ({"probe_train": "no-such-shards"}, "no-such-shards"),
    ):
        with pytest.raises(UserError, match=message):
            Probe.open(replace(config, **changes), DATA, CPU)


def test_features_come_in_index_order_whatever_the_batch(shards):
    index = ShardIndex.open(shards)
    whole, labels = extract_features(MeanColour(), index, DATA, CPU)
    parts, _ = extract_features(MeanColour(), index, DATA, CPU, batch_size=7)
    torch.testing.assert_close(whole, parts)
    assert labels.tolist() == index.labels.tolist()
    some, labels = extract_features(MeanColour(), index, DATA, CPU, batch_size=7, max_samples=10)
    torch.testing.assert_close(some, whole[:14])  # after the batch that reaches 10
    assert len(labels) == 14


def test_workers_decode_a_large_set(shards, monkeypatch):
    asked, central_crops = [], probe_module.central_crops
    monkeypatch.setattr(
        probe_module, "central_crops", lambda *a, **o: asked.append(a[3]) or central_crops(*a, **o)
    )
    index, data = ShardIndex.open(shards), replace(DATA, num_workers=2)
    alone, _ = extract_features(MeanColour(), index, data, CPU)
    monkeypatch.setattr(probe_module, "WORKERS_FROM", index.num_samples)
    shared, _ = extract_features(MeanColour(), index, data, CPU)
    assert asked == [0, 2]
    assert torch.equal(shared, alone)


def test_half_precision_keeps_directions_of_features_that_it_could_not_hold(shards):
    class Large(MeanColour):
        def forward(self, images):
            return super().forward(images) * 1e6  # float16 ends at 65,504

    index = ShardIndex.open(shards)
    exact, _ = extract_features(MeanColour(), index, DATA, CPU)
    exact = exact / exact.norm(dim=1, keepdim=True)
    for dtype, tolerance in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        half, labels = extract_features(Large(), index, DATA, CPU, dtype=dtype, batch_size=7)
        assert half.dtype == dtype
        assert float((half.float() - exact).abs().max()) <= tolerance
        assert labels.tolist() == index.labels.tolist()


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
    found, _ = extract_features(net, ShardIndex.open(shards), DATA, CPU)
    assert set(net.modes) == {False}
    assert net.training
    assert net.bn.training
    assert torch.equal(net.bn.running_mean, before)
    assert not found.requires_grad
