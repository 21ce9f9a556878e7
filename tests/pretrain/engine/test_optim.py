"""LARS against numpy, parameter groups, and schedules against their closed forms."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.config import OptimConfig
from pretrain.engine.optim import (
    LARS,
    lr_factor,
    make_optimizer,
    parameter_groups,
    peak_lr,
    set_lr,
    state_bytes,
)
from tests.pretrain.engine.sync_counter import counted_syncs


def network():
    """The three parts by their names, [4, 3, 3, 3] + BN, [2, 4] and [2, 2]."""
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    parts = {"backbone": backbone, "projector": nn.Linear(4, 2), "predictor": nn.Linear(2, 2)}
    return nn.Sequential(OrderedDict(parts)).double()


def config(**values):
    return OptimConfig(**({"epochs": 10, "warmup_epochs": 0.0} | values))


def set_gradients(net, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


class NumpyLARS:
    """You et al. (2017), as BYOL's appendix describes it: 1-d parameters are plain SGD.

    With ``clip`` (LARC) the layer's rate eta |w| / |g| is at most the scheduled one. With ``norm``
    "separate" as solo-learn's solo/utils/lars.py (commit 9187ea3): the gradient's own norm, that of
    the decay beside it, and neither scale nor decay where one of the norms is 0.
    """

    def __init__(self, net, lr, momentum, weight_decay, eta, clip=False, norm="joint"):
        self.w = [p.detach().numpy().copy() for p in net.parameters()]
        self.m = [np.zeros_like(w) for w in self.w]
        self.lr, self.momentum, self.weight_decay, self.eta = lr, momentum, weight_decay, eta
        self.clip, self.num_clipped, self.num_free, self.norm = clip, 0, 0, norm

    def step(self, gradients):
        for i, g in enumerate(gradients):
            if self.w[i].ndim > 1:
                decayed = g + self.weight_decay * self.w[i]
                w_norm, g_norm = np.linalg.norm(self.w[i]), np.linalg.norm(decayed)
                norm = g_norm
                if self.norm == "separate":
                    g_norm = np.linalg.norm(g)
                    norm = g_norm + self.weight_decay * w_norm + 1e-8
                if self.norm == "joint" or (w_norm > 0 and g_norm > 0):
                    g = decayed
                if w_norm > 0 and g_norm > 0:
                    ratio = self.eta * w_norm / norm
                    if self.clip:
                        self.num_clipped += ratio > self.lr
                        self.num_free += ratio < self.lr
                        ratio = min(ratio, self.lr) / self.lr
                    g = ratio * g
            self.m[i] = self.momentum * self.m[i] + g
            self.w[i] = self.w[i] - self.lr * self.m[i]


@pytest.mark.parity
@pytest.mark.parametrize("norm", ["joint", "separate"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("weight_decay", "momentum", "eta"), [(0.0, 0.9, 1e-3), (0.1, 0.8, 0.02)])
def test_lars_equals_numpy_over_several_steps(monkeypatch, weight_decay, momentum, eta, clip, norm):
    """The rate falls from above to below the layers' own rates, so that clipping does and not.

    One step has no gradient in the projector, whose decay then counts in one of the forms only. One
    of the forms takes all layers together, as on a GPU.
    """
    if norm == "separate":
        monkeypatch.setattr(LARS, "step", step_as_on_a_gpu)
    net = network()
    options = {"momentum": momentum, "weight_decay": weight_decay}
    reference = NumpyLARS(net, 0.5, eta=eta, clip=clip, norm=norm, **options)
    settings = config(name="lars", lars_eta=eta, lars_clip=clip, lars_norm=norm, **options)
    optimizer = make_optimizer(net, settings, lr=0.5)
    for step, lr in enumerate((0.5, 0.05, 0.01, 0.005, 1e-4, 1e-5)):
        reference.lr = lr
        set_lr(optimizer, peak=lr, factor=1.0)
        set_gradients(net, step)
        net.get_parameter("projector.weight").grad.mul_(step != 1)
        reference.step([p.grad.numpy() for p in net.parameters()])
        optimizer.step()
        for ours, theirs in zip(net.parameters(), reference.w, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-14)
    assert (reference.num_clipped > 0, reference.num_free > 0) == (clip, clip)


def layer_by_layer(w, m, g, group):
    """LARS of one layer with operations on single tensors; returns w and m after the step."""
    g = g.add(w, alpha=group["weight_decay"])
    if group["adapt"]:
        w_norm, g_norm = w.norm(), g.norm()
        scaled = group["eta"] * w_norm / g_norm
        if group["clip"]:
            scaled = torch.clamp(scaled / group["lr"], max=1)
        g = g * torch.where((w_norm > 0) & (g_norm > 0), scaled, torch.ones_like(scaled))
    m = m.mul(group["momentum"]).add(g)
    return w.add(m, alpha=-group["lr"]), m


@torch.no_grad()
def step_as_on_a_gpu(optimizer):
    """All layers of a group together; a CPU takes one after the other."""
    for group in optimizer.param_groups:
        optimizer._update([w for w in group["params"] if w.grad is not None], group)


@pytest.mark.parity
@pytest.mark.parametrize("where", ["layers in turn", "all at once"])
@pytest.mark.parametrize(("clip", "weight_decay"), [(False, 0.0), (True, 0.1)])
def test_lars_in_fp32_equals_single_tensors_bit_for_bit(monkeypatch, weight_decay, clip, where):
    """The foreach operations, as a CPU takes them and as a GPU does; gradients stay as they are."""
    if where == "all at once":
        monkeypatch.setattr(LARS, "step", step_as_on_a_gpu)
    net = network().float()
    settings = config(weight_decay=weight_decay, lars_eta=0.02, lars_clip=clip)
    optimizer = make_optimizer(net, settings, lr=0.03)
    expected = {n: (p.detach().clone(), torch.zeros_like(p)) for n, p in net.named_parameters()}
    for step in range(5):
        set_lr(optimizer, peak=0.03, factor=1 / (step + 1))
        for p in net.parameters():
            p.grad = torch.randn(p.shape)
        net.get_parameter("projector.weight").grad.mul_(step != 1)
        gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
        for group in optimizer.param_groups:
            for name in names_of(net, group):
                expected[name] = layer_by_layer(*expected[name], gradients[name], group)
        optimizer.step()
        for name, p in net.named_parameters():
            assert torch.equal(p.detach(), expected[name][0]), (step, name)
            assert torch.equal(p.grad, gradients[name]), (step, name)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_a_step_reads_no_value_to_the_host(monkeypatch, name):
    monkeypatch.setattr(LARS, "step", step_as_on_a_gpu)
    net = network()
    settings = config(name=name, lars_clip=True, lars_norm="separate")
    optimizer = make_optimizer(net, settings, lr=0.5)
    set_gradients(net, 0)
    with counted_syncs() as counter:
        optimizer.step()
        optimizer.step()
    assert counter.places == []


@pytest.mark.parametrize(("zero", "clip"), [("weight", False), ("gradient", True), ("both", False)])
def test_lars_does_not_scale_where_a_norm_is_zero(zero, clip):
    net = nn.Linear(3, 2, bias=False).double()
    if zero != "gradient":
        net.weight.data.zero_()
    before = net.weight.detach().clone()
    gradient = torch.zeros(2, 3) if zero != "weight" else torch.ones(2, 3)
    net.weight.grad = gradient.double()
    groups = [{"params": [net.weight]}]
    LARS(groups, lr=0.1, momentum=0.9, weight_decay=0.0, eta=1e-3, clip=clip).step()
    torch.testing.assert_close(net.weight.detach(), before - 0.1 * gradient)
    assert bool(torch.isfinite(net.weight).all())


def names_of(net, group):
    """Which parameters a group holds."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_groups_hold_every_trained_parameter_once():
    net = network()
    net.get_parameter("backbone.0.weight").requires_grad_(False)
    groups = parameter_groups(net, config(weight_decay=0.3))
    listed = [p for group in groups for p in group["params"]]
    expected = [p for p in net.parameters() if p.requires_grad]
    assert {id(p) for p in listed} == {id(p) for p in expected}
    assert len(listed) == len(expected)
    assert [names_of(net, g) for g in groups] == [
        {"projector.weight"}, {"predictor.weight"},
        {"backbone.0.bias", "backbone.1.weight", "backbone.1.bias"},
        {"projector.bias"}, {"predictor.bias"},
    ]  # fmt: skip
    assert [g["weight_decay"] for g in groups] == [0.3, 0.3, 0.0, 0.0, 0.0]
    assert [g["adapt"] for g in groups] == [True, True, False, False, False]
    assert all(g["follows_schedule"] for g in groups)


