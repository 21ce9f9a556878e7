"""DeepCluster-v2: k-means and loss against loops, and what becomes of a feature in two epochs."""

import math

import pytest
import torch
from torch.nn import functional

from common.errors import UserError
from pretrain.objectives.deepclusterv2 import (
    NO_CLUSTER,
    DeepClusterV2,
    deepclusterv2_loss,
    spherical_kmeans,
)
from tests.pretrain.model.references import cosine, draw, step, unit

SMALL_HEADS = {"num_prototypes": 3, "num_heads": 3, "kmeans_iterations": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kmeans_by_hand(rows, start, num_iterations):
    """Nearest by cosine, then the normalised sum of the members; one without members stays."""
    centroids = [rows[i] for i in start]

    def nearest(row):
        return max(range(len(centroids)), key=lambda k: (cosine(row, centroids[k]), -k))

    for _ in range(num_iterations):
        clusters = [nearest(row) for row in rows]
        for k in range(len(centroids)):
            members = [row for row, cluster in zip(rows, clusters, strict=True) if cluster == k]
            if members:
                total = [sum(values) for values in zip(*members, strict=True)]
                centroids[k] = [x / math.hypot(*total) for x in total]
    return centroids, [nearest(row) for row in rows]


@pytest.mark.parity
@pytest.mark.parametrize(("n", "k"), [(1, 1), (9, 9), (60, 7)])
@pytest.mark.parametrize("num_iterations", [1, 10])
def test_spherical_kmeans_equals_a_loop(monkeypatch, n, k, num_iterations):
    monkeypatch.setattr("pretrain.objectives.deepclusterv2.CHUNK_BYTES", 4 * k * 16)  # 16 rows
    x = unit(draw(n, 4, seed=n))
    start = torch.randperm(n, generator=seeded())[:k].tolist()
    centroids, clusters = spherical_kmeans(
        x, num_clusters=k, num_iterations=num_iterations, generator=seeded()
    )
    expected = kmeans_by_hand(x.tolist(), start, num_iterations)
    assert clusters.tolist() == expected[1]
    torch.testing.assert_close(centroids, torch.tensor(expected[0], dtype=x.dtype))


def test_clusters_that_are_there_are_found():
    """Three directions, far apart; and fewer rows than clusters leave some empty."""
    x = functional.normalize(torch.eye(3).repeat(20, 1) + 0.01 * torch.randn(60, 3), dim=1)
    options = {"num_iterations": 10, "generator": seeded(1)}
    for seed in range(30):  # some starts take two rows of one direction
        options["generator"] = seeded(seed)
        _, clusters = spherical_kmeans(x, num_clusters=3, **options)
        if len(clusters[:3].unique()) == 3:
            break
    assert torch.equal(clusters, clusters[:3].repeat(20))
    centroids, clusters = spherical_kmeans(x[:2], num_clusters=5, **options)
    assert (centroids.shape, clusters.shape) == ((5, 3), (2,))
    torch.testing.assert_close(centroids[clusters], x[:2])


@pytest.mark.parity
def test_loss_equals_a_loop_and_leaves_out_rows_without_cluster():
    x, centroids = draw(6, 5, seed=1).requires_grad_(), unit(draw(2, 4, 5, seed=2))
    clusters = torch.tensor([[0, 3, NO_CLUSTER, 1, 1, 2], [2, 2, NO_CLUSTER, 0, 1, 3]])
    terms = []
    for head in range(2):
        for row, cluster in zip(x.tolist(), clusters[head].tolist(), strict=True):
            logits = [cosine(row, c) / 0.2 for c in centroids[head].tolist()]
            if cluster != NO_CLUSTER:
                terms.append(math.log(sum(math.exp(v) for v in logits)) - logits[cluster])
    loss = deepclusterv2_loss(x, centroids, clusters, temperature=0.2)
    assert len(terms) == 10
    assert abs(loss.item() - sum(terms) / 10) < 1e-12
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.norm(dim=1).gt(0).tolist() == [True, True, False, True, True, True]
    nothing = deepclusterv2_loss(x, centroids, torch.full_like(clusters, -1), temperature=0.2)
    assert nothing.item() == 0
    assert float(torch.autograd.grad(nothing, x)[0].abs().sum()) == 0


def kept(state):
    return dict(state.named_buffers())


def test_the_last_features_of_an_epoch_are_clustered_in_the_next():
    objective = DeepClusterV2(**SMALL_HEADS)
    state, keys = objective.make_state(4, num_samples=9), draw(2, 6, 4, seed=1).float()
    ids = torch.tensor([5, 0, 7, 5, 2, 8])  # 5 comes twice
    objective.after_update(state, keys, ids)
    features = kept(state)["features"]
    for view in range(2):
        torch.testing.assert_close(features[view, ids[1:]], unit(keys[view, 1:]))
    assert bool(kept(state)["assignments"].eq(NO_CLUSTER).all())
    objective.start_epoch(state, seeded())
    assignments, centroids = (kept(state)[x].clone() for x in ("assignments", "centroids"))
    seen = torch.tensor([0, 2, 5, 7, 8])
    assert bool(assignments[:, seen].ge(0).all())
    assert bool(assignments[:, [1, 3, 4, 6]].eq(NO_CLUSTER).all())
    generator = seeded()
    for head in range(3):  # of view 1, of view 2, of view 1 from another start
        expected = spherical_kmeans(
            features[head % 2, seen], num_clusters=3, num_iterations=2, generator=generator
        )
        assert torch.equal(centroids[head], expected[0])
        assert torch.equal(assignments[head, seen], expected[1])
    # Of the next epoch only what has come: a sample that stayed away is in no cluster.
    objective.after_update(state, keys[:, :4], torch.tensor([1, 2, 3, 4]))
    assert torch.equal(kept(state)["assignments"], assignments)  # for the whole epoch
    objective.start_epoch(state, seeded())
    now = kept(state)["assignments"][0]
    assert now.ge(0).nonzero()[:, 0].tolist() == [1, 2, 3, 4]
    objective.start_epoch(state, seeded())  # an epoch whose updates were all left out
    assert bool(kept(state)["assignments"].eq(NO_CLUSTER).all())


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="num_prototypes=3000: there are only 40 samples"):
        DeepClusterV2().make_state(4, num_samples=40)
    unknown = kept(DeepClusterV2().make_state(4))
    assert unknown["centroids"].shape == (3, 3000, 4)
    assert unknown["features"].shape == (2, 0, 4)


@pytest.mark.parametrize("architecture", ["basic", "parallel", "pre"])
def test_fa_of_targets_enters_what_is_clustered(make, make_views, architecture):
    """As the mean direction of the N features; on the other branch it changes what predicts."""
    model = make(
        "deepclusterv2", method="mask", num_features=2, stop_gradient=False,
        architecture=architecture, mask={"ratio": 0.5},
    )  # fmt: skip
    views = make_views()
    output = step(model, views)
    model.after_optimizer_step(1.0, [output], torch.arange(8))
    entered = kept(model.memory)["features"][:, :8]
    plain = unit(torch.stack([model.online.project(view) for view in views]).detach())
    torch.testing.assert_close(entered.norm(dim=2), torch.ones(2, 8))
    cosines = (entered * plain).sum(dim=2)
    assert (float(cosines.max()) > 0.9999) == (architecture == "pre")
    if architecture == "basic":  # the mean of two masked ones: more of them than one mask leaves
        torch.testing.assert_close(output.keys[1].norm(dim=1).le(1), torch.ones(8).bool())
        assert bool((unit(output.keys[1]) * unit(output.target)).sum(dim=1).lt(0.9999).any())
