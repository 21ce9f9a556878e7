"""Classifiers trained at once against the same number trained one by one with PyTorch."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pretrain.engine.optim import LARS
from pretrain.evaluation.linear import heads as cached
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.heads import LinearHeads, accuracies, best, places

CPU = torch.device("cpu")
DIM, CLASSES, NUM = 12, 5, 90


class Recorded:
    """Features in memory; every batch that is read is noted."""

    def __init__(self, features):
        self.features, self.batches = features, []

    def read(self, rows):
        self.batches.append(rows.copy())
        return self.features[rows]


@pytest.fixture
def problem():
    """Overlapping classes, so that a converged classifier is far from perfect."""
    generator = torch.Generator().manual_seed(1)
    centres = 0.7 * torch.randn(CLASSES, DIM, generator=generator)
    labels = torch.randint(CLASSES, (NUM,), generator=generator)
    return centres[labels] + torch.randn(NUM, DIM, generator=generator), labels.numpy()


def sweep(problem, config, samples=None, features=None):
    rows, labels = features or Recorded(problem[0]), problem[1]
    heads = LinearHeads(config, DIM, CLASSES, config.peak_rates(), CPU)
    cached.train(heads, rows, labels, np.arange(len(labels)) if samples is None else samples)
    return heads, rows


def one_by_one(problem, config, batches, rate, weight):
    """PyTorch's own classifier, autograd and optimiser on the same batches."""
    features, labels = problem[0], torch.from_numpy(problem[1])
    linear = nn.Linear(DIM, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.zero_()
    decay, momentum = config.weight_decay, config.momentum
    if config.optimizer == "lars":
        groups = [{"params": [p]} for p in linear.parameters()]
        optimizer = LARS(
            groups, lr=rate, momentum=momentum, weight_decay=decay, eta=config.lars_eta
        )
    else:
        optimizer = torch.optim.SGD(
            linear.parameters(), lr=rate, momentum=momentum, weight_decay=decay,
            nesterov=config.nesterov,
        )  # fmt: skip
    per_epoch = len(batches) // config.epochs
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * config.lr_factor(step, per_epoch)
        optimizer.zero_grad()
        functional.cross_entropy(linear(features[rows]), labels[rows]).backward()
        optimizer.step()
    return linear


OPTIONS = {
    "plain": {},
    "momentum 0": {"momentum": 0.0},
    "decay, nesterov": {"weight_decay": 0.01, "nesterov": True},
    "random start": {"init_std": 0.3, "seed": 5},
    "step": {"schedule": "step", "milestones": [2, 3], "gamma": 0.3},
    "cosine by epoch": {"schedule": "cosine_epochs"},
    "lars": {"optimizer": "lars", "lars_eta": 0.1, "weight_decay": 0.001, "init_std": 0.1},
}


@pytest.mark.parity
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_sweep_equals_as_many_trainings_one_by_one(problem, options):
    config = LinearConfig(epochs=4, batch_size=32, num_lrs=10, lr_min=0.01, lr_max=10, **options)
    heads, rows = sweep(problem, config)
    assert len(heads.weight) == 10
    weight = LinearHeads(config, DIM, CLASSES, [1.0], CPU).weight[0]
    assert bool(weight.any()) == (config.init_std > 0)
    for number, rate in enumerate(config.peak_rates()):
        linear = one_by_one(problem, config, rows.batches, rate, weight)
        scale = linear.weight.abs().max().clamp_min(1).item()
        torch.testing.assert_close(
            heads.weight[number], linear.weight.detach(), atol=1e-5 * scale, rtol=0
        )
        torch.testing.assert_close(
            heads.bias[number], linear.bias.detach(), atol=1e-5 * scale, rtol=0
        )
    assert (heads.weight[0] - heads.weight[9]).abs().max() > 0.1


@pytest.mark.parity
def test_a_converged_classifier_is_the_one_that_lbfgs_finds(problem):
    """With weight decay on weight and bias the optimum is unique."""
    decay = 0.02
    config = LinearConfig(
        epochs=1500, batch_size=NUM, lrs=[256 / NUM * 0.5], weight_decay=decay, holdout=0.0
    )
    heads, _ = sweep(problem, config)
    features, labels = problem[0].double(), torch.from_numpy(problem[1])
    weight = torch.zeros(CLASSES, DIM, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-12, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss():
        solver.zero_grad()
        value = functional.cross_entropy(features @ weight.T + bias, labels)
        value = value + decay / 2 * (weight.square().sum() + bias.square().sum())
        value.backward()
        return value

    solver.step(loss)
    torch.testing.assert_close(heads.weight[0].double(), weight.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(heads.bias[0].double(), bias.detach(), atol=1e-5, rtol=0)
    right = (features @ weight.T + bias).argmax(1) == labels
    figures = cached.score(heads, Recorded(problem[0]), problem[1], np.arange(NUM))
    assert 0.4 < figures["top1"][0] < 0.95
    assert figures["top1"][0] == pytest.approx(right.double().mean().item())


def test_every_epoch_takes_each_sample_once_in_an_order_of_its_own(problem):
    samples = np.arange(0, NUM, 2)
    config = LinearConfig(epochs=3, batch_size=16)
    _, rows = sweep(problem, config, samples)
    assert [len(batch) for batch in rows.batches] == [16, 16, 13] * 3
    epochs = [np.concatenate(rows.batches[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == samples.tolist()
    assert (epochs[0] != epochs[1]).any()
    _, again = sweep(problem, config, samples)
    assert np.concatenate(again.batches).tolist() == np.concatenate(epochs).tolist()
    _, other = sweep(problem, LinearConfig(epochs=3, batch_size=16, seed=1), samples)
    assert np.concatenate(other.batches).tolist() != np.concatenate(epochs).tolist()


def test_epochs_go_round_the_passes(problem):
    twice = Recorded(torch.cat([problem[0], problem[0] + 1]))
    config = LinearConfig(epochs=3, batch_size=NUM, passes=2)
    sweep(problem, config, features=twice)
    assert [(batch.min(), batch.max()) for batch in twice.batches] == [
        (0, NUM - 1), (NUM, 2 * NUM - 1), (0, NUM - 1),
    ]  # fmt: skip


def test_a_state_goes_on_bit_for_bit(problem):
    features, labels = problem[0], torch.from_numpy(problem[1])
    config = LinearConfig(init_std=0.1)

    def steps(heads, numbers):
        for i in numbers:
            heads.step(features[i * 9 : i * 9 + 9], labels[i * 9 : i * 9 + 9], 1 / (i + 1))

    whole, first, second = (LinearHeads(config, DIM, CLASSES, [0.1, 1], CPU) for _ in range(3))
    steps(whole, range(8))
    steps(first, range(5))
    second.load_state_dict(first.state_dict())
    steps(second, range(5, 8))
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)


def test_losses_are_cross_entropies_before_the_step(problem):
    features, labels = problem[0], torch.from_numpy(problem[1])
    heads = LinearHeads(LinearConfig(init_std=0.5), DIM, CLASSES, [0.1, 1], CPU)
    expected = functional.cross_entropy(heads.logits(features)[:, 0], labels)
    torch.testing.assert_close(heads.step(features, labels, 1.0), expected.expand(2))


# --- scores


def test_score_equals_topk_and_counts_by_class():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 3, 9, generator=generator)
    labels = torch.randint(8, (200,), generator=generator)  # nothing of class 8
    figures = accuracies(places(logits, labels), labels, 9)
    assert figures["n"] == 200
    for head in range(3):
        found = logits[:, head].topk(5, dim=1).indices == labels[:, None]
        assert figures["top1"][head] == pytest.approx(found[:, 0].double().mean().item())
        assert figures["top5"][head] == pytest.approx(found.any(1).double().mean().item())
        for number in range(8):
            right = found[labels == number, 0].double().mean().item()
            assert figures["per_class"][head][number] == pytest.approx(right)
        assert figures["per_class"][head][8] is None


def test_equal_logits_do_not_make_a_classifier_right():
    """All classes equal: the first one is predicted, as argmax does."""
    labels = torch.arange(7)
    figures = accuracies(places(torch.zeros(7, 1, 7), labels), labels, 7)
    assert figures["top1"] == [pytest.approx(1 / 7)]
    assert figures["top5"] == [pytest.approx(5 / 7)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_classifier_that_diverged_is_wrong(value):
    logits = torch.full((4, 2, 7), value)
    logits[:, 1] = torch.eye(7)[:4]
    labels = torch.arange(4)
    assert accuracies(places(logits, labels), labels, 7)["top1"] == [0.0, 1.0]


def test_top5_of_five_classes_says_nothing():
    labels = torch.arange(4)
    assert accuracies(places(torch.randn(4, 1, 5), labels), labels, 5)["top5"] is None


def test_large_logits_are_scored_in_chunks(problem, monkeypatch):
    heads, rows = sweep(problem, LinearConfig(epochs=2, batch_size=32))
    whole = cached.score(heads, rows, problem[1], np.arange(NUM))
    monkeypatch.setattr(cached, "_MAX_LOGITS", 7 * 10 * CLASSES)
    rows.batches.clear()
    assert cached.score(heads, rows, problem[1], np.arange(NUM)) == whole
    assert max(map(len, rows.batches)) == 7


def test_the_best_is_the_highest_and_of_equal_ones_the_slowest():
    assert best([0.2, 0.5, 0.4], [1, 2, 3]) == 1
    assert best([0.5, 0.2, 0.5, 0.5], [3, 1, 0.5, 9]) == 2


# --- schedules and rates


def test_step_schedule_equals_pytorchs():
    config = LinearConfig(epochs=10, schedule="step", milestones=[3, 7], gamma=0.2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], 0.2)
    for epoch in range(10):
        for step in (4 * epoch, 4 * epoch + 3):
            assert config.lr_factor(step, 4) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_cosines():
    by_epoch = LinearConfig(epochs=5, schedule="cosine_epochs")
    expected = [0.5 * (1 + np.cos(np.pi * epoch / 5)) for epoch in range(5) for _ in range(3)]
    assert [by_epoch.lr_factor(step, 3) for step in range(15)] == pytest.approx(expected)
    factors = [LinearConfig(epochs=5).lr_factor(step, 3) for step in range(15)]
    assert factors == sorted(factors, reverse=True)
    assert factors[7] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01 < 0.99 < factors[0] < 1


def test_rates_are_spaced_by_their_logarithm_and_scaled_with_the_batch():
    config = LinearConfig(num_lrs=4, lr_min=0.01, lr_max=10, batch_size=512)
    assert config.rates() == pytest.approx([0.01, 0.1, 1, 10])
    assert config.peak_rates() == pytest.approx([0.02, 0.2, 2, 20])
    assert LinearConfig(lrs=[30.0, 0.1]).rates() == [30.0, 0.1]
    assert LinearConfig(num_lrs=1, lr_min=0.3, holdout=0).rates() == [0.3]
