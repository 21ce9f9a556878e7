"""Figures of a step's features: of features whose figures are known, and against loops."""

import math

import pytest
import torch

from pretrain.model.joint_embedding import StepOutput, effective_rank, feature_std
from tests.pretrain.model.references import cosine


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_spread_features_have_std_1_and_collapsed_ones_0():
    assert feature_std(gaussian(4000, 64)) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(50, 8)) == pytest.approx(0, abs=1e-6)
    assert feature_std(gaussian(50, 8) * 1e-3 + 5) < 0.01


def test_std_equals_its_definition_and_ignores_scale():
    z = gaussian(7, 3, seed=2)
    unit = [[x / math.sqrt(sum(v * v for v in row)) for x in row] for row in z.tolist()]
    total = 0.0
    for d in range(3):
        column = [row[d] for row in unit]
        mean = sum(column) / 7
        total += math.sqrt(sum((x - mean) ** 2 for x in column) / 7)
    expected = total / 3 * math.sqrt(3)
    assert feature_std(z) == pytest.approx(expected, rel=1e-5)
    assert feature_std(z * 100) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, 16])
def test_rank_of_k_equal_directions_is_k(k):
    """Rows +-e_1 .. +-e_k: centred already, k equal singular values."""
    basis = torch.eye(16)[:k]
    assert effective_rank(torch.cat([basis, -basis])) == pytest.approx(k, rel=1e-9)


def test_rank_of_a_known_spectrum():
    """a rows +-e_1 and b rows +-e_2 have singular values sqrt(2 a) and sqrt(2 b)."""
    e = torch.eye(4)
    z = torch.cat([e[0].repeat(9, 1), -e[0].repeat(9, 1), e[1].repeat(1, 1), -e[1].repeat(1, 1)])
    shares = [3 / 4, 1 / 4]  # of sqrt(18) and sqrt(2)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(z) == pytest.approx(expected, rel=1e-9)


def test_rank_ignores_scale_and_rotation():
    z = gaussian(40, 6, seed=1).double()
    rotation = torch.linalg.qr(gaussian(6, 6, seed=2).double()).Q
    scale = 0.1 + torch.rand(40, 1, generator=torch.Generator().manual_seed(0)).double()
    assert effective_rank(z @ rotation * scale) == pytest.approx(effective_rank(z), rel=1e-9)


def test_rank_of_a_collapsed_batch_is_0_and_of_noise_is_high():
    assert effective_rank(torch.ones(20, 8)) == 0.0
    assert effective_rank(gaussian(3, 8)[:1].repeat(20, 1)) == 0.0
    assert 7.9 < effective_rank(gaussian(5000, 8)) <= 8


def step_output(n=6, d=5, seed=0, **given):
    generator = torch.Generator().manual_seed(seed)
    names = ("online", "target", "projection", "original", "augmented")
    features = {name: torch.randn(n, d, generator=generator) for name in names} | given
    return StepOutput(
        loss=torch.zeros(()), is_augmented=True, entering=features["projection"],
        keys=torch.stack([features["projection"]] * 2), **features,
    )  # fmt: skip


def mean_and_std(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def pairs_again(output):
    online, target = output.online.tolist(), output.target.tolist()
    n = range(len(online))
    return {
        "positive": [cosine(online[i], target[i]) for i in n],
        "negative": [cosine(online[i], target[j]) for i in n for j in n if i != j],
    }


def test_cosines_equal_loops_over_the_pairs():
    output = step_output()
    figures = output.figures()
    for name, values in pairs_again(output).items():
        mean, std = mean_and_std(values)
        assert figures[f"{name}_cosine"] == pytest.approx(mean, abs=1e-6)
        assert figures[f"{name}_cosine_std"] == pytest.approx(std, abs=1e-6)
    moved = zip(output.original.tolist(), output.augmented.tolist(), strict=True)
    assert figures["fa_cosine"] == pytest.approx(mean_and_std([cosine(*p) for p in moved])[0])
    assert set(figures) == {
        "feature_std", "effective_rank", "fa_cosine", "positive_cosine", "positive_cosine_std",
        "negative_cosine", "negative_cosine_std",
    }  # fmt: skip


def test_lengths_do_not_matter_and_the_projection_counts_for_its_own_figures():
    output, lengths = step_output(), torch.tensor([[0.1], [1], [2], [30], [4], [5]])
    longer = step_output(online=output.online * lengths, target=output.target * 7)
    for key, value in output.figures().items():
        assert longer.figures()[key] == pytest.approx(value, abs=1e-5), key
    other = step_output(projection=torch.ones(6, 5)).figures()
    assert other["feature_std"] == pytest.approx(0, abs=1e-6)
    assert other["effective_rank"] == 0
    assert other["positive_cosine"] == output.figures()["positive_cosine"]


def test_one_row_has_no_negatives():
    output = step_output(n=1)
    figures = output.figures()
    assert "positive_cosine" in figures
    assert not [key for key in figures if key.startswith("negative")]
    assert all(math.isfinite(value) for value in figures.values())
    assert output.histograms()["negatives"] == [0] * 20


def test_histograms_count_every_pair_once():
    output = step_output(n=40)
    shares = output.histograms()
    for name, values in pairs_again(output).items():
        counts = [0] * 20
        for value in values:
            counts[min(int((value + 1) * 10), 19)] += 1
        expected = [count / len(values) for count in counts]
        assert shares[f"{name}s"] == pytest.approx(expected, abs=2 / len(values))
        assert sum(shares[f"{name}s"]) == pytest.approx(1, abs=1e-4)


def test_histograms_hold_the_ends_of_the_range():
    same = torch.full((3, 7), 0.1)
    assert step_output(online=same, target=same).histograms()["positives"][-1] == 1
    assert step_output(online=same, target=-same).histograms()["positives"][0] == 1
