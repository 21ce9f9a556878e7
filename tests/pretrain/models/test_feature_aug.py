"""Each feature augmentation against its definition, written again here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models import feature_aug
from pretrain.models.support_queue import SupportQueue


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def features(n=64, d=32, seed=0, scale=3.0):
    return scale * torch.randn(n, d, generator=rng(seed), dtype=torch.float64)


def filled_queue(n=50, d=32, seed=9, size=None):
    queue = SupportQueue(size or n, d)
    queue.put(torch.randn(n, d, generator=rng(seed)))
    return queue


def neighbours(z, queue, top_k=1, num_features=1, seed=0):
    return feature_aug.nearest_neighbour(
        z, queue, top_k=top_k, num_features=num_features, generator=rng(seed)
    )


METHODS = {
    "mask": lambda z, seed: feature_aug.mask(z, ratio=0.3, generator=rng(seed)),
    "noise": lambda z, seed: feature_aug.noise(z, sigma=0.5, generator=rng(seed)),
    "mixup": lambda z, seed: feature_aug.mixup(z, alpha=0.5, generator=rng(seed)),
    "nn": lambda z, seed: neighbours(z, filled_queue(), top_k=5, seed=seed)[0],
}


@pytest.mark.parametrize("method", METHODS)
def test_norm_is_kept(method):
    z = features()
    torch.testing.assert_close(METHODS[method](z, 1).norm(dim=1), z.norm(dim=1))


@pytest.mark.parametrize("method", METHODS)
def test_pure_function_of_features_and_seed(method):
    z = features()
    before = z.clone()
    torch.manual_seed(1)
    first = METHODS[method](z, 7)
    torch.manual_seed(2)  # the global generator has no say
    assert torch.equal(METHODS[method](z, 7), first)
    assert not torch.equal(METHODS[method](z, 8), first)
    assert torch.equal(z, before)


@pytest.mark.parametrize("method", METHODS)
def test_global_generator_is_left_alone(method):
    state = torch.get_rng_state()
    METHODS[method](features(), 7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(method, dtype):
    z = features().to(dtype)
    out = METHODS[method](z, 0)
    assert out.dtype == dtype
    assert out.shape == z.shape


# --- mask


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9])
def test_mask_zeroes_its_share_and_scales_the_rest_alike(ratio):
    z = features(n=400, d=64)
    out = feature_aug.mask(z, ratio=ratio, generator=rng(3))
    zeroed = (out == 0).double().mean()
    sigma = math.sqrt(max(ratio * (1 - ratio), 1e-9) / z.numel())
    assert abs(float(zeroed) - ratio) < 5 * sigma + 1e-4
    for row, original in zip(out.numpy(), z.numpy(), strict=True):
        kept = row != 0
        factor = np.linalg.norm(original) / np.linalg.norm(original[kept])
        np.testing.assert_allclose(row[kept], original[kept] * factor, rtol=1e-12)


def test_mask_draws_each_dimension_of_each_row_on_its_own():
    kept = feature_aug.mask(features(n=3000, d=8), ratio=0.3, generator=rng(4)) != 0
    both = (kept[:, :-1] & kept[:, 1:]).double().mean()
    assert abs(float(both) - 0.49) < 0.01
    shares = kept.double().mean(dim=0)
    assert float((shares - 0.7).abs().max()) < 0.04


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    ratio=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**31),
)
def test_mask_keeps_at_least_one_dimension(n, d, ratio, seed):
    z = features(n, d, seed)
    out = feature_aug.mask(z, ratio=ratio, generator=rng(seed))
    assert bool((out != 0).any(dim=1).all())
    torch.testing.assert_close(out.norm(dim=1), z.norm(dim=1))


def test_mask_gradient_does_not_pass_zeroed_dimensions_alone():
    """The direction's gradient of z * m, normalised: checked by finite differences."""
    z = features(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: feature_aug.mask(x, ratio=0.4, generator=rng(1)), (z,)
    )


