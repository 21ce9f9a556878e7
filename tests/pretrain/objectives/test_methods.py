"""The grid of base methods and FA architectures against the definitions, in value and gradient."""

import copy

import pytest
import torch

from common.resnet import Arch
from pretrain.config import FAConfig, ObjectiveConfig
from pretrain.model.joint_embedding import mean_cosine
from pretrain.objectives import losses
from pretrain.objectives.method_spec import resolve
from tests.pretrain.model import references
from tests.pretrain.model.references import (
    FORMULAS,
    assert_same_gradients,
    ema_projections,
    gradients,
    loss_of_cell,
    move_ema,
    online,
    options_of,
    projections,
    step,
    targets,
    unit,
)

TINY = Arch(depth=18, width_per_group=8, stem_channels=8, res2_channels=8)
OBJECTIVES = ("simclr", "infonce", "moco", "byol", "simsiam", "swav")
OWN = dict.fromkeys(("infonce", "byol", "simsiam"), "parallel") | dict.fromkeys(
    ("simclr", "moco", "swav"), "basic"
)
STOPPED_TARGET = ("moco", "byol", "simsiam", "swav")  # an EMA network's, or detached


@pytest.fixture
def make(make_model):
    """Small assemblies whose EMA networks differ and whose queues hold something."""

    def make(objective, *, options=None, num_entries=40, **fa):
        options = {"num_prototypes": 6, "num_negatives": 20} | (options or {})
        model = make_model(objective, arch=TINY, objective_options=options, **fa)
        if model.ema is not None:
            move_ema(model)
        if model.queue is not None:
            model.queue.put(torch.randn(num_entries, 12))
        model.objective.put(torch.randn(2, 16, 12))
        return model

    return make


def assert_same(model, twin, loss, expected):
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(twin, expected))


# --- base methods by themselves


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False])
def test_simclr_equals_its_definition(make, make_views, training):
    model, views = make("simclr", method="none").train(training), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    first, second = projections(twin, views)
    assert_same(model, twin, loss, references.nt_xent(first, second, 0.2))


