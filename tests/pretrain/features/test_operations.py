"""Each feature augmentation against its definition, written again here in numpy and float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.features import operations as feature_aug
from pretrain.features.row_random import RowRandom


def random_of(n, seed=0):
    return RowRandom.whole(torch.Generator().manual_seed(seed), n)


def features(n=64, d=32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def neighbours(n=64, k=5, d=32, seed=9):
    """As the queue returns them: unit length, fp32."""
    return torch.nn.functional.normalize(features(n * k, d, seed), dim=1).view(n, k, d).float()


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


def define_neighbour(z, other, draw, s, choice, number=None):
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
    "nn random": ("neighbour", neighbours(), {"choice": "random"}),
    "nn top 1": ("neighbour", neighbours(k=1), {"choice": "random"}),
    "nn consensus": ("neighbour", neighbours(), {"choice": "consensus"}),
    "nn of rank 2": ("neighbour", neighbours(), {"choice": "random", "number": 2}),
}
DRAWING = [name for name in CASES if name not in ("nn top 1", "nn consensus", "nn of rank 2")]


def call(case, z, seed=1, strength=1.0, other=None):
    name, own, options = CASES[case]
    others = () if own is None else ((own if other is None else other)[: len(z)],)
    if name != "neighbour":
        others = tuple(x[:, : z.shape[1]].to(z.dtype) for x in others)
    return getattr(feature_aug, name)(
        z, *others, random_of(len(z), seed), strength=strength, **options
    )


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_equals_its_definition(case, strength):
    z = features()
    name, other, options = CASES[case]
    definition = globals()[f"define_{name}"]
    other = None if other is None else other.double().numpy()
    expected = definition(z.numpy(), other, random_of(64, 4), strength, **options)
    expected = with_length_of(z.numpy(), expected)
    out = call(case, z, seed=4, strength=strength).numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
    assert np.abs(out - z.numpy()).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_norm_is_kept(case, strength):
    z = features(scale=3.0)
    out = call(case, z, strength=strength)
    torch.testing.assert_close(out.norm(dim=1), z.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_strength_0_is_the_identity_and_draws_as_much(case):
    z = features()
    torch.testing.assert_close(call(case, z, strength=0.0), z, rtol=0, atol=1e-12)
    name, other, options = CASES[case]
    states = []
    for strength in (0.0, 1.0):
        random = random_of(64, 1)
        others = () if other is None else (other,)
        getattr(feature_aug, name)(z, *others, random, strength=strength, **options)
        states.append(random.generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("case", CASES)
def test_distance_grows_with_the_strength(case):
    z = features()
    moved = [float((call(case, z, strength=s) - z).norm()) for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert moved == sorted(moved)
    assert len(set(moved)) == 5


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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(case, dtype):
    z = features().to(dtype)
    out = call(case, z)
    assert out.dtype == dtype
    assert out.shape == z.shape


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("nn")])
def test_gradient_by_finite_differences(case):
    """Of the normalised result, in z and in z_j."""
    z = features(4, 6).requires_grad_()
    other = features(4, 6, seed=3).requires_grad_()
    arguments = (z,) if CASES[case][1] is None else (z, other)
    assert torch.autograd.gradcheck(
        lambda x, *y: call(case, x, 1, 0.7, *y), arguments, check_undefined_grad=False
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("nn")])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_nn_gradient_is_straight_through(case, strength):
    z = features(6).requires_grad_()
    weight = features(6, seed=3)
    (call(case, z, strength=strength) * weight).sum().backward()
    assert torch.equal(z.grad, weight)


# --- mask and cutmix


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_mask_zeroes_its_share_and_scales_the_rest_alike(ratio, strength):
    z = features(n=400, d=64)
    out = feature_aug.mask(z, random_of(400, 3), ratio=ratio, strength=strength)
    share = strength * ratio
    sigma = math.sqrt(max(share * (1 - share), 1e-9) / z.numel())
    assert abs(float((out == 0).double().mean()) - share) < 5 * sigma + 1e-4
    factor = out / z
    scaled = torch.where(out != 0, factor, factor.amax(dim=1, keepdim=True))
    torch.testing.assert_close(scaled, factor.amax(dim=1, keepdim=True).expand_as(z))


def test_mask_draws_each_dimension_of_each_row_on_its_own():
    kept = feature_aug.mask(features(n=3000, d=8), random_of(3000, 4), ratio=0.3) != 0
    both = (kept[:, :-1] & kept[:, 1:]).double().mean()
    assert abs(float(both) - 0.49) < 0.01
    assert float((kept.double().mean(dim=0) - 0.7).abs().max()) < 0.04
    assert abs(float((kept[:-1] & kept[1:]).double().mean()) - 0.49) < 0.01


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    ratio=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**31),
)
def test_mask_keeps_at_least_one_dimension(n, d, ratio, seed):
    z = features(n, d, seed)
    out = feature_aug.mask(z, random_of(n, seed), ratio=ratio)
    assert bool((out != 0).any(dim=1).all())
    torch.testing.assert_close(out.norm(dim=1), z.norm(dim=1))


@pytest.mark.parametrize("ratio", [0.2, 0.99])
def test_cutmix_takes_its_share_of_the_partner_and_never_all(ratio):
    z, partner = torch.full((400, 64), 1.0), torch.full((400, 64), -1.0)
    taken = feature_aug.cutmix(z, partner, random_of(400, 3), ratio=ratio) < 0
    sigma = math.sqrt(ratio * (1 - ratio) / z.numel())
    assert abs(float(taken.double().mean()) - ratio) < 5 * sigma + 0.01
    assert not bool(taken.all(dim=1).any())


# --- noise


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_noise_has_the_size_that_is_defined(sigma):
    """|noise| is about sigma |z|: undo the renormalisation by projecting on z's direction."""
    z = features(n=2000, d=64)
    out = feature_aug.noise(z, random_of(2000, 5), sigma=sigma)
    unit = z / z.norm(dim=1, keepdim=True)
    along = (out * unit).sum(dim=1, keepdim=True)
    # out = c (z + e) with |out| = |z|; e's part across z is sigma |z| / sqrt(d) eps with d - 1 dims
    tangent = ((out - along * unit).norm(dim=1) / along.abs().squeeze(1)).numpy()
    simulated = np.random.default_rng(0)
    across = sigma * np.sqrt(simulated.chisquare(63, 200_000) / 64)
    lengthwise = np.abs(1 + sigma / 8 * simulated.standard_normal(200_000))
    assert abs(np.median(tangent) / np.median(across / lengthwise) - 1) < 0.02


