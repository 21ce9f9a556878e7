"""The online probe: a textbook classifier beside the run, of which the run never hears."""

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from common.errors import UserError
from pretrain import collectives as dist
from pretrain.config import EvalConfig, load_config
from pretrain.data.shards import ShardIndex, open_samples
from pretrain.engine import checkpoint
from pretrain.evaluation.probe import OnlineProbe
from pretrain.run import make_trainer
from tests.pretrain.engine.run_helpers import LIGHT, SMALL, assert_same_state, train_rows
from tests.ranks import assert_well, run_group

CPU = torch.device("cpu")
BASE = (
    SMALL
    | LIGHT
    | {
        "optim": SMALL["optim"] | {"base_lr": 1.0},
        "engine": SMALL["engine"] | {"log_every_steps": 2, "checkpoint_every_steps": 3},
        "eval": SMALL["eval"] | {"online_probe": True, "online_probe_lr": 0.01},
    }
)


@pytest.fixture
def run(tmp_path, shards):
    """Train a small run: run("name", "key=value", .., resume=False); returns it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(BASE))

    def train(name, *overrides, resume=False):
        options = [f"out={tmp_path / name}", *overrides]
        if not any(o.startswith("data.shards=") for o in options):
            options.append(f"data.shards={shards}")
        started = make_trainer(load_config(path, options), resume=resume)
        started.train()
        return started

    return train


def state_of(run):
    return checkpoint.load(run.task.folder / "checkpoint.pth")


class Backbone(nn.Module):
    """Its outputs are what it is given."""

    output_dim = 5

    def forward(self, x):
        return x * 1.0


def seen_by(probe, backbone, views):
    """Pass both views as training does, with graph."""
    for view in views:
        backbone(view.requires_grad_())


def softmax_gradient(weight, bias, x, labels):
    """Of the mean cross-entropy of x @ weight.T + bias, by hand in float64."""
    logits = x @ weight.T + bias
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = shifted / shifted.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(x)), labels]).mean()
    right = (logits.argmax(axis=1) == labels).mean()
    p[np.arange(len(x)), labels] -= 1
    return loss, right, p.T @ x / len(x), p.mean(axis=0)


@pytest.mark.parity
@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_steps_equal_the_textbook(lr):
    """Softmax regression with Adam in NumPy, unlabelled rows left out."""
    generator = torch.Generator().manual_seed(3)
    backbone = Backbone()
    probe = OnlineProbe(backbone, 3, lr, CPU)
    weight, bias = np.zeros((3, 5)), np.zeros(3)
    moments = [[np.zeros_like(w), np.zeros_like(w)] for w in (weight, bias)]
    for step in range(1, 6):
        views = torch.randn(2, 6, 5, generator=generator)
        labels = torch.tensor([0, 2, -1, 1, -1, step % 3])
        seen_by(probe, backbone, views.clone())
        probe.step(labels)
        known = labels.numpy() >= 0
        x = np.concatenate([view.numpy()[known] for view in views]).astype(np.float64)
        both = np.tile(labels.numpy()[known], 2)
        loss, right, *gradients = softmax_gradient(weight, bias, x, both)
        figures = probe.figures()
        assert figures["online_loss"] == pytest.approx(loss, rel=1e-5)
        assert figures["online_top1"] == pytest.approx(right)
        for value, gradient, (m, v) in zip((weight, bias), gradients, moments, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient**2 - v)
            corrected = m / (1 - 0.9**step), v / (1 - 0.999**step)
            value -= lr * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    np.testing.assert_allclose(probe.classifier.weight.detach().numpy(), weight, atol=1e-5)
    np.testing.assert_allclose(probe.classifier.bias.detach().numpy(), bias, atol=1e-5)


def test_only_the_last_passes_with_gradient_count():
    """Not those of an attack before them, of cached micro-batches' first pass, of small crops."""
    views, labels, states = torch.randn(2, 4, 5), torch.tensor([0, 1, 2, 0]), []
    for is_disturbed in (False, True):
        small = torch.randn(3, 4, 5) if is_disturbed else []
        backbone = Backbone()
        probe = OnlineProbe(backbone, 3, 0.1, CPU)
        if is_disturbed:
            backbone(torch.ones(9, 5))
        with torch.no_grad():
            backbone(torch.ones(7, 5))
        parts = (slice(0, 3), slice(3, 4)) if is_disturbed else (slice(0, 4),)
        for part in parts:  # micro-batches, the views in turn
            for view in [*views, *small]:
                backbone(view[part])
        probe.step(labels, 2 + len(small))
        states.append(probe.state_dict())
    assert_same_state(*states)


def test_rows_that_are_not_finite_are_left_out():
    views = torch.randn(2, 4, 5)
    labels = torch.tensor([0, 1, 2, 0])
    results = []
    for broken in (True, False):
        backbone = Backbone()
        probe = OnlineProbe(backbone, 3, 0.1, CPU)
        given = views.clone()
        given[:, 1] = float("nan") if broken else 0.0
        seen_by(probe, backbone, given)
        probe.step(labels if broken else torch.tensor([0, -1, 2, 0]))
        results.append((probe.state_dict(), probe.figures()))
    assert_same_state(*results)