# --- noise


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_noise_has_the_size_that_is_defined(sigma):
    """|noise| is about sigma |z|: undo the renormalisation by projecting on z's direction."""
    z = features(n=2000, d=64)
    out = feature_aug.noise(z, sigma=sigma, generator=rng(5))
    unit = z / z.norm(dim=1, keepdim=True)
    along = (out * unit).sum(dim=1, keepdim=True)
    # out = c (z + e) with |out| = |z|; e's part across z is sigma |z| / sqrt(d) eps with d - 1 dims
    tangent = ((out - along * unit).norm(dim=1) / along.abs().squeeze(1)).numpy()
    eps_along = sigma / math.sqrt(64)  # std of the part along z, relative to |z|
    simulated = np.random.default_rng(0)
    across = sigma * np.sqrt(simulated.chisquare(63, 200_000) / 64)
    expected = np.median(across / np.abs(1 + eps_along * simulated.standard_normal(200_000)))
    assert abs(np.median(tangent) / expected - 1) < 0.02


def test_noise_equals_its_definition():
    z = features(5, 7)
    eps = torch.randn(z.shape, generator=rng(6), dtype=z.dtype)
    expected = z + 0.3 * z.norm(dim=1, keepdim=True) / math.sqrt(7) * eps
    expected *= z.norm(dim=1, keepdim=True) / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(feature_aug.noise(z, sigma=0.3, generator=rng(6)), expected)


def test_no_noise_is_the_identity():
    z = features()
    torch.testing.assert_close(feature_aug.noise(z, sigma=0.0, generator=rng()), z)


# --- mixup


def mixup_parts(alpha, n=4000, seed=0):
    """Shift and lambda of each row, read off the output: rows are multiples of unit vectors."""
    z = torch.eye(n, dtype=torch.float64)
    out = feature_aug.mixup(z, alpha=alpha, generator=rng(seed))
    own = out.diagonal()
    others = out - torch.diag(own)
    partner = others.argmax(dim=1)
    theirs = others.gather(1, partner[:, None]).squeeze(1)
    return partner, own / (own + theirs), out


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_mixup_lambda_has_the_moments_of_a_folded_beta(alpha):
    """lambda = max(l, 1 - l), l ~ Beta(alpha, alpha): moments by numerical integration."""
    _, lam, _ = mixup_parts(alpha)
    # l = sin^2(u) takes the end points' singularity of alpha < 1 away
    u = (np.arange(200_000) + 0.5) / 200_000 * (math.pi / 2)
    density = np.sin(u) ** (2 * alpha - 1) * np.cos(u) ** (2 * alpha - 1)
    density /= density.sum()
    folded = np.maximum(np.sin(u) ** 2, np.cos(u) ** 2)
    for moment in (1, 2, 4):
        values = folded**moment
        mean = (values * density).sum()
        std = math.sqrt((values**2 * density).sum() - mean**2)
        assert abs(float((lam**moment).mean()) - mean) < 4 * std / math.sqrt(len(lam)), moment
    assert float(lam.min()) >= 0.5
    assert float(lam.max()) <= 1.0


def test_mixup_partner_is_another_row_of_the_batch():
    shifts = set()
    for seed in range(60):
        partner, _, out = mixup_parts(1.0, n=5, seed=seed)
        shift = (partner - torch.arange(5)) % 5
        assert len(set(shift.tolist())) == 1  # one shift for the batch
        assert int(shift[0]) != 0
        assert int((out > 0).sum()) == 10  # own and partner's dimension, nothing else
        shifts.add(int(shift[0]))
    assert shifts == {1, 2, 3, 4}


def test_mixup_draws_a_lambda_for_each_row():
    _, lam, _ = mixup_parts(0.5, n=50)
    assert len(set(lam.tolist())) == 50


