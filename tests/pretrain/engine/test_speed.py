"""Options that make steps faster or smaller: what each changes, and what it must not change."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import EngineConfig, OptimConfig, load_config
from pretrain.engine import dist, speed
from pretrain.engine.device import uses_fused
from pretrain.engine.optim import load_state, make_optimizer
from pretrain.engine.train import Run
from pretrain.errors import UserError
from pretrain.eval.knn import nearest_rows
from pretrain.models.neighbour_search import consensus, top_k
from tests.pretrain.engine.run_helpers import assert_same_state

BASE = {
    "arch": {"depth": 18, "width_per_group": 8, "stem_channels": 8, "res2_channels": 8},
    "data": {"image_size": 32, "batch_size": 8, "num_workers": 0},
    "heads": {"projector_hidden_dim": 24, "predictor_hidden_dim": 24, "output_dim": 12},
    "objective": {"name": "byol"},
    "fa": {"method": "nn", "queue_size": 32, "min_fill": 16},
    "optim": {"name": "sgd", "epochs": 2, "base_lr": 0.05, "warmup_epochs": 0.5},
    "engine": {
        "device": "cpu", "precision": "fp32", "log_every_steps": 1, "checkpoint_every_steps": 100,
        "num_threads": 1,
    },
    "eval": {"num_pictures": 0, "knn_k": 5},
}  # fmt: skip


@pytest.fixture
def make_run(config_file, shards, tmp_path):
    """Build a `Run` without training: make_run("key=value", .., name="run")."""

    def make(*overrides, name="run"):
        options = [f"out={tmp_path / name}", f"data.shards={shards}", *overrides]
        return Run(load_config(config_file, options), resume=False)

    return make


# --- fused optimisers


def flags_of(optimizer):
    return {(group.get("fused"), group.get("foreach")) for group in optimizer.param_groups}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_optimizer_of_the_config_decides(make_run, name):
    flags = {}
    for value in ("auto", "true", "false"):
        run = make_run(f"engine.fused_optimizer={value}", f"optim.name={name}", name=value)
        flags[value] = flags_of(run.optimizer)
    assert flags == {"auto": {(None, None)}, "true": {(True, None)}, "false": {(None, None)}}


@pytest.mark.parametrize(("wanted", "on_gpu"), [("auto", True), (True, True), (False, False)])
def test_auto_is_fused_on_a_gpu(wanted, on_gpu):
    assert uses_fused(wanted, torch.device("cuda")) is on_gpu
    assert uses_fused(wanted, torch.device("cpu")) is (wanted is True)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("was_fused", [False, True])
def test_fused_goes_on_where_unfused_stopped_and_the_other_way_round(name, was_fused):
    """The state fits, the choice is the new run's, and the numbers agree but for rounding."""

    def build(is_fused):
        torch.manual_seed(0)
        net = nn.ModuleDict({"backbone": nn.Linear(6, 5), "projector": nn.Linear(5, 4)})
        settings = OptimConfig(name=name, epochs=20, weight_decay=0.1)
        return net, make_optimizer(net, settings, 0.02, is_fused=is_fused)

    def steps(net, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    (first, before), (second, after), (whole, straight) = (
        build(was_fused), build(not was_fused), build(False)
    )  # fmt: skip
    steps(first, before, range(3))
    second.load_state_dict(first.state_dict())
    load_state(after, before.state_dict())
    assert flags_of(after) == {(None if was_fused else True, None)}
    assert flags_of(before) == {(True if was_fused else None, None)}
    steps(second, after, range(3, 6))
    steps(whole, straight, range(6))
    for ours, expected in zip(second.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


# --- activation checkpointing


def take_steps(run, num_steps):
    """Losses of the first steps; the run stands after them."""
    losses = []
    for fed in run.feed.epoch(0):
        if run.position.step >= num_steps:
            break
        losses.append(float(run._step(fed, is_logged=False).output.loss.detach()))
        run.position.step += 1
    return losses


ACCUMULATION = {
    "whole": [],
    "plain": ["optim.micro_batch_size=4"],
    "cached": ["optim.micro_batch_size=4", "optim.accumulation=cached"],
    "bf16": ["engine.precision=bf16"],
    "resnet50": ["arch.depth=50", "arch.res2_channels=32"],
}


@pytest.mark.parametrize("case", ACCUMULATION)
def test_checkpointed_run_equals_the_plain_one(make_run, case):
    """Losses, weights, gradients and BN statistics of three steps, bit for bit."""
    options = [*ACCUMULATION[case], "eval.online_probe=true"]
    plain = make_run(*options, name="plain")
    thrifty = make_run(*options, "engine.activation_checkpointing=true", name="thrifty")
    assert take_steps(plain, 3) == take_steps(thrifty, 3)
    one, two = plain._state(), thrifty._state()
    for part in ("model", "ema", "optimizer", "queue", "online_probe"):
        assert_same_state(one[part], two[part], part)
    gradients = [
        {n: p.grad for n, p in run.model.online.named_parameters()} for run in (plain, thrifty)
    ]
    assert_same_state(*gradients)
    num_views = 2 * (2 if case in ("plain", "cached") else 1)
    assert one["model"]["backbone.layer4.0.bn1.num_batches_tracked"] == 3 * num_views


def kept_bytes(network, views):
    """Bytes that the forward pass keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = [network(view) for view in views]
    del outputs
    return sum(kept.values())


def test_checkpointed_stages_keep_a_small_part_of_the_memory(make_model, make_views):
    """Of a ResNet-50: the inputs of the four stages, and the stem."""
    backbone, views = make_model("byol", method="none").online.backbone, make_views(4, 64)
    whole = kept_bytes(backbone, views)
    backbone.checkpoints_stages = True
    assert kept_bytes(backbone, views) < 0.4 * whole


def test_checkpointing_is_off_without_gradient_and_leaves_evaluation_alone(make_model, make_views):
    backbone, views = make_model("byol", method="none").online.backbone, make_views(4, 32)
    backbone(views[0])
    backbone.eval()
    expected = backbone(views[0])
    expected.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in backbone.named_parameters()}
    backbone.zero_grad()
    backbone.checkpoints_stages = True
    output = backbone(views[0])
    output.square().sum().backward()
    assert torch.equal(output, expected)
    assert_same_state({n: p.grad for n, p in backbone.named_parameters()}, wanted)
    with torch.no_grad():
        assert torch.equal(backbone(views[0]), expected)
    assert {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


# --- batch norm


def norms_of(module):
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    return [type(m) for m in module.modules() if isinstance(m, kinds)]


def test_batch_norm_of_the_config_is_built(make_run):
    """In one process synchronised is the same: names, random numbers, and every bit."""
    plain = make_run(name="plain")
    synchronised = make_run("engine.batch_norm=synchronised", name="synchronised")
    for network in ("online", "ema"):
        one, two = (norms_of(getattr(run.model, network)) for run in (plain, synchronised))
        assert nn.SyncBatchNorm not in one
        assert set(two) == {nn.SyncBatchNorm}
        assert len(one) == len(two) == (22 if network == "online" else 21)
    assert take_steps(plain, 3) == take_steps(synchronised, 3)
    one, two = plain._state(), synchronised._state()
    for part in ("model", "ema", "optimizer"):
        assert_same_state(one[part], two[part], part)


def test_synchronised_batch_norm_of_several_processes_on_a_cpu_is_refused(make_run, monkeypatch):
    monkeypatch.setattr(dist, "is_on", lambda: True)
    with pytest.raises(UserError, match=r"synchronised: torch has it for GPUs only; .*per_process"):
        make_run("engine.batch_norm=synchronised")


# --- TF32


@pytest.fixture
def _products_as_before():
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


@pytest.mark.usefixtures("_products_as_before")
@pytest.mark.parametrize("value", [True, False])
def test_tf32_of_the_config_is_a_setting_of_gpus(make_model, monkeypatch, value):
    """The model stays on the CPU; only the settings of the process are looked at."""
    model = make_model("byol", method="none")
    monkeypatch.setattr(model, "to", lambda *_, **__: model)
    speed.prepare(model, EngineConfig(tf32=value), torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == ("high" if value else "highest")
    assert torch.backends.cudnn.allow_tf32 is value
    speed.prepare(model, EngineConfig(tf32=not value), torch.device("cpu"))
    assert torch.backends.cudnn.allow_tf32 is value


@pytest.mark.usefixtures("_products_as_before")
@pytest.mark.parametrize("search", ["top_k", "consensus", "knn"])
def test_neighbours_are_searched_in_exact_products(monkeypatch, search):
    torch.set_float32_matmul_precision("high")
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().partition(".")[0] in ("aten::mm", "aten::bmm"):
                seen.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    z, bank = torch.randn(6, 5), torch.randn(40, 5)
    with Products():
        if search == "top_k":
            top_k(z, bank, 3)
        elif search == "consensus":
            consensus(bank.view(4, 10, 5), z[:4])
        else:
            nearest_rows(bank, z, 3)
    assert seen
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"
