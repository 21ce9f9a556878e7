"""Options that make steps faster or smaller: what each changes, and what it must not change."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from pretrain import collectives as dist
from pretrain.config import OptimConfig, load_config
from pretrain.data.augmentations.blur import blur_by_matrix
from pretrain.engine.optim import load_state, make_optimizer
from pretrain.features.memory_bank import consensus, top_k
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.model.joint_embedding import FAContrastive
from pretrain.run import make_model
from tests.pretrain.engine.run_helpers import SMALL, assert_same_state

BASE = SMALL | {"optim": SMALL["optim"] | {"name": "sgd"}}


def flags_of(optimizer):
    return {(group.get("fused"), group.get("foreach")) for group in optimizer.param_groups}


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


def take_steps(run, num_steps):
    """Losses of the first steps; the run stands after them."""
    losses = []
    for batch in run.batches.epoch(0):
        if run.position.step >= num_steps:
            break
        losses.append(float(run.step(batch).loss))
    return losses


ACCUMULATION = {
    "whole": [],
    "cached": ["optim.micro_batch_size=4", "optim.accumulation=cached"],
    "bf16": ["engine.precision=bf16"],
    "resnet50": ["arch.depth=50", "arch.res2_channels=32"],
    "synchronised": ["engine.batch_norm=synchronised"],
}
ACCUMULATION["cached maps"] = [
    *ACCUMULATION["cached"], "objective.name=masked_prediction", "fa.method=mask",
    "fa.stop_gradient=false", "data.image_size=33",
]  # fmt: skip


@pytest.mark.parametrize("case", ["cached", "bf16", "resnet50", "synchronised"])
def test_checkpointed_run_equals_the_plain_one(make_run, case):
    """Losses, weights, gradients and BN statistics of two steps, bit for bit."""
    options = [*ACCUMULATION[case], "eval.online_probe=true"]
    plain = make_run(*options, name="plain")
    thrifty = make_run(*options, "engine.activation_checkpointing=true", name="thrifty")
    assert take_steps(plain, 2) == take_steps(thrifty, 2)
    one, two = plain.state_dict(), thrifty.state_dict()
    for part in ("model", "ema", "optimizer", "queue", "online_probe"):
        assert_same_state(one[part], two[part], part)
    gradients = [
        {n: p.grad for n, p in run.task.model.online.named_parameters()} for run in (plain, thrifty)
    ]
    assert_same_state(*gradients)
    num_views = 2 * (2 if case == "cached" else 1)
    assert one["model"]["backbone.layer4.0.bn1.num_batches_tracked"] == 2 * num_views


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
    arch = ResNetBackbone(depth=50, width_per_group=8, stem_channels=8, res2_channels=32)
    backbone, views = (
        make_model("byol", method="none", arch=arch).online.backbone,
        make_views(4, 64),
    )
    whole = kept_bytes(backbone, views)
    backbone.checkpoints_stages = True
    assert kept_bytes(backbone, views) < 0.4 * whole


def norms_of(module):
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    return [type(m) for m in module.modules() if isinstance(m, kinds)]


def test_batch_norm_of_the_config_is_built(make_run):
    """In one process synchronised is the same: names, random numbers, and every bit."""
    plain = make_run(name="plain")
    synchronised = make_run("engine.batch_norm=synchronised", name="synchronised")
    for network in ("online", "ema"):
        one, two = (norms_of(getattr(run.task.model, network)) for run in (plain, synchronised))
        assert nn.SyncBatchNorm not in one
        assert set(two) == {nn.SyncBatchNorm}
        assert len(one) == len(two) == (22 if network == "online" else 21)
    assert take_steps(plain, 3) == take_steps(synchronised, 3)
    one, two = plain.state_dict(), synchronised.state_dict()
    for part in ("model", "ema", "optimizer"):
        assert_same_state(one[part], two[part], part)


def test_synchronised_batch_norm_of_several_processes_on_a_cpu_is_refused(make_run, monkeypatch):
    monkeypatch.setattr(dist, "is_on", lambda: True)
    monkeypatch.setattr(dist, "wait", lambda: None)
    with pytest.raises(UserError, match=r"synchronised: torch has it for GPUs only; .*per_process"):
        make_run("engine.batch_norm=synchronised")


def test_one_picture_per_process_is_refused(make_run, monkeypatch):
    """BN's own message would be a traceback in the first step. A batch of the file is 8."""
    monkeypatch.setattr(dist, "world_size", lambda: 8)
    with pytest.raises(
        UserError, match=r"data\.batch_size 8: .* in each of 8 processes; choose 16"
    ):
        make_run()


@pytest.mark.parametrize("value", [True, False])
def test_tf32_and_fused_of_the_config_are_settings_of_gpus(config_file, monkeypatch, value):
    """The model stays on the CPU; only the settings of the process are looked at."""
    monkeypatch.setattr(FAContrastive, "to", lambda self, *_, **__: self)
    for device, tf32 in (("cuda", value), ("cpu", not value)):
        config = load_config(config_file, [f"engine.tf32={str(tf32).lower()}"])
        _, optimizer = make_model(config, torch.device(device))
        assert torch.get_float32_matmul_precision() == ("high" if value else "highest")
        assert torch.backends.cudnn.allow_tf32 is value
        assert flags_of(optimizer) == {(True if device == "cuda" else None, None)}


