"""Random numbers by row: a part of the batch gets what the whole would; distributions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pretrain.features.augmentations.base import RowRandom, fa_generator


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(num_rows, seed=0):
    return RowRandom.whole(rng(seed), num_rows)


DRAWS = {
    "uniform": lambda random: random.uniform(),
    "uniform of a row": lambda random: random.uniform(5),
    "uniform in double": lambda random: random.uniform(5, dtype=torch.float64),
    "normal": lambda random: random.normal(4, 2),
    "integers": lambda random: random.integers(9),
    "integers of a row": lambda random: random.integers(9, 3),
    "beta 1": lambda random: random.beta(1.0, 1),
    "beta 0.5": lambda random: random.beta(0.5, 3),
    "beta 2 in double": lambda random: random.beta(2.0, dtype=torch.float64),
}


def parts_of(kinds, cuts, num_rows, seed):
    """Every kind drawn in sequence by each part on its own, and the parts put together."""
    edges = [0, *sorted(cuts), num_rows]
    drawn = []
    for start, stop in itertools.pairwise(edges):
        random = RowRandom(rng(seed), slice(start, stop), num_rows)
        drawn.append([DRAWS[kind](random) for kind in kinds])
    return [torch.cat(same) for same in zip(*drawn, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(DRAWS)), min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 11), max_size=4),
    seed=st.integers(0, 2**31),
)
def test_rows_of_any_split_are_rows_of_the_whole(kinds, cuts, seed):
    random = whole(12, seed)
    for kind, part in zip(kinds, parts_of(kinds, cuts, 12, seed), strict=True):
        assert torch.equal(part, DRAWS[kind](random)), kind


def test_a_shift_is_the_same_for_every_part_and_between_other_draws():
    seen = []
    for rows in (slice(0, 8), slice(0, 3), slice(3, 8)):
        random = RowRandom(rng(2), rows, 8)
        random.beta(0.3, 2)
        seen.append((random.shift(), random.shift(), float(random.uniform().sum())))
    assert seen[0][:2] == seen[1][:2] == seen[2][:2]
    assert seen[0][2] == pytest.approx(seen[1][2] + seen[2][2])


def test_a_shift_is_any_but_zero():
    counts = np.bincount([whole(5, seed).shift() for seed in range(300)])
    assert counts[0] == 0
    assert np.abs(counts[1:] - 75).max() < 4 * math.sqrt(75)
    assert len(counts) == 5


def test_integers_are_uniform_below_their_bound():
    values = whole(3000).integers(4, 2)
    assert values.shape == (3000, 2)
    assert values.dtype == torch.int64
    shares = np.bincount(values.flatten().numpy(), minlength=4) / values.numel()
    assert len(shares) == 4
    assert np.abs(shares - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / values.numel())


DISTRIBUTIONS = {
    "uniform": (lambda random: random.uniform(dtype=torch.float64), stats.uniform()),
    "normal": (lambda random: random.normal(dtype=torch.float64), stats.norm()),
    **{
        f"beta {alpha}": (lambda random, alpha=alpha: random.beta(alpha), stats.beta(alpha, alpha))
        for alpha in (0.5, 1.0, 2.0, 3.0)
    },
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(name):
    draw, distribution = DISTRIBUTIONS[name]
    values = draw(whole(20_000, seed=1)).double().numpy()
    assert stats.kstest(values, distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-4, 0.05, 0.5, 2.0, 50.0, 1e5])
def test_beta_draws_are_finite_and_inside(alpha):
    lam = whole(5000, seed=2).beta(alpha, dtype=torch.float64)
    assert bool(torch.isfinite(lam).all())
    assert 0 <= float(lam.min()) <= float(lam.max()) <= 1
    assert abs(float(lam.mean()) - 0.5) < 4 * 0.5 / math.sqrt(5000)


def test_the_global_generator_has_no_say_and_is_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = [draw(whole(4, seed=7)) for draw in DRAWS.values()]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again = [draw(whole(4, seed=7)) for draw in DRAWS.values()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_generator_for_each_seed_and_step():
    """(1, 11) and (11, 1) too: the pair is the key, not its digits or its sum."""

    def draw(seed, step):
        return float(torch.rand((), generator=fa_generator(seed, step, torch.device("cpu"))))

    pairs = [(seed, step) for seed in range(12) for step in range(12)]
    drawn = {pair: draw(*pair) for pair in pairs}
    assert len(set(drawn.values())) > len(pairs) - 3  # of 2^24 values
    assert drawn[1, 11] != drawn[11, 1]
    assert drawn == {pair: draw(*pair) for pair in pairs}