def test_mixup_of_two_rows():
    z = features(2, 4)
    out = feature_aug.mixup(z, alpha=2.0, generator=rng(1))
    for i in (0, 1):
        plane = torch.stack([z[i], z[1 - i]], dim=1)
        weights = torch.linalg.lstsq(plane, out[i].unsqueeze(1)).solution.squeeze(1)
        assert float(weights[0]) > float(weights[1]) > 0
        torch.testing.assert_close(plane @ weights, out[i])


def test_mixup_of_one_row_is_refused():
    with pytest.raises(ValueError, match=r"mixup needs a batch of at least 2 samples"):
        feature_aug.mixup(features(1, 4), alpha=1.0, generator=rng())


@pytest.mark.parametrize("alpha", [1e-4, 0.05, 0.5, 2.0, 50.0, 1e5])
def test_beta_draws_are_finite_and_inside(alpha):
    lam = feature_aug._beta(alpha, 5000, rng(2), torch.zeros((), dtype=torch.float64))
    assert bool(torch.isfinite(lam).all())
    assert float(lam.min()) >= 0
    assert float(lam.max()) <= 1
    assert abs(float(lam.mean()) - 0.5) < 4 * 0.5 / math.sqrt(5000)


# --- nearest neighbours


def brute_force(z, queue, k):
    """Indices by similarity in numpy, nearest first."""
    bank = queue.features[: int(queue.count)].double().numpy()
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    return np.argsort(-(unit @ bank.T), axis=1, kind="stable")[:, :k], bank


def test_nn_top_1_is_the_nearest_with_the_norm_of_its_input():
    z, queue = features(), filled_queue()
    indices, bank = brute_force(z, queue, 1)
    expected = bank[indices[:, 0]] * z.norm(dim=1, keepdim=True).numpy()
    out = neighbours(z, queue)
    assert out.shape == (1, 64, 32)
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-5)


def test_nn_n_features_are_the_n_nearest_in_order():
    z, queue = features(), filled_queue()
    indices, bank = brute_force(z, queue, 3)
    out = neighbours(z, queue, top_k=6, num_features=3)
    assert out.shape == (3, 64, 32)
    for n in range(3):
        expected = bank[indices[:, n]] * z.norm(dim=1, keepdim=True).numpy()
        np.testing.assert_allclose(out[n].numpy(), expected, atol=1e-5)


def test_nn_top_k_takes_any_of_the_k_nearest_and_each_row_its_own():
    z, queue = features(), filled_queue()
    indices, bank = brute_force(z, queue, 4)
    choices = np.zeros(4, int)
    rows_agree = []
    for seed in range(40):
        out = neighbours(z, queue, top_k=4, seed=seed)[0]
        unit = (out / out.norm(dim=1, keepdim=True)).numpy()
        taken = np.argmin(np.linalg.norm(unit[:, None] - bank[indices], axis=2), axis=1)
        np.testing.assert_allclose(unit, bank[indices[np.arange(64), taken]], atol=1e-5)
        choices += np.bincount(taken, minlength=4)
        rows_agree.append(len(set(taken.tolist())) == 1)
    total = choices.sum()
    assert np.abs(choices / total - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / total)
    assert not any(rows_agree)


def test_nn_gradient_is_straight_through():
    z = features(6, 32).requires_grad_()
    weight = features(6, 32, seed=3)
    (neighbours(z, filled_queue())[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


def test_nn_of_all_n_features_passes_the_gradient_n_times():
    z = features(6, 32).requires_grad_()
    neighbours(z, filled_queue(), top_k=3, num_features=3).sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 3.0))


def test_nn_never_takes_an_empty_slot():
    queue = SupportQueue(100, 32)
    queue.put(-torch.ones(3, 32))  # worse than the zeros of empty slots
    out = neighbours(torch.ones(2, 32), queue)
    torch.testing.assert_close(out[0], -torch.ones(2, 32))


def test_keep_norm_of_zero_rows_stays_finite():
    out = feature_aug.keep_norm(torch.zeros(2, 3), torch.ones(2, 3))
    assert bool(torch.isfinite(out).all())
