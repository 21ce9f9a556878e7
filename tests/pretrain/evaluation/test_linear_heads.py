"""Classifiers trained at once against the same number trained one by one with PyTorch."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pretrain.config import EngineConfig
from pretrain.engine.optim import LARS
from pretrain.engine.trainer import Position, Trainer
from pretrain.evaluation.linear import heads as heads_module
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.heads import FeatureBatch, LinearHeads, StoredBatches, score

CPU = torch.device("cpu")
DIM, CLASSES, NUM = 12, 5, 90
NAMES = list("abcde")


class Recorded:
    """Features in memory; every batch that is read is noted."""

    def __init__(self, features, labels):
        self.features, self.labels, self.batches = features, labels, []

    def read(self, rows):
        self.batches.append(rows.copy())
        return self.features[rows]


@pytest.fixture
def problem():
    """Overlapping classes, so that a converged classifier is far from perfect."""
    generator = torch.Generator().manual_seed(1)
    centres = 0.7 * torch.randn(CLASSES, DIM, generator=generator)
    labels = torch.randint(CLASSES, (NUM,), generator=generator)
    return Recorded(centres[labels] + torch.randn(NUM, DIM, generator=generator), labels.numpy())


def make_heads(config, rates, steps_per_epoch=1):
    return LinearHeads(config, rates, DIM, CLASSES, steps_per_epoch, CPU)


def sweep(file, config, samples=None):
    batches = StoredBatches(file, np.arange(NUM) if samples is None else samples, config)
    heads = make_heads(config, config.peak_rates(), batches.num_steps)
    Trainer(heads, batches, [], config.epochs, EngineConfig(), CPU).train()
    return heads


def one_by_one(file, config, rate, weight):
    """PyTorch's own classifier and optimiser on the same batches."""
    features, labels = file.features, torch.from_numpy(file.labels)
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
    per_epoch = len(file.batches) // config.epochs
    for step, rows in enumerate(file.batches):
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
    heads = sweep(problem, config)
    weight = make_heads(config, [1.0]).weight[0]
    assert bool(weight.any()) == (config.init_std > 0)
    for number, rate in enumerate(config.peak_rates()):
        linear = one_by_one(problem, config, rate, weight)
        tolerance = {"atol": 1e-5 * linear.weight.abs().max().clamp_min(1).item(), "rtol": 0}
        torch.testing.assert_close(heads.weight[number], linear.weight, **tolerance)
        torch.testing.assert_close(heads.bias[number], linear.bias, **tolerance)
    assert (heads.weight[0] - heads.weight[9]).abs().max() > 0.1


@pytest.mark.parity
def test_a_converged_classifier_is_the_one_that_lbfgs_finds(problem):
    """With weight decay on weight and bias the optimum is unique."""
    decay = 0.02
    config = LinearConfig(
        epochs=1500, batch_size=NUM, lrs=[256 / NUM * 0.5], weight_decay=decay, holdout=0.0
    )
    heads = sweep(problem, config)
    features, labels = problem.features.double(), torch.from_numpy(problem.labels)
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
    torch.testing.assert_close(heads.weight[0].double(), weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(heads.bias[0].double(), bias, atol=1e-5, rtol=0)
    right = (features @ weight.T + bias).argmax(1) == labels
    (scores,) = score(heads, problem, NAMES, np.arange(NUM))
    assert 0.4 < scores.top1 < 0.95
    assert scores.top1 == pytest.approx(right.double().mean().item())


def test_every_epoch_takes_each_sample_once_in_an_order_of_its_own(problem):
    samples = np.arange(0, NUM, 2)

    def order(**options):
        problem.batches.clear()
        sweep(problem, LinearConfig(epochs=3, batch_size=16, **options), samples)
        assert [len(batch) for batch in problem.batches] == [16, 16, 13] * 3
        return np.concatenate(problem.batches).reshape(3, -1).tolist()

    epochs = order()
    assert [sorted(epoch) for epoch in epochs] == [samples.tolist()] * 3
    assert epochs[0] != epochs[1]
    assert order() == epochs != order(seed=1)


def test_epochs_go_round_the_passes(problem):
    problem.features = torch.cat([problem.features, problem.features + 1])
    sweep(problem, LinearConfig(epochs=3, batch_size=NUM, passes=2))
    rows = [(batch.min(), batch.max()) for batch in problem.batches]
    assert rows == [(0, NUM - 1), (NUM, 2 * NUM - 1), (0, NUM - 1)]


def test_a_step_counts_what_is_right_before_it(problem):
    heads = make_heads(LinearConfig(init_std=0.5), [0.1, 1])
    before = heads.logits(problem.features).detach()
    labels = torch.from_numpy(problem.labels)
    result = heads.step(FeatureBatch(problem.features, labels), Position())
    torch.testing.assert_close(result.loss, functional.cross_entropy(before[0].T, labels))
    assert heads.num_right[0].tolist() == [int((before[0].argmax(dim=0) == labels).sum())] * 2
    assert heads.num_seen[0] == NUM
    assert not torch.equal(heads.logits(problem.features), before)


class Given:
    """Stands for heads whose logits are known: the features are sample numbers."""

    def __init__(self, logits):
        self.weight, self._logits = torch.zeros(*logits.shape[:2], 1), logits

    def logits(self, features):
        return self._logits[:, :, features.long().squeeze(1)]


def scores_of(logits, labels, rows=None):
    """Scores of logits [heads, classes, n]."""
    file = Recorded(torch.arange(logits.shape[2]).float().view(-1, 1), labels.numpy())
    names = [str(i) for i in range(logits.shape[1])]
    return score(Given(logits), file, names, np.arange(len(labels)) if rows is None else rows), file


def test_scores_equal_topk_and_counts_by_class(monkeypatch):
    """In chunks of 7 samples, too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 200, generator=generator)
    labels = torch.randint(8, (200,), generator=generator)  # nothing of class 8
    rows = torch.arange(20, 200)
    scores, _ = scores_of(logits, labels, rows.numpy())
    for head, one in enumerate(scores):
        is_right = logits[head].topk(5, dim=0).indices[:, rows] == labels[rows]
        assert one.n == 180
        assert one.top1 == pytest.approx(is_right[0].double().mean().item())
        assert one.top5 == pytest.approx(is_right.any(0).double().mean().item())
        for number in range(8):
            share = is_right[0, labels[rows] == number].double().mean().item()
            assert one.per_class[str(number)] == pytest.approx(share)
        assert one.per_class["8"] is None
    monkeypatch.setattr(heads_module, "_MAX_LOGITS", 7 * 3 * 9)
    again, file = scores_of(logits, labels, rows.numpy())
    assert again == scores
    assert max(map(len, file.batches)) == 7


def test_equal_logits_do_not_make_a_classifier_right():
    """All classes equal: the first one is predicted, as argmax does."""
    (scores,), _ = scores_of(torch.zeros(1, 7, 7), torch.arange(7))
    assert (scores.top1, scores.top5) == (pytest.approx(1 / 7), pytest.approx(5 / 7))
    (scores,), _ = scores_of(torch.randn(1, 5, 4), torch.arange(4))
    assert scores.top5 is None  # there is none of five classes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_classifier_that_diverged_is_wrong(value):
    logits = torch.full((2, 7, 4), value)
    logits[1] = torch.eye(7)[:, :4]
    scores, _ = scores_of(logits, torch.arange(4))
    assert [one.top1 for one in scores] == [0.0, 1.0]


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
