"""Nearest neighbours: which entry is taken, and the gradient that passes."""

import math

import numpy as np
import pytest
import torch

from pretrain.features.augmentations.base import keep_norm
from tests.pretrain.features.helpers import augment, features, neighbours, random_of
from tests.pretrain.features.test_feature_augmentation import (
    DIM,
    OTHER,
    N,
    Z,
    augmenter,
    equal,
    nearest_entries,
    run,
)


def test_nn_takes_any_of_the_k_equally_often_and_each_row_its_own():
    n, k = 4000, 4
    nearest = torch.eye(k).expand(n, k, k)
    out = augment("nn", torch.ones(n, k), random_of(n), nearest)
    taken = out.argmax(dim=1).numpy()
    counts = np.bincount(taken, minlength=k)
    assert np.abs(counts / n - 1 / k).max() < 4 * math.sqrt(1 / k * (1 - 1 / k) / n)
    follows = (taken[1:] == taken[:-1]).mean()
    assert abs(follows - 1 / k) < 4 * math.sqrt(1 / k * (1 - 1 / k) / n)


@pytest.mark.parametrize("choice", ["random", "consensus"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_nn_gradient_is_straight_through(choice, strength):
    z = features(6).requires_grad_()
    weight = features(6, seed=3)
    (
        augment("nn", z, random_of(6), neighbours(6), strength=strength, choice=choice) * weight
    ).sum().backward()
    assert torch.equal(z.grad, weight)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"choice": "consensus", "top_k": 4}])
def test_nn_finds_the_nearest_entries(options):
    made = augmenter("nn", nn=options)
    out = made(Z, OTHER, random_of(N, 4), 1.0)[0]
    nearest = nearest_entries(made, Z, options.get("top_k", 1))
    choice = options.get("choice", "random")
    equal(out, augment("nn", Z, random_of(N, 4), nearest, choice=choice))
    if choice == "random":
        assert bool((out[:, None] - nearest).abs().amax(dim=2).lt(1e-6).any(dim=1).all())


@pytest.mark.parametrize(("distance", "found"), [("cosine", 0), ("truncated", 1)])
def test_nn_distance_reaches_the_search(distance, found):
    """The first dimension of z is wild: by cosine it decides alone, truncated it counts little."""
    z, wild, calm = (torch.ones(1, DIM) for _ in range(3))
    z[0, 0] = wild[0, 0] = 8.0
    wild[0, 1:13] = -1.0  # twelve others disagree
    made = augmenter("nn", filled=0, min_fill=2, nn={"distance": distance})
    made.queue.put(torch.cat([wild, calm]))
    out = made(z, z, random_of(len(z)), 1.0)[0]
    equal(out, keep_norm((wild, calm)[found], z), atol=1e-5)
    assert made.nearest_entry(z)[0] == found


def test_nn_never_takes_an_empty_slot():
    made = augmenter("nn", filled=0, min_fill=3)
    made.queue.put(-torch.ones(3, DIM))  # worse than the zeros of empty slots
    z = torch.ones(2, DIM)
    equal(made(z, z, random_of(len(z)), 1.0)[0], -z)


def test_n_features_of_nn_are_the_n_nearest_in_order():
    made = augmenter("nn", nn={"top_k": 6}, num_features=3)
    out = made(Z, OTHER, random_of(N), 1.0)
    equal(out, nearest_entries(made, Z, 3).transpose(0, 1))


def test_nn_of_all_n_features_passes_the_gradient_n_times():
    z = Z.clone().requires_grad_()
    run("nn", z=z, nn={"top_k": 3}, num_features=3, stop_gradient=False).sum().backward()
    equal(z.grad, torch.full_like(Z, 3.0), atol=0)
