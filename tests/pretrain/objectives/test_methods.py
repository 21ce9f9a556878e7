"""The grid of base methods and FA architectures against the definitions, in value and gradient."""

import copy
import math
from unittest.mock import patch

import pytest
import torch

from pretrain.config import FAConfig, resolve
from pretrain.objectives.byol import Byol
from pretrain.objectives.moco import MoCo
from pretrain.objectives.swav import SwAV
from tests.pretrain.conftest import make_objective
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    FORMULAS,
    assert_same,
    assert_same_gradients,
    gradients,
    loss_of_cell,
    options_of,
    projections,
    step,
    targets,
    unit,
)

OBJECTIVES = (
    "simclr", "infonce", "moco", "byol", "simsiam", "swav", "barlow", "vicreg", "deepclusterv2"
)  # fmt: skip
OWN = dict.fromkeys(("infonce", "byol", "simsiam"), "parallel") | dict.fromkeys(
    ("simclr", "moco", "swav", "barlow", "vicreg", "deepclusterv2"), "basic"
)
STOPPED_TARGET = (
    "moco",
    "byol",
    "simsiam",
    "swav",
    "deepclusterv2",
)  # an EMA network's, or detached


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_auto_is_the_architecture_of_the_base_method(objective):
    chosen = make_objective(objective)
    cell = resolve(chosen, FAConfig())
    assert cell == resolve(chosen, FAConfig(architecture=OWN[objective]))
    assert (cell.architecture, cell.side) == (OWN[objective], "target")
    assert chosen.has_ema == (objective in ("moco", "byol"))
    assert cell.stops_target == (objective in STOPPED_TARGET)


def assert_same_bits(model, twin, loss, expected):
    assert torch.equal(loss, expected)
    pairs = zip(gradients(model, loss), gradients(twin, expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parity
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_none_is_the_base_method(make, make_views, objective):
    model, views = make(objective, method="none"), make_views()
    twin = copy.deepcopy(model)
    expected = loss_of_cell(twin, views, OWN[objective])
    assert_same(model, twin, step(model, views).loss, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_none_heeds_no_option_of_fa(make, make_views, objective):
    first, views = make(objective, method="none"), make_views()
    second = make(
        objective, method="none", stop_gradient=False, views="first", strength=0.5,
        feature_loss="free",
    )  # fmt: skip
    second.load_state_dict(first.state_dict())
    assert_same_bits(first, second, step(first, views).loss, step(second, views, seed=1).loss)


@pytest.mark.parametrize("objective", ["simclr", "infonce", "byol"])
@pytest.mark.parametrize("stop", [True, False])
def test_identity_is_none_but_for_the_gradient_that_fa_stops(make, make_views, objective, stop):
    none, views = make(objective, method="none"), make_views()
    model = make(objective, method="identity", stop_gradient=stop)
    model.load_state_dict(none.state_dict())
    twin = copy.deepcopy(none)
    loss, base = step(model, views).loss, step(none, views).loss
    if not stop or objective in STOPPED_TARGET:
        assert_same_bits(model, none, loss, base)
        return
    assert torch.equal(loss, base)
    z = projections(twin, views)
    expected = 0
    for a, b in ((1, 0), (0, 1)):
        if objective == "simclr":  # z_b as anchor is stopped, as negative of others it is not
            expected += references.anchored_nt_xent(z[b].detach(), z[a], z[b], 0.2) / 2
        else:
            expected += references.infonce(z[b].detach(), twin.online.predictor(z[a]), 0.2) / 2
    ours = gradients(model, loss)
    assert_same_gradients(ours, gradients(twin, expected))
    flow = [torch.cat([g.flatten() for g in grads]) for grads in (ours, gradients(none, base))]
    assert not torch.allclose(flow[0], flow[1], rtol=0.05)


def has_no_gradient_at_all(objective, formula):
    """With FA's gradient stopped: neither branch has any (SwAV's prototypes always have)."""
    return formula in ("post", "basic-online") and objective in (
        "moco", "byol", "simsiam", "deepclusterv2"
    )  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("method", "stop"), [("mask", False), ("nn", True)])
def test_every_cell_equals_its_formula(make, make_views, objective, formula, method, stop):
    if stop and has_no_gradient_at_all(objective, formula):
        stop = False  # refused before any work; see test_method_spec.py
    model = make(
        objective, method=method, stop_gradient=stop, mask={"ratio": 0.5}, **options_of(formula)
    )
    twin, views = copy.deepcopy(model), make_views()
    loss = step(model, views, seed=3, number=11).loss
    assert_same(model, twin, loss, loss_of_cell(twin, views, formula, seed=3, number=11))


@pytest.mark.parity
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "simclr"])
def test_small_crops_predict_both_large_views(make, make_views, objective, formula):
    model = make(
        objective, method="mask", num_features=2, stop_gradient=False, **options_of(formula)
    )
    twin, views = copy.deepcopy(model), [*make_views(), *make_views(size=16, seed=1)]
    output = step(model, views)
    assert_same(model, twin, output.loss, loss_of_cell(twin, views, formula))
    assert output.keys.shape == (2, 8, 12)  # the small ones enter no queue


