"""The assembly: its queue, its EMA network, what a step shows, and precision.

What it computes is compared with definitions in objectives/test_methods.py.
"""

import copy

import pytest
import torch

from tests.pretrain.model.references import (
    compare,
    online,
    step,
    unit,
)
from tests.pretrain.model.references import infonce as reference_infonce
from tests.pretrain.model.references import nn as reference_nn


def test_queue_takes_view_1_after_the_optimiser_step_only(make_model, make_views):
    model, views = make_model(method="nn", min_fill=8), make_views()
    with torch.no_grad():
        expected = unit(online(copy.deepcopy(model), views)[0][0])
    output = step(model, views)
    assert int(model.queue.count) == 0
    output.loss.backward()
    with torch.no_grad():
        for parameter in model.online.parameters():
            parameter.sub_(0.1 * parameter.grad)
    assert int(model.queue.count) == 0
    model.after_optimizer_step(1.0, [output])
    assert int(model.queue.count) == 8
    torch.testing.assert_close(model.queue.features[:8], expected)  # of the weights of the step


def test_micro_batches_enter_the_queue_once_and_in_their_order(make_model, make_views):
    model = make_model(method="nn", min_fill=8)
    parts = [step(model, make_views(n=4, seed=seed)) for seed in (0, 1)]
    model.after_optimizer_step(1.0, parts)
    assert int(model.queue.puts) == 1
    expected = unit(torch.cat([part.entering for part in parts]))
    torch.testing.assert_close(model.queue.features[:8], expected)


@pytest.mark.parametrize("tau", [0.0, 0.9, 1.0])
def test_ema_starts_as_a_copy_without_predictor_and_follows(make_model, tau):
    model = make_model("byol", method="none")
    source, ema = model.online.state_dict(), model.ema.state_dict()
    assert set(ema) == {name for name in source if not name.startswith("predictor.")}
    before = {name: value.clone() for name, value in model.ema.named_parameters()}
    for name, value in ema.items():
        assert torch.equal(value, source[name])
        assert value.data_ptr() != source[name].data_ptr()
    with torch.no_grad():
        for parameter in model.online.parameters():
            parameter.normal_()
    model.after_optimizer_step(tau, [])
    for name, value in model.ema.named_parameters():
        expected = tau * before[name] + (1 - tau) * source[name]
        torch.testing.assert_close(value, expected, msg=name)
        assert not value.requires_grad


def test_ema_batch_norm_keeps_statistics_of_its_own(make_model, make_views):
    """EMA covers parameters; the running statistics are those of the EMA network's own batches."""
    model = make_model("byol", method="none")
    before = {k: v.clone() for k, v in model.ema.named_buffers()}
    model.after_optimizer_step(0.5, [])
    assert all(torch.equal(v, before[k]) for k, v in model.ema.named_buffers())
    step(model, make_views())
    assert not torch.equal(model.ema.backbone.bn1.running_mean, before["backbone.bn1.running_mean"])


def test_step_is_a_pure_function_of_seed_and_number(make_model, make_views, bank):
    views = make_views()

    def run(seed, number):
        model = make_model("byol", method="nn+mixup", nn={"top_k": 3}, mixup={"alpha": 0.5})
        model.queue.put(bank)
        torch.manual_seed(seed * 77 + number)  # must not matter
        return step(model, views, seed, number).loss

    assert torch.equal(run(1, 5), run(1, 5))
    assert not torch.equal(run(1, 5), run(1, 6))
    assert not torch.equal(run(1, 5), run(2, 5))


def test_output_shows_view_2_detached(make_model, make_views):
    """Of view 1 predicting view 2: t_2, what A took and made of it, q(z_1)."""
    model, views = make_model(method="noise", noise={"sigma": 0.5}), make_views()
    with torch.no_grad():
        z, p = online(copy.deepcopy(model), views)
    output = step(model, views)
    for name, expected in (
        ("projection", z[1]), ("original", z[1]), ("entering", z[0]), ("online", p[0]),
        ("keys", torch.stack(z)), ("target", output.augmented),
    ):  # fmt: skip
        value = getattr(output, name)
        torch.testing.assert_close(value, expected, msg=name)
        assert not value.requires_grad
    assert not output.augmented.requires_grad


def test_neighbours_and_losses_are_computed_in_single_precision_under_autocast(
    make_model, make_views
):
    """A search in bf16 mixes up neighbours whose similarities differ by less than 1/256."""
    model, views = make_model(method="nn", queue_size=256), make_views(n=16)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        z = model.online(views, lambda z: z).float()
        p = model.online.predict(z).float()
    centre = z[1].mean(dim=0, keepdim=True)
    bank = centre + 0.02 * centre.norm() * torch.randn(256, 12, generator=generator)
    model.queue.put(bank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compare(model, views, generator)(z)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.augmented, reference_nn(z[1], bank))
    near = [reference_nn(x, bank) for x in z]
    expected = (reference_infonce(near[0], p[1], 0.2) + reference_infonce(near[1], p[0], 0.2)) / 2
    torch.testing.assert_close(output.loss, expected)