def opened(samples):
    return OnlineProbe.open(EvalConfig(online_probe=True), samples, Backbone(), CPU)


def test_classes_are_those_of_the_shards(make_shards):
    three = make_shards("three", num=12, classes=["a", "b", "c"])
    assert opened(ShardIndex.open(three)).classifier.out_features == 3


def test_samples_without_labels_are_refused(unlabelled_shards, shards):
    message = r"eval\.online_probe=true, but no sample of data\.shards has a label .*make the shar"
    mixture = open_samples([str(unlabelled_shards), str(shards)])  # other classes: it has none
    for samples in (ShardIndex.open(unlabelled_shards), mixture):
        with pytest.raises(UserError, match=message):
            opened(samples)
    with pytest.raises(UserError, match=r"a stream does not tell its classes; use data\.streaming"):
        opened(None)


def test_weights_of_the_run_are_bit_equal_with_and_without_it(run):
    done = run("with")
    assert all({"online_top1", "online_loss"} <= set(row) for row in train_rows(done.task.folder))
    with_probe = state_of(done)
    without = state_of(run("without", "eval.online_probe=false"))
    assert "online_probe" in with_probe
    assert "online_probe" not in without
    for part in ("model", "ema", "optimizer", "queue", "random", "step"):
        assert_same_state(with_probe[part], without[part], part)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.micro_batch_size=4"],
        ["optim.micro_batch_size=4", "optim.accumulation=cached"],
        ["adversarial.epsilon=4"],
    ],
    ids=["plain", "cached", "adversarial"],
)
def test_it_sees_every_row_however_gradients_are_made(run, overrides):
    done = run("run", "optim.epochs=1", "engine.log_every_steps=5", *overrides)
    assert int(state_of(done)["online_probe"]["optimizer"]["state"][0]["step"]) == 5
    (row,) = train_rows(done.task.folder)
    assert 0 <= row["online_top1"] <= 1
    num_eighths = row["online_top1"] * 80  # 5 steps of 8 pictures in two views
    assert num_eighths == pytest.approx(round(num_eighths))


class Killed(Exception):
    """Ends a run as a kill would: without a word."""


def test_resume_is_bit_exact(run, monkeypatch):
    whole = run("whole")
    step = OnlineProbe.step
    taken = []

    def until(self, labels, num_views):
        taken.append(1)
        if len(taken) == 6:
            raise Killed
        step(self, labels, num_views)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineProbe, "step", until)
        with pytest.raises(Killed):
            run("parts")
    resumed = run("parts", resume=True)  # from step 3, between two logged rows
    a, b = state_of(whole), state_of(resumed)
    for part in ("model", "online_probe"):
        assert_same_state(a[part], b[part], part)
    for key in ("step", "loss", "online_top1", "online_loss"):
        one, two = ([r[key] for r in train_rows(run.task.folder)] for run in (whole, resumed))
        assert one == two


def test_the_state_of_a_checkpoint_fits_or_is_left():
    state = OnlineProbe(Backbone(), 3, 0.1, CPU).state_dict()
    fresh = OnlineProbe(Backbone(), 3, 0.5, CPU)
    assert fresh.load_state_dict(state) is None
    assert fresh.optimizer.param_groups[0]["lr"] == 0.5  # a changed rate holds
    assert "the checkpoint holds none: the classifier" in str(fresh.load_state_dict({}))
    other = OnlineProbe(Backbone(), 4, 0.1, CPU)
    assert "holds one of another size: the classifier starts anew" in str(
        other.load_state_dict(state)
    )


def four_steps(out):
    """One of the processes: each has its rows of the same batches."""
    dist.start("cpu")
    probe = OnlineProbe(backbone := Backbone(), 3, 0.1, CPU)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        views = torch.randn(2, 8, 5, generator=generator)
        labels = torch.tensor([-1, -1, -1, 0, 1, 2, 0, step % 3])
        own = dist.local_rows(8 // dist.world_size())
        seen_by(probe, backbone, views[:, own].clone())
        probe.step(labels[own])
    state = probe.state_dict()["online_probe"]
    torch.save(state, f"{out}-{dist.world_size()}-{dist.rank()}.pth")
    dist.stop()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path):
    """The ranks have 1 and 4 labelled rows of a view: a mean of means would differ."""
    out = str(tmp_path / "state")
    assert_well(run_group(four_steps, (out,)))
    four_steps(out)
    one, first, second = (
        torch.load(f"{out}-{name}.pth", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert_same_state(first, second)
    for name, value in one["classifier"].items():
        torch.testing.assert_close(first["classifier"][name], value, rtol=1e-4, atol=1e-6)
    assert one["counts"][0] == first["counts"][0] == 4 * 2 * 5
