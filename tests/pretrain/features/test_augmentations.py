"""Each feature augmentation against its definition, written again here in numpy and float64."""

import math

import numpy as np
import pytest
import torch

from pretrain.features.augmentations.base import keep_norm
from tests.pretrain.features.helpers import augment, features, neighbours, random_of

# --- the definitions, for rows z [n, d]; `other` is z_j [n, d], or the neighbours [n, k, d]


def length(x):
    return np.sqrt((x**2).sum(axis=-1, keepdims=True))


def with_length_of(z, x):
    return x / length(x) * length(z)


def kept_dimensions(z, draw, ratio):
    u = draw.uniform(z.shape[1]).double().numpy()
    kept = u >= ratio
    kept[np.arange(len(z)), u.argmax(axis=1)] = True
    return kept


def folded(draw, alpha, s):
    """Lambda with (1 - lambda) scaled by the strength."""
    b = draw.beta(alpha, 1, dtype=torch.float64).numpy()
    return 1 - s * (1 - np.maximum(b, 1 - b))


def define_mask(z, other, draw, s, ratio):
    return z * kept_dimensions(z, draw, s * ratio)


def define_noise(z, other, draw, s, sigma):
    eps = draw.normal(z.shape[1], dtype=torch.float64).numpy()
    return z + s * sigma * length(z) / math.sqrt(z.shape[1]) * eps


def define_mixup(z, other, draw, s, alpha):
    lam = folded(draw, alpha, s)
    return lam * z + (1 - lam) * other


def define_cutmix(z, other, draw, s, ratio):
    m = kept_dimensions(z, draw, s * ratio)
    return m * z + ~m * other


def define_extrapolate(z, other, draw, s, scale, per_dimension):
    tail = z.shape[1] if per_dimension else 1
    lam = s * scale * draw.beta(2.0, tail, dtype=torch.float64).numpy()
    return z + lam * (z - other)


def centre_of(others):
    """Softmax weights of each neighbour's median similarity to the others, temperature 0.1."""
    unit = others / length(others)
    k = len(unit)
    medians = [np.median([unit[i] @ unit[j] for j in range(k) if j != i]) for i in range(k)]
    weights = np.exp(np.array(medians) / 0.1)
    return (weights / weights.sum()) @ unit


def define_nn(z, other, draw, s, choice, number=None):
    if number is not None:
        found = other[:, number]
    elif choice == "consensus":
        found = np.stack([centre_of(row) for row in other])
    else:
        k = other.shape[1]
        which = draw.integers(k, 1)[:, 0].numpy() if k > 1 else np.zeros(len(z), int)
        found = other[np.arange(len(z)), which]
    return (1 - s) * z + s * with_length_of(z, found)


CASES = {
    "mask": ("mask", None, {"ratio": 0.3}),
    "mask nearly all": ("mask", None, {"ratio": 0.97}),
    "noise": ("noise", None, {"sigma": 0.5}),
    "mixup": ("mixup", features(seed=5), {"alpha": 0.5}),
    "mixup uniform": ("mixup", features(seed=5), {"alpha": 1.0}),
    "cutmix": ("cutmix", features(seed=5, scale=4.0), {"ratio": 0.4}),
    "extrapolate": ("extrapolate", features(seed=5), {"scale": 0.8, "per_dimension": False}),
    "extrapolate each": ("extrapolate", features(seed=5), {"scale": 0.8, "per_dimension": True}),
    "nn random": ("nn", neighbours(), {"choice": "random"}),
    "nn top 1": ("nn", neighbours(k=1), {"choice": "random"}),
    "nn consensus": ("nn", neighbours(), {"choice": "consensus"}),
    "nn of rank 2": ("nn", neighbours(), {"choice": "random", "number": 2}),
}
DRAWING = [name for name in CASES if name not in ("nn top 1", "nn consensus", "nn of rank 2")]


def call(case, z, seed=1, strength=1.0, other=None):
    name, own, options = CASES[case]
    others = own if other is None else other
    if others is not None:
        others = others[: len(z)] if name == "nn" else others[: len(z), : z.shape[1]].to(z.dtype)
    return augment(name, z, random_of(len(z), seed), others, strength=strength, **options)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_equals_its_definition(case, strength):
    z = features()
    name, other, options = CASES[case]
    assert call(case, z.float(), seed=4, strength=strength).dtype == torch.float32
    definition = globals()[f"define_{name}"]
    other = None if other is None else other.double().numpy()
    expected = definition(z.numpy(), other, random_of(64, 4), strength, **options)
    expected = with_length_of(z.numpy(), expected)
    out = call(case, z, seed=4, strength=strength).numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
    assert np.abs(out - z.numpy()).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_strength_0_is_the_identity_and_draws_as_much(case):
    z = features()
    torch.testing.assert_close(call(case, z, strength=0.0), z, rtol=0, atol=1e-12)
    name, other, options = CASES[case]
    states = []
    for strength in (0.0, 1.0):
        random = random_of(64, 1)
        augment(name, z, random, other, strength=strength, **options)
        states.append(random.generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("case", CASES)
def test_pure_function_of_features_and_seed(case):
    z = features()
    before = z.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = call(case, z, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(call(case, z, 7), first)
    assert torch.equal(call(case, z, 8), first) == (case not in DRAWING)
    assert torch.equal(z, before)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("nn")])
def test_gradient_by_finite_differences(case):
    """Of the normalised result, in z and in z_j."""
    z = features(4, 6).requires_grad_()
    other = features(4, 6, seed=3).requires_grad_()
    arguments = (z,) if CASES[case][1] is None else (z, other)
    assert torch.autograd.gradcheck(
        lambda x, *y: call(case, x, 1, 0.7, *y), arguments, check_undefined_grad=False
    )


@pytest.mark.parametrize("choice", ["random", "consensus"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_nn_gradient_is_straight_through(choice, strength):
    z, weight = features(6).requires_grad_(), features(6, seed=3)
    out = augment("nn", z, random_of(6), neighbours(6), strength=strength, choice=choice)
    (out * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_identity_leaves_features_as_they_are():
    z = features()
    assert augment("identity", z, random_of(64), strength=0.3) is z


def test_keep_norm_of_zero_rows_stays_finite():
    out = keep_norm(torch.zeros(2, 3), torch.ones(2, 3))
    assert bool(torch.isfinite(out).all())