# --- mixup and extrapolate: rows and partners are different unit vectors, so that the shares show


def shares(out):
    """Of own and partner's dimension of rows whose partner is the next one."""
    return out.diagonal(), out.roll(-1, dims=1).diagonal()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_mixup_lambda_has_the_moments_of_a_folded_beta(alpha, strength):
    """lambda = max(l, 1 - l), l ~ Beta(alpha, alpha): moments by numerical integration."""
    n = 1000
    z = torch.eye(n, dtype=torch.float64)
    out = feature_aug.mixup(z, z.roll(-1, 0), random_of(n), alpha=alpha, strength=strength)
    own, theirs = shares(out)
    lam = 1 - theirs / (own + theirs) / strength
    # l = sin^2(u) takes the end points' singularity of alpha < 1 away
    u = (np.arange(200_000) + 0.5) / 200_000 * (math.pi / 2)
    density = np.sin(u) ** (2 * alpha - 1) * np.cos(u) ** (2 * alpha - 1)
    density /= density.sum()
    folded_beta = np.maximum(np.sin(u) ** 2, np.cos(u) ** 2)
    for moment in (1, 2, 4):
        values = folded_beta**moment
        mean = (values * density).sum()
        std = math.sqrt((values**2 * density).sum() - mean**2)
        assert abs(float((lam**moment).mean()) - mean) < 4 * std / math.sqrt(n), moment
    assert 0.5 - 1e-12 <= float(lam.min()) < float(lam.max()) <= 1
    assert len(set(lam.tolist())) > n - 10, "a lambda for each row"
    assert int((out > 0).sum()) == 2 * n, "own and partner's dimension, nothing else"


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_extrapolate_lambda_is_a_scaled_beta_of_each_row(scale):
    n = 1000
    z = torch.eye(n, dtype=torch.float64)
    out = feature_aug.extrapolate(z, z.roll(-1, 0), random_of(n), scale=scale, per_dimension=False)
    own, theirs = shares(out)  # (1 + lambda) and -lambda, times a factor
    lam = -theirs / (own + theirs) / scale
    assert -1e-12 <= float(lam.min()) < float(lam.max()) <= 1 + 1e-12
    assert abs(float(lam.mean()) - 0.5) < 4 * math.sqrt(0.05 / n)  # Beta(2, 2): variance 1/20
    assert abs(float(lam.var()) - 0.05) < 0.005


@pytest.mark.parametrize("per_dimension", [False, True])
def test_extrapolate_draws_for_each_dimension_if_it_shall(per_dimension):
    z, partner = torch.ones(50, 8, dtype=torch.float64), torch.zeros(50, 8, dtype=torch.float64)
    out = feature_aug.extrapolate(z, partner, random_of(50), scale=1.0, per_dimension=per_dimension)
    spread = out.amax(dim=1) / out.amin(dim=1) - 1  # 1 + lambda is the same or differs
    assert bool((spread > 0.05).all()) if per_dimension else float(spread.abs().max()) < 1e-12


# --- neighbours


def test_nn_takes_any_of_the_k_equally_often_and_each_row_its_own():
    n, k = 4000, 4
    nearest = torch.eye(k).expand(n, k, k)
    out = call("nn random", torch.ones(n, k), other=nearest)
    taken = out.argmax(dim=1).numpy()
    counts = np.bincount(taken, minlength=k)
    assert np.abs(counts / n - 1 / k).max() < 4 * math.sqrt(1 / k * (1 - 1 / k) / n)
    follows = (taken[1:] == taken[:-1]).mean()
    assert abs(follows - 1 / k) < 4 * math.sqrt(1 / k * (1 - 1 / k) / n)


def test_keep_norm_of_zero_rows_stays_finite():
    out = feature_aug.keep_norm(torch.zeros(2, 3), torch.ones(2, 3))
    assert bool(torch.isfinite(out).all())