def test_small_crops_beside_fa_of_one_view_or_with_the_other_view_as_partner(make, make_views):
    """fa.views=first leaves them; their partner is view 1; what is prepared of a target is kept."""
    views, taken = [*make_views(), *make_views(size=16, seed=1)], []
    options = {"stop_gradient": False, **options_of("basic-online")}
    model = make("swav", method="mask", num_features=2, views="first", **options)
    twin = copy.deepcopy(model)
    expected = loss_of_cell(twin, views, "basic-online")
    assert_same(model, twin, step(model, views).loss, expected)

    model = make("swav", method="mixup", partner="view", **options)
    with torch.no_grad():
        z = projections(copy.deepcopy(model), views)
    model.augmenter.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[:2]))
    with patch.object(SwAV, "prepare", autospec=True, side_effect=SwAV.prepare) as prepare:
        step(model, views)
    assert prepare.call_count == 2
    for (own, other), (view, partner) in zip(taken, ((2, 0), (3, 0), (1, 0), (0, 1)), strict=True):
        torch.testing.assert_close((own, other), (z[view], z[partner]))


@pytest.mark.parity
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("views_of_fa", ["first", "second"])
def test_views_leaves_the_other_view_as_it_is(make, make_views, formula, views_of_fa):
    model = make(
        "byol", method="mask", stop_gradient=False, views=views_of_fa, num_features=2,
        feature_loss="free", **options_of(formula),
    )  # fmt: skip
    twin, views = copy.deepcopy(model), make_views()
    output = step(model, views)
    assert_same(model, twin, output.loss, loss_of_cell(twin, views, formula))
    takes_view = "second" if formula in references.A_TAKES_THE_TARGET else "first"  # in 1 -> 2
    assert torch.equal(output.augmented, output.original) == (views_of_fa != takes_view)


@pytest.mark.parity
@pytest.mark.parametrize("formula", FORMULAS)
def test_free_loss_is_the_sum_of_n_terms(make, make_views, formula):
    views, values = make_views(), {}
    for feature_loss in ("mean", "free"):
        model = make(
            "infonce", method="noise", stop_gradient=False, num_features=3,
            feature_loss=feature_loss, **options_of(formula),
        )  # fmt: skip
        twin = copy.deepcopy(model)
        values[feature_loss] = step(model, views).loss
        assert_same(model, twin, values[feature_loss], loss_of_cell(twin, views, formula))
    torch.testing.assert_close(values["free"], 3 * values["mean"])


@pytest.mark.parity
@pytest.mark.parametrize("objective", ["simclr", "infonce", "simsiam", "barlow", "vicreg"])
@pytest.mark.parametrize("architecture", ["basic", "parallel"])
@pytest.mark.parametrize("stops", [True, False])
def test_the_targets_gradient_can_be_stopped_or_let_through(
    make, make_views, objective, architecture, stops
):
    options = {"stop_gradient": stops}
    model = make(objective, method="none", architecture=architecture, options=options)
    twin, views = copy.deepcopy(model), make_views()
    assert model.spec.stops_target == stops
    expected = loss_of_cell(twin, views, architecture, stops=stops)
    assert_same(model, twin, step(model, views).loss, expected)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(
    ("objective", "views_of_fa"), [("byol", "both"), ("infonce", "first"), ("infonce", "second")]
)
def test_the_queue_takes_what_fa_takes(make, make_views, objective, formula, views_of_fa):
    """t, z or q(z) of view 1; of view 2 where FA leaves view 1 alone."""
    model = make(
        objective, method="nn", stop_gradient=False, views=views_of_fa, **options_of(formula)
    )  # fmt: skip
    twin, views = copy.deepcopy(model), make_views()
    model.after_optimizer_step(1.0, [step(model, views)])
    with torch.no_grad():
        taken = projections(twin, views)
        if formula == "post":
            taken = [twin.online.predictor(x) for x in taken]
        elif formula in references.A_TAKES_THE_TARGET:
            taken = targets(twin, views, taken)
    expected = unit(taken[1 if views_of_fa == "second" else 0])
    torch.testing.assert_close(model.queue.features[40:48], expected)
    assert int(model.queue.count) == 48


