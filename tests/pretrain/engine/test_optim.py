"""LARS against numpy, parameter groups, and schedules against their closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.config import ObjectiveConfig, OptimConfig
from pretrain.engine.optim import (
    LARS,
    ema_tau,
    lr_factor,
    lr_schedule,
    make_optimizer,
    parameter_groups,
    peak_lr,
)


def network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    return net.double()


def config(**values):
    return OptimConfig(**({"epochs": 10, "warmup_epochs": 0.0} | values))


def set_gradients(net, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


class NumpyLARS:
    """You et al. (2017), as BYOL's appendix describes it: 1-d parameters are plain SGD."""

    def __init__(self, net, lr, momentum, weight_decay, eta):
        self.w = [p.detach().numpy().copy() for p in net.parameters()]
        self.m = [np.zeros_like(w) for w in self.w]
        self.lr, self.momentum, self.weight_decay, self.eta = lr, momentum, weight_decay, eta

    def step(self, gradients):
        for i, g in enumerate(gradients):
            if self.w[i].ndim > 1:
                g = g + self.weight_decay * self.w[i]
                w_norm, g_norm = np.linalg.norm(self.w[i]), np.linalg.norm(g)
                if w_norm > 0 and g_norm > 0:
                    g = self.eta * w_norm / g_norm * g
            self.m[i] = self.momentum * self.m[i] + g
            self.w[i] = self.w[i] - self.lr * self.m[i]


@pytest.mark.parity
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("eta", [1e-3, 0.02])
def test_lars_equals_numpy_over_several_steps(weight_decay, momentum, eta):
    net = network()
    options = {"momentum": momentum, "weight_decay": weight_decay}
    reference = NumpyLARS(net, 0.5, eta=eta, **options)
    optimizer = make_optimizer(net, config(name="lars", lars_eta=eta, **options), lr=0.5)
    for step in range(6):
        set_gradients(net, step)
        if step == 3:  # the schedule's way of changing the rate
            reference.lr = 0.05
            for group in optimizer.param_groups:
                group["lr"] = 0.05
        reference.step([p.grad.numpy() for p in net.parameters()])
        optimizer.step()
        for ours, theirs in zip(net.parameters(), reference.w, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("zero", ["weight", "gradient", "both"])
def test_lars_does_not_scale_where_a_norm_is_zero(zero):
    net = nn.Linear(3, 2, bias=False).double()
    if zero != "gradient":
        net.weight.data.zero_()
    before = net.weight.detach().clone()
    gradient = torch.zeros(2, 3) if zero != "weight" else torch.ones(2, 3)
    net.weight.grad = gradient.double()
    optimizer = LARS(parameter_groups(net, 0.0), lr=0.1, momentum=0.9, weight_decay=0.0, eta=1e-3)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before - 0.1 * gradient)
    assert bool(torch.isfinite(net.weight).all())


def test_lars_skips_parameters_without_gradient():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    make_optimizer(net, config(name="lars"), lr=0.5).step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_lars_step_returns_the_closure_s_loss():
    net = network()
    set_gradients(net, 0)
    assert make_optimizer(net, config(name="lars"), lr=0.5).step(lambda: 3.5) == 3.5


def test_lars_state_goes_through_a_checkpoint():
    straight, stopped, resumed = network(), network(), network()
    optimizers = [make_optimizer(n, config(name="lars"), lr=0.5) for n in (straight, stopped)]
    for step in range(2):
        for net, optimizer in zip((straight, stopped), optimizers, strict=True):
            set_gradients(net, step)
            optimizer.step()
    resumed.load_state_dict(stopped.state_dict())
    second = make_optimizer(resumed, config(name="lars"), lr=0.5)
    second.load_state_dict(optimizers[1].state_dict())
    for net, optimizer in ((straight, optimizers[0]), (resumed, second)):
        set_gradients(net, 2)
        optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_biases_and_normalisation_layers_are_excluded_from_decay(name):
    net = network()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {k: v.clone() for k, v in net.named_parameters()}
    make_optimizer(net, config(name=name, weight_decay=0.5, lars_eta=1.0), lr=0.1).step()
    for key, value in net.named_parameters():
        decayed = value.ndim > 1
        assert torch.equal(value, before[key]) != decayed, key
        if decayed:
            assert bool(value.norm() < before[key].norm())


