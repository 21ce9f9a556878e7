"""The step benchmark: all arms are one step, and the keys of its JSON."""

import copy
import json

import pytest
import torch

from benchmarks import harness, train_step
from benchmarks.harness import Sizes
from benchmarks.train_step import RECIPES
from pretrain.engine.profiling import count_flops

SIZES = Sizes(
    depth=18, width=4, image_size=32, batch_size=4, queue_size=64, dim=8, hidden_dim=8
)  # fmt: skip
TINY = [
    "--device", "cpu", "--width", "4", "--image-size", "32", "--batch-size", "4",
    "--queue-size", "64", "--dim", "8", "--hidden-dim", "8", "--rounds", "2", "--workers", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded_in_one_thread(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else a run takes as many threads as cores are free


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("shards")
    harness.open_as_shards(harness.encoded_photos(1), place, 2 * SIZES.batch_size).close()
    return place


@pytest.fixture
def arms(folder):
    run = train_step.build_run(folder, SIZES, "cpu", 0, ["engine.precision=fp32"])
    return train_step.make_arms(run, train_step.random_views(SIZES, run.device))


def test_all_arms_have_one_loss_and_one_gradient(arms):
    losses = train_step.check_same_loss(arms)
    assert set(losses) == {"ours", "eager", "solo-learn-like", "lightly-like"}
    gradients = {}
    for name, arm in arms.items():
        arm.loss().backward()
        gradients[name] = {n: p.grad for n, p in arm.networks()[0].named_parameters()}
    wanted = gradients["ours"]
    for name, found in gradients.items():
        assert found.keys() == wanted.keys()
        for key, gradient in found.items():
            error = float((gradient - wanted[key]).norm() / wanted[key].norm().clamp_min(1e-3))
            assert error < 1e-2, f"{name}: {key}"


def test_the_check_leaves_bn_as_it_was_and_refuses_another_loss(arms):
    before = [copy.deepcopy(arm.networks()[0].state_dict()) for arm in arms.values()]
    train_step.check_same_loss(arms)
    for state, arm in zip(before, arms.values(), strict=True):
        for key, value in arm.networks()[0].state_dict().items():
            assert torch.equal(value, state[key]), key
    with torch.no_grad():
        arms["lightly-like"].networks()[0].predictor[0].weight.mul_(2).add_(0.1)
    with pytest.raises(RuntimeError, match=r"lightly-like has loss .*, ours is .*: not one step"):
        train_step.check_same_loss(arms)


@pytest.mark.parametrize("name", RECIPES)
def test_a_rival_trains_and_moves_its_target(arms, name):
    """EMA first leaves the target behind the weights as they were before the step."""
    rival = arms[name]
    online, target = rival.networks()
    before = [p.detach().clone() for p in online.backbone.parameters()]
    standing = [p.detach().clone() for p in target.backbone.parameters()]
    rival.steps(1)
    after = list(online.backbone.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    source = before if rival.recipe.is_ema_first else [p.detach() for p in after]
    for old, new, came in zip(standing, target.backbone.parameters(), source, strict=True):
        torch.testing.assert_close(new, train_step.TAU * old + (1 - train_step.TAU) * came)
    first = float(rival.loss().detach())
    rival.steps(8)
    assert float(rival.loss().detach()) < first


def test_the_convolutions_alone_are_those_of_a_step(arms):
    alone = train_step.Convolutions(arms["ours"])
    kinds = [call.func.overloadpacket for call in alone.calls]
    assert kinds.count(torch.ops.aten.convolution) == 4 * 20  # two views, and two of the EMA branch
    assert kinds.count(torch.ops.aten.convolution_backward) == 2 * 20
    of_step = count_flops(lambda: arms["ours"].steps(1))
    assert 0.9 * of_step < count_flops(lambda: alone.steps(1)) < of_step  # the rest are heads


@pytest.mark.slow
def test_contract(tmp_path, monkeypatch):
    photos = harness.encoded_photos(2)
    monkeypatch.setattr(harness, "encoded_photos", lambda num: photos[:num])
    before, out = train_step.switches_now(), tmp_path / "step.json"
    assert train_step.main([*TINY, "--peak-tflops", "0.5", "--json", str(out)]) == 0
    assert train_step.switches_now() == before
    figures = json.loads(out.read_text())
    rates = figures["images_per_second"]
    assert list(rates) == ["ours", "eager", "solo-learn-like", "lightly-like"]
    assert min(rates.values()) > 0
    per_second = rates["ours"] * figures["flops_per_picture"]
    assert figures["mfu"] == pytest.approx(per_second / 0.5e12)
    assert figures["from_shards_share"] > 0
    convolutions = figures["convolutions"]
    assert 0 < convolutions["share_of_step"] < 1
    rate = convolutions["gflop"] / convolutions["ms"]
    assert convolutions["gflop_per_second"] == pytest.approx(1e3 * rate)
    for name, ratio in figures["ratios"].items():
        low, high = figures["ratio_range"][name]
        assert low <= ratio <= high
    assert (figures["device"], figures["clock"]) == ("cpu", "processor")
    # `auto` takes bf16 where the processor has it; the libraries' steps take it in any case.
    is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert figures["precision"] == {
        "ours": "bf16" if is_native else "fp32",
        "eager": "fp32",
        "solo-learn-like": "bf16",
        "lightly-like": "bf16",
    }


def test_a_time_limit_costs_the_rates_from_shards_alone(tmp_path, monkeypatch):
    def stopped(*_):
        raise RuntimeError("stopped")

    photos = harness.encoded_photos(2)
    monkeypatch.setattr(harness, "encoded_photos", lambda num: photos[:num])
    monkeypatch.setattr(train_step, "wall_rates", stopped)
    out = tmp_path / "step.json"
    assert train_step.main([*TINY, "--rounds", "1", "--json", str(out)]) == 1
    figures = json.loads(out.read_text())
    assert set(figures["ratios"]) == {"ours/eager", "ours/solo-learn-like", "ours/lightly-like"}
    assert "from_shards_share" not in figures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_rivals_scale_their_loss(tmp_path):
    out = tmp_path / "step.json"
    tiny = [*TINY, "--json", str(out)]
    tiny[1] = "cuda"
    assert train_step.main(tiny) == 0
    figures = json.loads(out.read_text())
    assert figures["precision"]["solo-learn-like"] == figures["precision"]["lightly-like"] == "fp16"
    assert figures["clock"] == "cuda events"
