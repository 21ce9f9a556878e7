"""kNN against a loop over queries and neighbours."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.evaluation import knn as knn_module
from pretrain.evaluation.knn import knn_grid, knn_top1, working_bytes
from pretrain.features.memory_bank import top_k

ROOT = Path(__file__).parents[3]


def data(m=60, n=25, d=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator)
    bank_labels = torch.randint(classes, (m,), generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    bank = centres[bank_labels] + 1.2 * torch.randn(m, d, generator=generator)
    queries = centres[labels] + 1.2 * torch.randn(n, d, generator=generator)
    return bank, bank_labels, queries, labels


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
@pytest.mark.parametrize("k", [1, 5, 20, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_a_loop(k, temperature, seed):
    sets = data(seed=seed)
    expected = by_hand(*sets, k, temperature)
    assert 0.3 < expected < 1
    assert knn_top1(*sets, k=k, temperature=temperature) == pytest.approx(expected)


@pytest.mark.parity
@pytest.mark.parametrize("chunk", [7, 1024])
def test_a_grid_equals_a_loop_in_each_cell_and_compares_once(chunk, monkeypatch):
    calls = []
    monkeypatch.setattr(knn_module, "top_k", lambda *a, **o: calls.append(a[2]) or top_k(*a, **o))
    monkeypatch.setattr(knn_module, "QUERY_CHUNK", chunk)
    sets, ks, temperatures = data(), [20, 1, 5], [0.07, 1.0]
    grid = knn_grid(*sets, ks=ks, temperatures=temperatures)
    assert calls == [20]
    for row, k in zip(grid, ks, strict=True):
        for value, temperature in zip(row, temperatures, strict=True):
            assert value == pytest.approx(by_hand(*sets, k, temperature))


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
@pytest.mark.parametrize(("chunk", "bank_chunk"), [(1, 1), (4, 7), (25, 60), (7, 59), (100, 100)])
def test_nearest_equal_numpy_whatever_the_chunks(k, chunk, bank_chunk):
    """Also where a bank chunk holds fewer rows than k."""
    bank, _, queries, _ = data()
    values, rows = top_k(
        queries, bank, k, is_unit=False, chunk_rows=chunk, chunk_entries=bank_chunk
    )
    expected, order = by_numpy(bank, queries, k)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)
    assert rows.tolist() == order.tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_precision_is_within_its_rounding(dtype, tolerance, monkeypatch):
    """Both rows of a pair of unit vectors are rounded: similarities move by 2 x 2^-11, 2 x 2^-8."""
    bank, bank_labels, queries, labels = data(m=3000, n=400, d=8)
    bank, queries = (x / x.norm(dim=1, keepdim=True) for x in (bank, queries))
    values, _ = top_k(queries.to(dtype), bank.to(dtype), 20, is_unit=False, chunk_entries=500)
    expected, _ = by_numpy(bank, queries, 20)
    difference = np.abs(values.numpy() - expected).max()
    assert 0 < difference <= tolerance
    exact = knn_top1(bank, bank_labels, queries, labels, k=20, temperature=0.07)
    half = knn_top1(bank.to(dtype), bank_labels, queries.to(dtype), labels, k=20, temperature=0.07)
    assert 0.3 < exact < 1
    assert half == pytest.approx(exact, abs=0.01)


def test_sets_are_left_as_they_are():
    bank, bank_labels, queries, labels = data()
    before = bank.clone(), queries.clone()
    knn_top1(bank, bank_labels, queries, labels, k=5, temperature=0.07)
    assert torch.equal(bank, before[0])
    assert torch.equal(queries, before[1])


@pytest.mark.parametrize("bank_chunk", [1, 9, 100])
def test_excluded_rows_are_not_found(bank_chunk, monkeypatch):
    monkeypatch.setattr(knn_module, "BANK_CHUNK", bank_chunk)
    bank, *_ = data()
    itself = torch.arange(len(bank))
    values, rows = top_k(bank, bank, 59, is_unit=False, excluded=itself, chunk_entries=bank_chunk)
    expected, order = by_numpy(bank, bank, 60)
    assert order[:, 0].tolist() == itself.tolist()
    assert rows.tolist() == order[:, 1:].tolist()
    np.testing.assert_allclose(values.numpy(), expected[:, 1:], atol=1e-6)


MEASURED = """
import sys
from pathlib import Path
import torch
from pretrain.evaluation.knn import knn_top1, working_bytes

def peak():  # of this process alone, unlike ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
m, n, d, k = map(int, sys.argv[1:])
bank = torch.empty(m, d, dtype=torch.float16)
for start in range(0, m, 1000):
    bank[start : start + 1000] = torch.randn(min(1000, m - start), d)
queries = torch.randn(n, d).half()
labels, query_labels = torch.randint(10, (m,)), torch.randint(10, (n,))
knn_top1(bank[:k], labels[:k], queries[:1], query_labels[:1], k=k, temperature=0.07)  # libraries
before = peak()
knn_top1(bank, labels, queries, query_labels, k=k, temperature=0.07)
print(peak() - before, bank.numel() * 2, working_bytes(n, d, k))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_is_the_sets_and_the_stated_constant():
    """A float32 copy of this bank would take 123 MB, all similarities 480 MB."""
    arguments = [sys.executable, "-c", MEASURED, "60000", "2000", "512", "20"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, bank, bound = map(int, done.stdout.split())
    assert bound == working_bytes(2000, 512, 20) < 2 * bank
    assert 0 < grown <= bound, f"{grown / 1e6:.0f} MB grown, {bound / 1e6:.0f} MB stated"


def test_k_and_temperature_matter():
    """One near neighbour of the right class against many a little further."""
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.43589], [0.9, -0.43589]])
    labels = torch.tensor([0, 1, 1])
    query, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_top1(bank, labels, query, answer, k=1, temperature=0.07) == 1.0
    assert knn_top1(bank, labels, query, answer, k=3, temperature=0.07) == 1.0
    assert knn_top1(bank, labels, query, answer, k=3, temperature=1.0) == 0.0


def test_only_directions_matter():
    bank, bank_labels, queries, labels = data()
    scaled = knn_top1(bank * 7, bank_labels, queries * 0.01, labels, k=5, temperature=0.07)
    assert scaled == knn_top1(bank, bank_labels, queries, labels, k=5, temperature=0.07)


def test_a_class_that_the_bank_lacks_is_simply_wrong():
    bank, bank_labels, queries, _ = data(n=3)
    assert knn_top1(bank, bank_labels, queries, torch.tensor([9, 9, 9]), k=5, temperature=1) == 0


def test_refusals():
    bank, bank_labels, queries, labels = data()
    with pytest.raises(ValueError, match=r"k=61 needs queries and a bank of at least k, got 60"):
        knn_top1(bank, bank_labels, queries, labels, k=61, temperature=0.07)
    with pytest.raises(ValueError, match="needs queries"):
        knn_top1(bank, bank_labels, queries[:0], labels[:0], k=5, temperature=0.07)
