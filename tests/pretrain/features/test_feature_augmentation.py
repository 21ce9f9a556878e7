"""A as a whole: each option reaches what it is for, and gradient stops where it shall."""

import math

import numpy as np
import pytest
import torch

from pretrain.features.augmentations.base import RowRandom, keep_norm
from pretrain.features.feature_augmentation import FeatureAugmenter
from tests.pretrain.conftest import make_fa
from tests.pretrain.features.helpers import augment

N, DIM = 40, 16
PARTNERED = ("mixup", "cutmix", "extrapolate")


def random_of(seed=0, rows=slice(0, N)):
    return RowRandom(torch.Generator().manual_seed(seed), rows, N)


def features(seed=1, n=N):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=generator, dtype=torch.float64)


Z, OTHER = features(), features(2)


def augmenter(method, filled=30, **options):
    """With ``filled`` entries in a queue of 50, which waits for 20."""
    options = {"queue_size": 50, "min_fill": 20} | options
    made = FeatureAugmenter(make_fa(method=method, **options), DIM)
    if made.queue is not None and filled:
        made.queue.put(features(3, filled))
    return made


def run(method, *, z=Z, other=OTHER, seed=0, strength=1.0, rows=slice(0, N), filled=30, **options):
    made = augmenter(method, filled, **options)
    return made(z[rows], other[rows], random_of(seed, rows), strength)


def nearest_entries(made, z, k):
    """Brute force by cosine in numpy: [n, k, d], nearest first, as long as the rows of z."""
    bank = made.queue.features[: int(made.queue.count)].double().numpy()
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    indices = np.argsort(-(unit @ bank.T), axis=1, kind="stable")[:, :k]
    return torch.from_numpy(bank[indices]) * z.norm(dim=1)[:, None, None]