# --- published combinations, each written once more without the package


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False])
def test_nnclr_equals_its_definition(make_model, make_views, bank, training):
    """1/2 CE(NN(z1) . p2 / tau) + 1/2 CE(NN(z2) . p1 / tau), neighbours without gradient."""
    model, views = make_model("infonce", method="nn").train(training), make_views()
    model.queue.put(bank)
    twin = copy.deepcopy(model)
    z, p = references.online(twin, views)
    near = [references.nn(x.detach(), bank) for x in z]
    expected = (references.infonce(near[0], p[1], 0.2) + references.infonce(near[1], p[0], 0.2)) / 2
    assert_same(model, twin, step(model, views).loss, expected)


@pytest.mark.parity
def test_moco_equals_its_definition_over_steps(make_model, make_views):
    """Keys of an EMA network, two queues of 20 plain keys that start empty, symmetric loss."""
    model = make_model("moco", method="none", objective_options={"num_negatives": 20})
    twin = copy.deepcopy(model)
    entered = [torch.zeros(0, 12), torch.zeros(0, 12)]
    for number in range(4):
        views = make_views(seed=number)
        output = step(model, views, number=number)
        q, k = projections(twin, views), references.ema_projections(twin, views)
        bank = [keys[-20:] for keys in entered]
        expected = references.moco(q[0], k[1], bank[1], 0.2)
        expected = (expected + references.moco(q[1], k[0], bank[0], 0.2)) / 2
        torch.testing.assert_close(output.loss, expected)
        steps = gradients(model, output.loss)
        if number:
            assert_same_gradients(steps, gradients(twin, expected))
        with torch.no_grad():
            for parameter, gradient in zip(model.online.parameters(), steps, strict=True):
                parameter.sub_(0.05 * gradient)
        model.after_optimizer_step(0.9, [output])
        twin.online.load_state_dict(model.online.state_dict())
        with torch.no_grad():
            for slow, fast in zip(twin.ema.parameters(), twin.online.parameters(), strict=True):
                slow.copy_(0.9 * slow + 0.1 * fast)
        entered = [torch.cat([old, unit(new)]) for old, new in zip(entered, k, strict=True)]
    for keys, queue in zip(entered, model.memory, strict=True):
        assert (int(queue.count), int(queue.position)) == (20, 12)
        for place in range(12, 32):  # the oldest 12 were overwritten
            torch.testing.assert_close(queue.features[place % 20], keys[place])


@pytest.mark.parametrize("method", ["mask", "nn"])
def test_moco_s_negatives_are_plain_keys(make, make_views, method):
    """FA makes the positive key only."""
    model, views = make("moco", method=method), make_views()
    twin = copy.deepcopy(model)
    output = step(model, views)
    assert not torch.allclose(unit(output.target), unit(output.projection), atol=0.05)
    model.after_optimizer_step(0.5, [output])
    keys_of_views = references.ema_projections(twin, views)
    for keys, queue in zip(keys_of_views, model.memory, strict=True):
        torch.testing.assert_close(queue.features[[16, 17, 18, 19, 0, 1, 2, 3]], unit(keys))


@pytest.mark.parity
@pytest.mark.parametrize(("cls", "tau_0", "tau_1"), [(Byol, 0.99, 1.0), (MoCo, 0.0, 0.999)])
def test_ema_tau_equals_the_closed_form(cls, tau_0, tau_1):
    objective = cls(ema_tau=tau_0, ema_tau_end=tau_1)
    for number in range(0, 1001, 50):
        expected = tau_0 + (tau_1 - tau_0) * (1 - math.cos(math.pi * number / 1000)) / 2
        assert objective.tau(number, 1000) == pytest.approx(expected, abs=1e-12)
    assert (objective.tau(0, 1000), objective.tau(1000, 1000)) == (tau_0, tau_1)
