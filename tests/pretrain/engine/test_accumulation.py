"""Micro-batches: their gradients are those of the large batch, whatever the cell."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.errors import UserError
from pretrain.config import OptimConfig
from pretrain.engine.accumulation import Gradients
from pretrain.features.augmentations.base import RowRandom, fa_generator
from pretrain.features.mixing import Mixing
from tests.pretrain.conftest import TINY_HEADS
from tests.pretrain.model.references import enter

BATCH, ENTRIES = 8, 40
TOLERANCE = 5e-3  # of a gradient's norm: float32 sums in another order, and ReLUs that they flip
SMALL = {"num_prototypes": 20, "num_negatives": ENTRIES}
NN = {"method": "nn", "nn": {"top_k": 2}}
MIXUP = {"method": "mixup", "partner": "batch"}

CELLS = [
    ("byol", {"method": "none"}),
    ("byol", NN),
    ("byol", {"method": "mask", "num_features": 3, "feature_loss": "free"}),
    ("byol", {"method": "mixup", "partner": "queue"}),
    ("simsiam", {**NN, "num_features": 2}),
    ("simsiam", {"method": "extrapolate", "partner": "view"}),
    ("moco", {"method": "none"}),
    ("moco", {"method": "nn+noise"}),
    ("moco", {"method": "none", "mixing": Mixing(8, 3, 2, 2.0, 1.6)}),
    ("masked_prediction", {"method": "mask", "stop_gradient": False, "num_features": 2}),
]
CACHED_ONLY = [
    ("simclr", NN),
    ("infonce", {**NN, "architecture": "pre", "stop_gradient": False}),
    ("infonce", MIXUP),
    ("infonce", {"method": "mask|noise", "num_features": 2}),
    ("moco", {**MIXUP, "method": "cutmix"}),
    ("swav", NN),
    ("infonce", {"method": "none", "mixing": Mixing(4, 3, 2, 2.0, 1.6)}),
    ("masked_prediction", {"method": "mask", "stop_gradient": False}),
    ("barlow", NN),
    ("vicreg", MIXUP),
    ("deepclusterv2", NN),
]


def size_of(objective):
    return 64 if objective == "masked_prediction" else 32  # 4 positions


def ids_of(cells):
    return [f"{objective}-{'-'.join(map(str, fa.values()))}" for objective, fa in cells]


@pytest.fixture
def make(make_model):
    """make("byol", method="nn"): with filled queues and an EMA network that has moved."""

    def build(objective, *, dropout=0.0, mixing=Mixing(), **fa):  # noqa: B008
        heads = replace(TINY_HEADS, dropout=dropout)
        options = SMALL | {"mixing": mixing}
        model = make_model(objective, objective_options=options, heads=heads, **fa)
        dim = heads.output_dim
        if model.queue is not None:
            model.queue.put(torch.randn(ENTRIES, dim))
        enter(model, torch.randn(2, ENTRIES, dim))
        if model.ema is not None:
            with torch.no_grad():
                for parameter in model.ema.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


def compute(model, views, micro_batch_size, accumulation="plain", *, forward=None):
    """The step's outputs and the gradients that it leaves."""
    optim = OptimConfig(micro_batch_size=micro_batch_size, accumulation=accumulation)
    gradients = Gradients(model, forward or model.online, optim, contextlib.nullcontext)
    model.online.zero_grad(set_to_none=True)
    ids = torch.arange(len(views[0]))
    outputs = gradients.compute(views, lambda: fa_generator(3, 7, views[0].device), 1.0, ids)
    return outputs, {k: p.grad for k, p in model.online.named_parameters()}


def assert_same_gradients(ours, expected):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            distance = float((ours[name] - gradient).norm())
            assert distance <= TOLERANCE * float(gradient.norm()) + 1e-6, (name, distance)


def assert_same_step(model, views, micro_batch_size, accumulation):
    (whole,), expected = compute(model, views, 0)
    outputs, ours = compute(model, views, micro_batch_size, accumulation)
    torch.testing.assert_close(outputs[0].loss.detach(), whole.loss.detach(), rtol=1e-4, atol=1e-5)
    assert_same_gradients(ours, expected)
    assert any(bool(g.abs().max() > 1e-4) for g in expected.values() if g is not None)
    entering = torch.cat([o.entering for o in outputs])
    torch.testing.assert_close(entering, whole.entering, rtol=1e-3, atol=2e-3)
    keys = torch.cat([o.keys for o in outputs], dim=1)
    torch.testing.assert_close(keys, whole.keys, rtol=1e-3, atol=2e-3)
    return outputs


# --- equal to the large batch (BN in eval mode: statistics of micro-batches are their own)


@pytest.mark.parity
@pytest.mark.parametrize(("objective", "fa"), CELLS, ids=ids_of(CELLS))
def test_plain_accumulation_equals_the_large_batch(make, make_views, objective, fa):
    model = make(objective, **fa).eval()
    assert len(assert_same_step(model, make_views(BATCH, size_of(objective)), 2, "plain")) == 4