def equal(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("method", ["none", " none ", "identity"])
def test_none_and_identity_return_the_features_bit_for_bit(method, stop_gradient):
    z = Z.clone().requires_grad_()
    out = run(method, z=z, stop_gradient=stop_gradient)
    assert torch.equal(out, Z.unsqueeze(0))
    assert out.requires_grad == ("none" in method or not stop_gradient)


@pytest.mark.parametrize("partner", ["batch", "view", "queue"])
@pytest.mark.parametrize("method", ["nn", "mask", "mixup", "nn+mask", "noise|mixup"])
def test_gradient_stops_at_what_a_takes_or_passes(method, partner):
    z, other = Z.clone().requires_grad_(), OTHER.clone().requires_grad_()
    assert not run(method, z=z, other=other, partner=partner, stop_gradient=True).requires_grad
    out = run(method, z=z, other=other, partner=partner, stop_gradient=False)
    (out * features(7)).sum().backward()
    assert z.grad is not None
    assert bool((z.grad != 0).any(dim=1).all())
    reads_view = partner == "view" and any(link in method for link in PARTNERED)
    assert (other.grad is not None) == reads_view


def partner_of_the_batch(random):
    return Z.roll(-random.shift(), dims=0)


METHODS = [
    ("mask", {"ratio": 0.6}),
    ("noise", {"sigma": 0.7}),
    ("mixup", {"alpha": 0.4}),
    ("cutmix", {"ratio": 0.6}),
    ("extrapolate", {"scale": 1.5}),
    ("extrapolate", {"per_dimension": True}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_options_reach_their_method(method, options):
    out = run(method, seed=5, **{method: options})
    random = random_of(5)
    partner = partner_of_the_batch(random) if method in PARTNERED else None
    equal(out[0], augment(method, Z, random, partner, **options), atol=1e-12)
    assert not torch.allclose(out, run(method, seed=5)), "and they change something"


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_queue_dtype_is_what_entries_are_stored_in(name):
    made = augmenter("nn", queue_dtype=name)
    assert made.queue.features.dtype == {"fp32": torch.float32, "fp16": torch.float16}[name]
    out = made(Z, OTHER, random_of(), 1.0)[0]
    assert out.dtype == Z.dtype
    torch.testing.assert_close(out.norm(dim=1), Z.norm(dim=1), rtol=1e-6, atol=0)
    equal(out, run("nn")[0], atol=1e-6 if name == "fp32" else 2**-11 * float(Z.norm(dim=1).max()))


def test_queue_size_is_what_the_queue_holds():
    assert augmenter("nn", filled=60, queue_size=33).queue.features.shape == (33, DIM)
    assert augmenter("mixup").queue is None
    without = augmenter("noise", partner="queue")
    assert without.queue is None
    assert without.is_ready()


@pytest.mark.parametrize("partner", ["view", "batch", "queue"])
@pytest.mark.parametrize("method", PARTNERED)
def test_partner_decides_whom_a_row_is_mixed_with(method, partner):
    """The same sample's other view, another sample, or an entry that is made as long as the row."""
    made, random = augmenter(method, partner=partner), random_of(6)
    out = made(Z, OTHER, random_of(6), 1.0)[0]
    if partner == "view":
        others = OTHER
    elif partner == "batch":
        others = partner_of_the_batch(random)
    else:
        others = keep_norm(made.queue.features[:30].double()[random.integers(30)], Z)
    equal(out, augment(method, Z, random, others))


@pytest.mark.parametrize("rows", [slice(0, 15), slice(15, N)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("noise", {"num_features": 2}),
        ("extrapolate", {"partner": "queue", "extrapolate": {"per_dimension": True}}),
        ("nn+cutmix|mask+noise", {"partner": "view", "nn": {"top_k": 5}}),
    ],
)
def test_parts_get_the_rows_of_the_whole(method, options, rows):
    equal(run(method, rows=rows, **options), run(method, **options)[:, rows])


def test_a_part_of_the_batch_has_no_partners_of_the_batch():
    with pytest.raises(AssertionError, match="partners come from the whole batch"):
        run("mixup", rows=slice(0, 15))


@pytest.mark.parametrize("links", [("nn", "noise"), ("mask", "nn"), ("noise", "mixup", "mask")])
def test_a_chain_is_one_link_after_another(links):
    """Each link sees the last one's features, and goes on drawing where that stopped."""
    out = run("+".join(links), seed=8, nn={"top_k": 3})
    random, x = random_of(8), Z
    for link in links:
        x = augmenter(link, nn={"top_k": 3})(x, OTHER, random, 1.0)[0]
    equal(out[0], x, atol=1e-12)


def test_alternatives_are_chosen_by_row_equally_often():
    took_first = []
    for seed in range(50):
        out = run("mask|mixup", seed=seed)[0]
        random = random_of(seed)
        first = augment("mask", Z, random, ratio=0.2)
        second = augment("mixup", Z, random, partner_of_the_batch(random))
        is_first, is_second = (out == first).all(dim=1), (out == second).all(dim=1)
        assert bool((is_first ^ is_second).all())
        took_first.append(is_first)
    share = torch.stack(took_first).double()
    assert abs(float(share.mean()) - 0.5) < 4 * 0.5 / math.sqrt(share.numel())
    assert float((share.mean(dim=0) - 0.5).abs().max()) < 0.35, "no row is bound to one"


@pytest.mark.parametrize("method", ["mask", "mixup"])
def test_n_features_of_a_drawing_method_are_n_draws(method):
    out = run(method, seed=3, num_features=3)
    assert out.shape == (3, N, DIM)
    assert torch.equal(out[0], run(method, seed=3)[0])
    assert len({float(feature.sum()) for feature in out}) == 3


@pytest.mark.parametrize(
    ("method", "options", "until_then"),
    [
        ("nn", {}, "identity"),
        ("mixup", {"partner": "queue"}, "identity"),
        ("nn+mask", {}, "mask"),
    ],
)
def test_links_that_read_the_queue_wait_until_it_is_filled(method, options, until_then):
    made = augmenter(method, filled=19, **options)
    assert not made.is_ready()
    assert torch.equal(made(Z, OTHER, random_of(2), 1.0), run(until_then, seed=2))
    made.queue.put(features(4, 1))
    assert made.is_ready()
    assert not torch.allclose(made(Z, OTHER, random_of(2), 1.0), run(until_then, seed=2))


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_strength_moves_from_its_start_to_its_end(curve):
    made = augmenter("mask", strength_start=0.2, strength=0.8, strength_curve=curve)
    quarter = 0.25 if curve == "linear" else (1 - math.sqrt(0.5)) / 2
    for progress, share in ((0.0, 0.0), (0.25, quarter), (0.5, 0.5), (1.0, 1.0)):
        assert made.strength(progress) == pytest.approx(0.2 + 0.6 * share)
    assert augmenter("mask", strength=0.7, strength_curve=curve).strength(0.3) == 0.7


@pytest.mark.parametrize("method", ["nn", "nn+noise", "mask|mixup"])
def test_strength_reaches_every_link(method):
    equal(run(method, strength=0.0)[0], Z, atol=1e-12)
    moved = [float((run(method, strength=s) - Z).norm()) for s in (0.1, 1.0)]
    assert 1e-3 < moved[0] < moved[1]


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"choice": "consensus", "top_k": 4}])
def test_nn_finds_the_nearest_entries(options):
    made = augmenter("nn", nn=options)
    out = made(Z, OTHER, random_of(4), 1.0)[0]
    nearest = nearest_entries(made, Z, options.get("top_k", 1))
    choice = options.get("choice", "random")
    equal(out, augment("nn", Z, random_of(4), nearest, choice=choice))


@pytest.mark.parametrize(("distance", "found"), [("cosine", 0), ("truncated", 1)])
def test_nn_distance_reaches_the_search(distance, found):
    """The first dimension of z is wild: by cosine it decides alone, truncated it counts little."""
    z, wild, calm = (torch.ones(1, DIM) for _ in range(3))
    z[0, 0] = wild[0, 0] = 8.0
    wild[0, 1:13] = -1.0  # twelve others disagree
    made = augmenter("nn", filled=0, min_fill=2, nn={"distance": distance})
    made.queue.put(torch.cat([wild, calm]))
    out = made(z, z, RowRandom.whole(torch.Generator(), 1), 1.0)[0]
    equal(out, keep_norm((wild, calm)[found], z), atol=1e-5)
    assert made.nearest_entry(z)[0] == found


def test_n_features_of_nn_are_the_n_nearest_in_order_each_with_the_gradient():
    made = augmenter("nn", nn={"top_k": 6}, num_features=3, stop_gradient=False)
    z = Z.clone().requires_grad_()
    out = made(z, OTHER, random_of(), 1.0)
    equal(out, nearest_entries(made, Z, 3).transpose(0, 1))
    out.sum().backward()
    equal(z.grad, torch.full_like(Z, 3.0), atol=0)