def test_groups_hold_every_trained_parameter_once():
    net = network()
    net[0].weight.requires_grad_(False)
    groups = parameter_groups(net, 0.3)
    listed = [p for group in groups for p in group["params"]]
    expected = [p for p in net.parameters() if p.requires_grad]
    assert {id(p) for p in listed} == {id(p) for p in expected}
    assert len(listed) == len(expected)
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert [g["adapt"] for g in groups] == [True, False]


@pytest.mark.parity
def test_sgd_equals_the_textbook():
    net = network()
    w = [p.detach().numpy().copy() for p in net.parameters()]
    m = [np.zeros_like(x) for x in w]
    optimizer = make_optimizer(net, config(name="sgd", momentum=0.8, weight_decay=0.1), lr=0.2)
    assert type(optimizer) is torch.optim.SGD
    for step in range(4):
        set_gradients(net, step)
        for i, parameter in enumerate(net.parameters()):
            decay = 0.1 if w[i].ndim > 1 else 0.0
            m[i] = 0.8 * m[i] + parameter.grad.numpy() + decay * w[i]
            w[i] = w[i] - 0.2 * m[i]
        optimizer.step()
    for ours, theirs in zip(net.parameters(), w, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10)


@pytest.mark.parity
def test_adamw_equals_the_textbook():
    """Loshchilov and Hutter: decoupled decay, betas 0.9 and 0.999, eps 1e-8."""
    net = network()
    w = [p.detach().numpy().copy() for p in net.parameters()]
    m, v = [np.zeros_like(x) for x in w], [np.zeros_like(x) for x in w]
    optimizer = make_optimizer(net, config(name="adamw", weight_decay=0.1), lr=0.01)
    assert type(optimizer) is torch.optim.AdamW
    for step in range(1, 5):
        set_gradients(net, step)
        for i, parameter in enumerate(net.parameters()):
            g = parameter.grad.numpy()
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            decay = 0.1 if w[i].ndim > 1 else 0.0
            w[i] = w[i] * (1 - 0.01 * decay)
            corrected = m[i] / (1 - 0.9**step), v[i] / (1 - 0.999**step)
            w[i] = w[i] - 0.01 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        optimizer.step()
    for ours, theirs in zip(net.parameters(), w, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-9)


def test_peak_rate_scales_with_the_global_batch():
    assert peak_lr(config(base_lr=0.3), 256) == pytest.approx(0.3)
    assert peak_lr(config(base_lr=0.3), 4096) == pytest.approx(4.8)
    assert peak_lr(config(base_lr=0.3), 64) == pytest.approx(0.075)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("epochs", "warmup"), [(100, 10.0), (10, 0.5), (7, 6.0), (5, 0.0), (3, 1e-3), (1, 0.0)]
)
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 100])
def test_rate_equals_the_closed_form(epochs, warmup, steps_per_epoch):
    schedule = lr_schedule(config(epochs=epochs, warmup_epochs=warmup))
    num_steps = epochs * steps_per_epoch
    for step in range(num_steps):
        epoch = (step + 0.5) / steps_per_epoch
        if epoch < warmup:
            expected = epoch / warmup
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        assert lr_factor(schedule, step, num_steps) == pytest.approx(expected, abs=1e-4), step
        assert lr_factor(schedule, step, num_steps) > 0


def test_rate_rises_through_warm_up_and_falls_after_it():
    schedule = lr_schedule(config(epochs=10, warmup_epochs=3.0))
    rates = [lr_factor(schedule, step, 1000) for step in range(1000)]
    assert rates[:300] == sorted(rates[:300])
    assert rates[300:] == sorted(rates[300:], reverse=True)
    assert max(rates) == pytest.approx(1.0, abs=2e-3)
    assert rates[-1] < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("tau_0", [0.0, 0.99, 0.996, 1.0])
def test_ema_tau_equals_the_closed_form(tau_0):
    objective = ObjectiveConfig(ema_tau=tau_0)
    for step in range(0, 1001, 10):
        expected = 1 - (1 - tau_0) * (math.cos(math.pi * step / 1000) + 1) / 2
        assert ema_tau(objective, step, 1000) == pytest.approx(expected, abs=1e-12)
    assert ema_tau(objective, 0, 1000) == pytest.approx(tau_0)
    assert ema_tau(objective, 1000, 1000) == 1.0
    values = [ema_tau(objective, step, 50) for step in range(51)]
    assert values == sorted(values)
