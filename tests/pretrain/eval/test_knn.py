"""kNN against a loop over queries and neighbours."""

import math

import pytest
import torch

from pretrain.eval.knn import knn_top1


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


def test_chunks_change_nothing():
    sets = data()
    whole = knn_top1(*sets, k=5, temperature=0.07)
    for chunk in (1, 7, 25):
        assert knn_top1(*sets, k=5, temperature=0.07, chunk=chunk) == whole


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