@pytest.mark.parametrize("work", ["top_k", "consensus", "blur"])
def test_neighbours_and_blurs_are_exact_products(work):
    torch.set_float32_matmul_precision("high")
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().partition(".")[0] in ("aten::mm", "aten::bmm"):
                seen.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    z, bank = torch.randn(6, 5), torch.randn(40, 5)
    with Products():
        if work == "top_k":
            top_k(z, bank, 3)
        elif work == "consensus":
            consensus(bank.view(4, 10, 5), z[:4])
        else:
            blur_by_matrix(torch.rand(2, 3, 8, 8), torch.tensor([0.5, 1.0]), 3)
    assert seen
    assert set(seen) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile without code generation; the list grows with each call of a graph."""
    calls, compile_ = [], torch.compile

    def backend(graph, _):
        def counted(*inputs):
            calls.append(torch.is_grad_enabled())
            return graph(*inputs)

        return counted

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, backend=backend, **options)
    )
    torch._dynamo.reset()
    return calls


@pytest.mark.parametrize("case", [pytest.param("whole", marks=pytest.mark.slow), "cached maps"])
def test_compiled_backbone_is_called_in_training_only(make_run, quick_compiler, case):
    """Same numbers and names; as many graphs as views pass, with and without gradient."""
    options = [*ACCUMULATION[case], "eval.online_probe=true", "arch={name: two_layers}"]
    plain = make_run(*options, name="plain")
    compiled = make_run(*options, "engine.compile=true", name="compiled")
    expected = take_steps(plain, 2)
    assert quick_compiler == []
    assert take_steps(compiled, 2) == expected
    passes = [False] * 8 + [True] * 4 if case != "whole" else [False] * 2 + [True] * 2
    assert sorted(quick_compiler) == sorted(2 * passes)
    num_calls = len(quick_compiler)
    images = torch.randn(3, 3, 40, 40)
    backbones = [run.task.model.online.backbone.eval() for run in (plain, compiled)]
    assert torch.equal(backbones[0](images), backbones[1](images))
    assert len(quick_compiler) == num_calls
    one, two = plain.state_dict(), compiled.state_dict()
    for part in ("model", "ema", "optimizer", "queue", "online_probe"):
        assert_same_state(one[part], two[part], part)


def test_a_compiler_that_fails_is_told_in_one_line(make_run, monkeypatch):
    compile_ = torch.compile

    def backend(graph, inputs):
        raise FileNotFoundError("no C++ compiler\nand more")

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, backend=backend, **options)
    )
    torch._dynamo.reset()
    run = make_run("engine.compile=true", "arch={name: two_layers}")
    with pytest.raises(
        UserError, match=r"engine\.compile=true: torch\.compile failed .*C\+\+.*false"
    ):
        take_steps(run, 1)


@pytest.mark.slow
def test_two_steps_compiled_for_real_equal_those_that_are_not(make_run):
    torch._dynamo.reset()
    # At this rate rounding does not grow; a ResNet takes a minute to compile.
    options = ["optim.base_lr=0.001", "arch={name: two_layers}"]
    plain = make_run(*options, name="plain")
    compiled = make_run(*options, "engine.compile=true", name="compiled")
    assert take_steps(compiled, 2) == pytest.approx(take_steps(plain, 2), abs=1e-4)
    ours, expected = (run.task.model.online.state_dict() for run in (compiled, plain))
    assert list(ours) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3, msg=name)


ON_GPU = {
    "defaults": [],
    "fused adamw": ["optim.name=adamw"],
    "lars": ["optim.name=lars"],
    "bf16": ["engine.precision=bf16"],
    "fp16": ["engine.precision=fp16"],
    "checkpointing": ["engine.activation_checkpointing=true"],
    "compile": ["engine.compile=true"],
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("_products_as_before")
@pytest.mark.parametrize("case", ON_GPU)
def test_options_on_a_gpu_agree_with_exact_fp32(make_run, case):
    """At a rate so low that the first steps are about the same."""
    common = ["engine.device=cuda", "optim.base_lr=0.001"]
    exact = make_run(*common, "engine.tf32=false", name="exact")
    expected = take_steps(exact, 3)
    quick = make_run(*common, *ON_GPU[case], name="quick")
    assert take_steps(quick, 3) == pytest.approx(expected, abs=0.06)
    if "adamw" in case:
        assert flags_of(quick.optimizer) == {(True, None)}


def test_every_process_goes_on_with_the_first_ones_draws_on_its_own_gpu(make_run, monkeypatch):
    """All draw alike, and the first process writes the checkpoint."""
    states, first = {0: torch.tensor([7]), 1: torch.tensor([0])}, make_run()
    for run, number in ((first, 0), (make_run(name="second"), 1)):
        run._is_cuda, run.device = True, number
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: states.update({at: state}))
    run.load_state_dict(first.state_dict())
    assert states == {0: torch.tensor([7]), 1: torch.tensor([7])}
