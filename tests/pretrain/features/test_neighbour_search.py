"""Search and consensus against float64 loops, and the memory they take."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from pretrain.features import memory_bank as neighbour_search
from pretrain.features.memory_bank import SEARCH_BYTES, consensus, top_k
from tests.pretrain.features.test_augmentations import centre_of
from tests.pretrain.model.references import unit


def random_rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_cosine(z, bank):
    z, bank = z.double().numpy(), bank.double().numpy()
    return z / np.linalg.norm(z, axis=1, keepdims=True) @ bank.T


def naive_truncated(z, bank):
    """1 - D / 2, dimension by dimension."""
    z, bank = unit(z.double()).numpy(), bank.double().numpy()
    limit = neighbour_search.TRUNCATION**2 / z.shape[1]
    terms = [np.minimum((a[:, None] - b) ** 2, limit) for a, b in zip(z.T, bank.T, strict=True)]
    return 1 - sum(terms) / 2


def best(similarity, k):
    """The k largest of each row and where they are."""
    indices = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, indices, axis=1), indices


@pytest.mark.parametrize("truncation", [0.3, 2.0])
def test_truncated_is_the_naive_one_where_the_shortlist_holds_all(truncation, monkeypatch):
    monkeypatch.setattr(neighbour_search, "TRUNCATION", truncation)
    z, bank = 3 * random_rows(6, 12, seed=1), unit(random_rows(50, 12, seed=2))
    similarity, indices = top_k(z, bank, 4, distance="truncated")
    values, expected = best(naive_truncated(z, bank), 4)
    np.testing.assert_array_equal(indices.numpy(), expected)
    np.testing.assert_allclose(similarity.numpy(), values, atol=1e-6)


def test_truncated_ranks_the_shortlist_by_cosine_and_nothing_else(monkeypatch):
    monkeypatch.setattr(neighbour_search, "TRUNCATION", 0.5)
    monkeypatch.setattr(neighbour_search, "MIN_SHORTLIST", 10)
    z, bank = random_rows(8, 12, seed=1), unit(random_rows(90, 12, seed=2))
    _, indices = top_k(z, bank, 2, distance="truncated")
    ranked = naive_truncated(z, bank)
    listed = best(naive_cosine(z, bank), 10)[1]
    outside = np.ones_like(ranked, dtype=bool)
    np.put_along_axis(outside, listed, False, axis=1)
    np.testing.assert_array_equal(indices.numpy(), best(np.where(outside, -9, ranked), 2)[1])
    assert not np.array_equal(indices.numpy(), best(ranked, 2)[1])  # the list did matter


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 30),
    chunk_rows=st.integers(1, 50),
    distance=st.sampled_from(["cosine", "truncated"]),
    seed=st.integers(0, 1000),
)
def test_chunks_change_nothing(n, m, chunk_rows, distance, seed):
    z, bank = random_rows(n, 8, seed=seed), unit(random_rows(m, 8, seed=seed + 1))
    k = min(3, m)
    whole, _ = top_k(z, bank, k, distance=distance)
    similarity, indices = top_k(z, bank, k, distance=distance, chunk_rows=chunk_rows)
    torch.testing.assert_close(similarity, whole, atol=1e-6, rtol=0)
    naive = (naive_cosine if distance == "cosine" else naive_truncated)(z, bank)
    found = np.take_along_axis(naive, indices.numpy(), axis=1)
    np.testing.assert_allclose(found, best(naive, k)[0], atol=1e-6)  # equal but for ties


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", ["cosine", "truncated"])
def test_half_precision_bank_is_searched_in_single(dtype, distance, monkeypatch):
    z, bank = random_rows(9, 16, seed=1), unit(random_rows(70, 16, seed=2)).to(dtype)
    expected = top_k(z, bank.float(), 5, distance=distance)
    monkeypatch.setattr(neighbour_search, "CAST_BYTES", 4 * 16 * 11)  # 11 rows at a time
    similarity, indices = top_k(z, bank, 5, distance=distance)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, expected[0], atol=1e-6, rtol=0)
    assert torch.equal(indices, expected[1])


def test_autocast_and_gradients_stay_outside():
    z, bank = random_rows(9, 64, seed=1).requires_grad_(), unit(random_rows(70, 64, seed=2))
    expected, indices = top_k(z, bank, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity, _ = top_k(z, bank, 5)
        centre = consensus(bank[indices], z)
    assert torch.equal(similarity, expected)
    assert torch.equal(centre, consensus(bank[indices], z))
    assert not similarity.requires_grad
    assert not centre.requires_grad


def test_no_queries_find_nothing():
    similarity, indices = top_k(torch.ones(0, 3), torch.eye(3), 2)
    assert similarity.shape == indices.shape == (0, 2)


def bytes_of(search):
    """The largest tensor that is made, and the most that is alive at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        search()
    events: list = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    sizes = [size for _, size in sorted(changes)]
    return max(sizes), max(itertools.accumulate(sizes))


def test_similarities_of_a_large_bank_stay_within_the_budget():
    """600 x 65,536 similarities would be 150 MiB."""
    z, bank = random_rows(600, 2, seed=1), unit(random_rows(65536, 2, seed=2))
    largest, peak = bytes_of(lambda: top_k(z, bank, 2))
    assert 2**20 < largest <= SEARCH_BYTES
    assert peak <= SEARCH_BYTES + 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_of_a_shortlist_stay_within_the_budget(dtype, monkeypatch):
    monkeypatch.setattr(neighbour_search, "SEARCH_BYTES", 2**20)
    monkeypatch.setattr(neighbour_search, "CAST_BYTES", 2**17)
    z, bank = random_rows(300, 64, seed=1), unit(random_rows(2000, 64, seed=2)).to(dtype)
    largest, peak = bytes_of(lambda: top_k(z, bank, 2, distance="truncated"))
    assert 2**19 < largest <= 2**20
    # Beside one block: a block in the stored precision, and the shortlists of all rows.
    assert peak <= 2**20 * (1.35 if dtype == torch.float32 else 1.75)


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_consensus_is_the_naive_one(k):
    neighbours = 2 * random_rows(7, k, 6, seed=k)
    centre = consensus(neighbours, random_rows(7, 6))
    expected = unit(torch.tensor(np.array([centre_of(x) for x in neighbours.double().numpy()])))
    np.testing.assert_allclose(centre.numpy(), expected, atol=1e-5)


def test_consensus_of_one_neighbour_is_that_neighbour():
    neighbours = random_rows(5, 1, 6)
    torch.testing.assert_close(consensus(neighbours, random_rows(5, 6)), unit(neighbours[:, 0]))


def test_consensus_hardly_sees_an_outlier_that_moves_the_mean():
    good = unit(torch.tensor([1.0, 0, 0]) + 0.05 * random_rows(4, 3, seed=3))
    outlier = torch.tensor([[0.0, 0, 1]])
    neighbours = torch.cat([good, outlier]).unsqueeze(0)
    expected = unit(good.mean(dim=0, keepdim=True))
    centre = consensus(neighbours, expected)
    assert float((centre * expected).sum()) > 0.9999
    assert float((unit(neighbours.mean(dim=1)) * expected).sum()) < 0.98


def test_of_opposite_neighbours_the_one_towards_z_is_taken():
    neighbours = torch.tensor([[[1.0, 0], [-1.0, 0]], [[1.0, 0], [-1.0, 0]]])
    centre = consensus(neighbours, torch.tensor([[0.1, 1.0], [-0.1, 1.0]]))
    torch.testing.assert_close(centre, torch.tensor([[1.0, 0], [-1.0, 0]]))