def test_head_weight_decay_reaches_the_heads_only():
    decays = {}
    for value in (None, 0.5, 0.0):
        net = network()
        groups = parameter_groups(net, config(weight_decay=0.3, head_weight_decay=value))
        decays[value] = {n: g["weight_decay"] for g in groups for n in names_of(net, g)}
    names = ("backbone.0.weight", "projector.weight", "predictor.weight")
    assert [decays[None][n] for n in names] == [0.3, 0.3, 0.3]
    assert [decays[0.5][n] for n in names] == [0.3, 0.5, 0.5]
    assert [decays[0.0][n] for n in names] == [0.3, 0.0, 0.0]
    assert decays[0.5]["projector.bias"] == 0.0


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_biases_and_normalisation_layers_may_be_treated_like_weights(name):
    net = network()
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    options = {"exclude_bias_and_norm": False, "weight_decay": 0.5, "lars_eta": 1.0}
    make_optimizer(net, config(name=name, **options), lr=0.1).step()
    assert all(bool((p < 1).all()) for p in net.parameters())
    assert all(g["adapt"] for g in parameter_groups(net, config(**options)))


@pytest.mark.parametrize(("name", "constant"), [("lars", False), ("sgd", True), ("adamw", True)])
def test_predictor_constant_lr_over_a_schedule(name, constant):
    net = network()
    settings = config(name=name, warmup_epochs=2.0, predictor_constant_lr=constant)
    optimizer = make_optimizer(net, settings, lr=0.4)
    for step in range(20):
        factor = lr_factor(settings, step, 20)
        assert set_lr(optimizer, 0.4, factor) == 0.4 * factor
        rates = {n: g["lr"] for g in optimizer.param_groups for n in names_of(net, g)}
        for key, rate in rates.items():
            is_constant = constant and key.startswith("predictor.")
            assert rate == (0.4 if is_constant else 0.4 * factor), key


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)],
)
def test_torch_s_optimisers_have_the_settings_of_the_config(name, kind):
    """Decay of weights alone; momentum, or AdamW's published betas and eps."""
    net = network()
    optimizer = make_optimizer(net, config(name=name, momentum=0.8, weight_decay=0.1), lr=0.2)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)
        assert group["lr"] == 0.2
        if name == "sgd":
            assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.8, 0, False)
        else:
            assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)