@pytest.mark.parity
@pytest.mark.parametrize("training", [True, False])
def test_simsiam_equals_its_definition(make, make_views, training):
    """Half the sum of -cos(p_1, sg z_2) and -cos(p_2, sg z_1)."""
    model, views = make("simsiam", method="none").train(training), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, p = online(twin, views)
    cosine = references.negative_cosine
    assert_same(model, twin, loss, (cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2)


@pytest.mark.parity
def test_nnsiam_equals_its_definition(make, make_views):
    model, views = make("simsiam", method="nn", architecture="parallel"), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, p = online(twin, views)
    near = [references.nn(x.detach(), twin.queue.features[:40]) for x in z]
    cosine = references.negative_cosine
    assert_same(model, twin, loss, (cosine(p[0], near[1]) + cosine(p[1], near[0])) / 2)


@pytest.mark.parity
@pytest.mark.parametrize("iterations", [1, 3])
def test_swav_equals_its_definition(make, make_views, iterations):
    """Each view's scores against the other's codes; gradients to the prototypes as well."""
    options = {"sinkhorn_epsilon": 0.1, "sinkhorn_iterations": iterations}
    model, views = make("swav", method="none", options=options), make_views()
    twin = copy.deepcopy(model)
    loss = step(model, views).loss
    z, prototypes = projections(twin, views), twin.online.prototypes.weight
    one = references.swav(z[0], z[1], prototypes, 0.2, 0.1, iterations)
    two = references.swav(z[1], z[0], prototypes, 0.2, 0.1, iterations)
    assert_same(model, twin, loss, (one + two) / 2)


@pytest.mark.parity
def test_moco_equals_its_definition_over_steps(make_model, make_views):
    """Keys of an EMA network, two queues of 20 plain keys that start empty, symmetric loss."""
    model = make_model(
        "moco", arch=TINY, method="none", objective_options={"num_negatives": 20}
    )  # fmt: skip
    twin = copy.deepcopy(model)
    entered = [torch.zeros(0, 12), torch.zeros(0, 12)]
    for number in range(4):
        views = make_views(seed=number)
        output = step(model, views, number=number)
        q, k = projections(twin, views), ema_projections(twin, views)
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
    for keys, queue in zip(entered, model.objective.negatives, strict=True):
        assert (int(queue.count), int(queue.position)) == (20, 12)
        for place in range(12, 32):  # the oldest 12 were overwritten
            torch.testing.assert_close(queue.features[place % 20], keys[place])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_auto_is_the_architecture_of_the_base_method(objective):
    cell = resolve(ObjectiveConfig(name=objective), FAConfig())
    assert cell == resolve(ObjectiveConfig(name=objective), FAConfig(architecture=OWN[objective]))
    assert (cell.architecture, cell.side) == (OWN[objective], "target")
    assert cell.has_predictor == (OWN[objective] == "parallel")
    assert cell.has_ema == (objective in ("moco", "byol"))
    assert cell.stops_target == (objective in STOPPED_TARGET)


# --- no FA, and FA that changes nothing


def base_method(model, views):
    """The base method alone, by the package's losses: what `none` must equal to the bit."""
    z = torch.stack(projections(model, views))
    t = targets(model, views, z)
    p = z if model.online.predictor is None else model.online.predict(z)
    name, total = model.objective.config.name, []
    for a, b in ((1, 0), (0, 1)):
        if name == "simclr":
            total.append(losses.nt_xent_loss(t[b], p[a], t[b], temperature=0.2))
        elif name == "infonce":
            total.append(losses.infonce_loss(t[b], p[a], temperature=0.2))
        elif name == "moco":
            queue = model.objective.negatives[b].features[:16]
            total.append(losses.moco_loss(p[a], t[b], queue, temperature=0.2))
        elif name == "swav":
            scores = model.online.prototypes(t[b])
            codes = losses.sinkhorn(scores, epsilon=0.05, num_iterations=3)
            total.append(losses.swav_loss(model.online.prototypes(p[a]), codes, temperature=0.2))
        else:
            loss = losses.byol_loss if name == "byol" else losses.negative_cosine_loss
            total.append(loss(p[a], t[b]))
    return (1 if name == "byol" else 0.5) * (total[1] + total[0])


def assert_same_bits(model, twin, loss, expected):
    assert torch.equal(loss, expected)
    pairs = zip(gradients(model, loss), gradients(twin, expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_none_is_the_base_method_to_the_bit(make, make_views, objective):
    model, views = make(objective, method="none"), make_views()
    twin = copy.deepcopy(model)
    assert_same_bits(model, twin, step(model, views).loss, base_method(twin, views))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_none_heeds_no_option_of_fa(make, make_views, objective):
    first, views = make(objective, method="none"), make_views()
    second = make(
        objective, method="none", stop_gradient=False, views="first", strength=0.5,
        feature_loss="free",
    )  # fmt: skip
    second.load_state_dict(first.state_dict())
    assert_same_bits(first, second, step(first, views).loss, step(second, views, seed=1).loss)


@pytest.mark.parametrize("objective", OBJECTIVES)
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


# --- the four architectures


def has_no_gradient_at_all(objective, formula):
    """With FA's gradient stopped: neither branch has any (SwAV's prototypes always have)."""
    return formula in ("post", "basic-online") and objective in ("moco", "byol", "simsiam")


@pytest.mark.parity
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("method", "stop"), [("mask", False), ("noise", False), ("mask", True)])
def test_every_cell_equals_its_formula(make, make_views, objective, formula, method, stop):
    if stop and has_no_gradient_at_all(objective, formula):
        stop = False  # refused before any work; see test_cell_check.py
    model = make(
        objective, method=method, stop_gradient=stop, mask_ratio=0.5, noise_sigma=0.7,
        **options_of(formula),
    )  # fmt: skip
    twin, views = copy.deepcopy(model), make_views()
    loss = step(model, views, seed=3, number=11).loss
    assert_same(model, twin, loss, loss_of_cell(twin, views, formula, seed=3, number=11))


@pytest.mark.parity
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("objective", ["infonce", "byol"])
@pytest.mark.parametrize("views_of_fa", ["first", "second"])
def test_views_leaves_the_other_view_as_it_is(
    make, make_views, objective, formula, views_of_fa
):  # fmt: skip
    model = make(
        objective, method="mask", stop_gradient=False, views=views_of_fa, num_features=2,
        feature_loss="free", **options_of(formula),
    )  # fmt: skip
    twin, views = copy.deepcopy(model), make_views()
    output = step(model, views)
    assert_same(model, twin, output.loss, loss_of_cell(twin, views, formula))
    takes_view = "second" if formula in references.A_TAKES_THE_TARGET else "first"  # in 1 -> 2
    assert torch.equal(output.augmented, output.original) == (views_of_fa != takes_view)


@pytest.mark.parity
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("objective", ["infonce", "byol"])
def test_free_loss_is_the_sum_of_n_terms(make, make_views, objective, formula):
    views, values = make_views(), {}
    for feature_loss in ("mean", "free"):
        model = make(
            objective, method="noise", stop_gradient=False, num_features=3,
            feature_loss=feature_loss, **options_of(formula),
        )  # fmt: skip
        twin = copy.deepcopy(model)
        values[feature_loss] = step(model, views).loss
        assert_same(model, twin, values[feature_loss], loss_of_cell(twin, views, formula))
    torch.testing.assert_close(values["free"], 3 * values["mean"])


@pytest.mark.parity
@pytest.mark.parametrize("objective", ["simclr", "infonce", "simsiam"])
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


# --- queues


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("objective", ["infonce", "byol"])
@pytest.mark.parametrize("views_of_fa", ["both", "first", "second"])
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


@pytest.mark.parametrize("method", ["mask", "nn"])
def test_mocos_negatives_are_plain_keys(make, make_views, method):
    """FA makes the positive key only."""
    model, views = make("moco", method=method), make_views()
    twin = copy.deepcopy(model)
    output = step(model, views)
    assert mean_cosine(output.target, output.projection) < 0.99
    model.after_optimizer_step(0.5, [output])
    for keys, queue in zip(ema_projections(twin, views), model.objective.negatives, strict=True):
        torch.testing.assert_close(queue.features[[16, 17, 18, 19, 0, 1, 2, 3]], unit(keys))
    pairs = zip(
        model.ema.parameters(), twin.ema.parameters(), twin.online.parameters(), strict=True
    )
    for slow, before, fast in pairs:
        torch.testing.assert_close(slow, 0.5 * before + 0.5 * fast)


def test_swav_says_how_long_its_prototypes_stand_still(make):
    model = make("swav", method="none", options={"frozen_prototype_steps": 7})
    assert model.frozen_prototype_steps == 7
    assert [name for name, _ in model.online.named_children()][-1] == "prototypes"
    assert make("byol", method="none").online.prototypes is None