@pytest.mark.parity
@pytest.mark.parametrize(
    ("objective", "fa"), CELLS[::2] + CACHED_ONLY, ids=ids_of(CELLS[::2] + CACHED_ONLY)
)
def test_cached_accumulation_equals_the_large_batch(make, make_views, objective, fa):
    model = make(objective, **fa).eval()
    assert len(assert_same_step(model, make_views(BATCH, size_of(objective)), 4, "cached")) == 1


@pytest.mark.parity
@pytest.mark.parametrize(
    ("objective", "accumulation"), [("byol", "plain"), ("byol", "cached"), ("swav", "cached")]
)
def test_small_crops_in_micro_batches_equal_the_large_batch(
    make, make_views, objective, accumulation
):
    views = [*make_views(BATCH), *make_views(BATCH, size=16, seed=1)]
    model = make(objective, method="mask", architecture="pre", stop_gradient=False).eval()
    assert_same_step(model, views, 4, accumulation)


@pytest.mark.parametrize(("size", "accumulation"), [(BATCH, "plain"), (BATCH, "cached")])
def test_one_micro_batch_is_no_accumulation(make, make_views, size, accumulation):
    model, views = make("byol", method="mask").train(), make_views(BATCH)
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    (plain,), expected = compute(model, views, 0)
    model.load_state_dict(buffers)
    (output,), ours = compute(model, views, size, accumulation)
    assert torch.equal(output.loss, plain.loss)
    assert all(torch.equal(ours[k], expected[k]) for k in expected)


def test_strength_follows_the_progress_in_every_kind_of_pass(make, make_views):
    model, views = make("byol", method="noise", strength_start=0.0).eval(), make_views(BATCH)
    for size, accumulation in ((0, "plain"), (4, "plain"), (4, "cached")):
        optim = OptimConfig(micro_batch_size=size, accumulation=accumulation)
        gradients = Gradients(model, model.online, optim, contextlib.nullcontext)
        moved = []
        for progress in (0.0, 0.5, 1.0):
            output = gradients.compute(views, lambda: fa_generator(0, 0, views.device), progress)[0]
            moved.append(float((output.augmented - output.original).norm()))
        assert moved[0] < 1e-3 < 1e-2 < moved[1] < moved[2]


def test_dropout_equals_the_same_draws_written_out(make, make_views):
    """Micro-batches in eval mode of BN, dropout on: gradients of the loss over their own masks."""
    model, views = make("infonce", dropout=0.5, **NN).eval(), make_views(BATCH)
    for module in model.online.projector.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(5)
    _, ours = compute(model, views, 4, "cached")
    torch.manual_seed(5)
    parts = [torch.stack([model.online.project(v[p : p + 4]) for v in views]) for p in (0, 4)]
    model.online.zero_grad(set_to_none=True)
    random = RowRandom.whole(fa_generator(3, 7, views.device), BATCH)
    model.compare(torch.cat(parts, dim=1), None, random, 1.0).loss.backward()
    assert_same_gradients(ours, {k: p.grad for k, p in model.online.named_parameters()})


def test_random_state_goes_on_where_the_first_pass_ended(make, make_views):
    """One draw of dropout for each sample and step, and the same in every run."""
    model, views = make("infonce", dropout=0.5, **NN).train(), make_views(BATCH)
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        compute(model, views, 4, "cached")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(5)
    assert not torch.equal(torch.get_rng_state(), states[0])
    with torch.no_grad():
        z = [torch.stack([model.online.project(v[p : p + 4]) for v in views]) for p in (0, 4)]
        model.online.predict(torch.cat(z, dim=1))
    assert torch.equal(torch.get_rng_state(), states[0])


@pytest.mark.parametrize("objective", ["infonce", "byol", "moco"])
def test_bn_statistics_after_a_cached_step_are_those_of_one_pass(make, make_views, objective):
    ours, once = make(objective, **NN).train(), make(objective, **NN).train()
    once.load_state_dict(ours.state_dict())
    views = make_views(BATCH)
    compute(ours, views, 4, "cached")
    with torch.no_grad():
        for start in (0, 4):
            part = views[:, start : start + 4]
            for view in part:
                once.online.project(view)
            once.ema_projections(part)
    for name in ("backbone", "projector"):
        assert_same_buffers(ours.online.get_submodule(name), once.online.get_submodule(name))
    if ours.ema is not None:
        assert_same_buffers(ours.ema, once.ema)
    before = make(objective, **NN)
    assert not torch.equal(
        ours.online.get_buffer("backbone.bn1.running_mean"),
        before.online.get_buffer("backbone.bn1.running_mean"),
    )


def assert_same_buffers(a, b):
    for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert torch.equal(x, y), name


def test_micro_batches_that_cannot_be_shared_out_are_refused(make, monkeypatch):
    monkeypatch.setattr("pretrain.collectives.world_size", lambda: 4)
    model = make("byol", method="none")
    with pytest.raises(UserError, match=r"micro_batch_size \(2\).* multiple of their number, 4"):
        Gradients(model, model.online, OptimConfig(micro_batch_size=2), contextlib.nullcontext)
    with pytest.raises(UserError, match=r"micro_batch_size \(4\).* 4 need 8 or more, two each"):
        Gradients(model, model.online, OptimConfig(micro_batch_size=4), contextlib.nullcontext)