def test_peak_rate_scales_with_the_global_batch():
    assert peak_lr(config(base_lr=0.3), 256) == pytest.approx(0.3)
    assert peak_lr(config(base_lr=0.3), 4096) == pytest.approx(4.8)
    assert peak_lr(config(base_lr=0.3), 64) == pytest.approx(0.075)


@pytest.mark.parity
@pytest.mark.parametrize(("epochs", "warmup"), [(100, 10.0), (10, 0.5), (7, 6.0), (5, 0.0)])
@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_rate_equals_the_closed_form(epochs, warmup, steps_per_epoch):
    settings = config(epochs=epochs, warmup_epochs=warmup)
    num_steps = epochs * steps_per_epoch
    for step in range(num_steps):
        epoch = (step + 0.5) / steps_per_epoch
        if epoch < warmup:
            expected = epoch / warmup
        else:
            expected = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        assert lr_factor(settings, step, num_steps) == pytest.approx(expected, abs=1e-4), step
        assert lr_factor(settings, step, num_steps) > 0


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_bytes_of_the_momenta_are_known_before_the_first_step(name):
    net = network()
    optimizer = make_optimizer(net, config(name=name), lr=0.1)
    expected = state_bytes(optimizer)
    set_gradients(net, 0)
    optimizer.step()
    kept = [value for own in optimizer.state.values() for value in own.values()]
    assert expected == sum(value.nbytes for value in kept if value.ndim)
