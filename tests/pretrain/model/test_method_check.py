"""Cells without gradient are refused, and no others.

The rule, from the formulas: FA that stops its gradient cuts off what lies before A. In `post` that
is the predictor, whatever the objective. Backbone and projector lie before A in `pre`, `post` and
`basic` with FA online; they still learn through the target branch, unless that is stopped or an EMA
network's. With FA on the target side, or its gradient let through, everything learns.
"""

from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from pretrain.config import FAConfig, HeadConfig, ObjectiveConfig
from pretrain.model.method_check import refuse_without_gradient
from pretrain.objectives.method_spec import resolve

OBJECTIVES = ("simclr", "infonce", "moco", "byol", "simsiam", "swav")
STOPPED_TARGET = ("moco", "byol", "simsiam", "swav")
PLACES = [
    ("basic", "target"), ("basic", "online"), ("pre", "auto"), ("post", "auto"),
    ("parallel", "auto"),
]  # fmt: skip


def starved_parts(target_is_stopped, method, architecture, side, stop):
    """What gets no gradient, by the rule above."""
    if method == "none" or not stop or architecture == "parallel" or side == "target":
        return []
    parts = ["backbone", "projector"] if target_is_stopped else []
    return [*parts, "predictor"] if architecture == "post" else parts


def check(objective, fa, heads=None):
    refuse_without_gradient(objective, fa, heads or HeadConfig())


def assert_refused_only(parts, objective, fa):
    """Refused with exactly these parts and two remedies that work; accepted without any."""
    if not parts:
        check(objective, fa)
        return
    with pytest.raises(UserError, match="cannot train: no gradient reaches the ") as caught:
        check(objective, fa)
    message = str(caught.value)
    assert f"no gradient reaches the {' and the '.join(parts)}. " in message
    for words in (f"objective.name={objective.name}", f"fa.method={fa.method}"):
        assert words in message
    assert f"fa.architecture={fa.architecture}" in message
    assert "use fa.stop_gradient=false, or fa.architecture=parallel" in message
    for remedy in ({"stop_gradient": False}, {"architecture": "parallel", "side": "auto"}):
        check(objective, replace(fa, **remedy))


@pytest.mark.parametrize(("architecture", "side"), PLACES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_cell_is_refused_if_and_only_if_the_rule_says_so(objective, architecture, side):
    for method in ("none", "identity", "nn", "mask"):
        for stop in (True, False):
            fa = FAConfig(method=method, architecture=architecture, side=side, stop_gradient=stop)
            stopped = objective in STOPPED_TARGET
            parts = starved_parts(stopped, method, architecture, side, stop)
            assert_refused_only(parts, ObjectiveConfig(name=objective), fa)


@pytest.mark.parametrize(("architecture", "side"), PLACES)
@pytest.mark.parametrize("target_stop", [True, False])
@pytest.mark.parametrize("objective", ["simclr", "infonce", "simsiam"])
def test_the_rule_follows_the_targets_own_stop(objective, target_stop, architecture, side):
    fa = FAConfig(method="mask", architecture=architecture, side=side)
    parts = starved_parts(target_stop, "mask", architecture, side, True)
    assert_refused_only(parts, ObjectiveConfig(name=objective, stop_gradient=target_stop), fa)


@pytest.mark.parametrize(
    "fa",
    [
        {"method": "nn", "top_k": 200, "num_features": 100},
        {"method": "nn", "top_k": 5, "nn_choice": "consensus", "nn_distance": "truncated"},
        {"method": "nn+noise", "queue_dtype": "fp16", "strength_start": 0.0},
        {"method": "mask|mixup", "partner": "view", "num_features": 4},
        {"method": "extrapolate", "partner": "queue", "num_features": 3, "feature_loss": "free"},
        {"method": "cutmix", "views": "second"},
        {"method": "noise", "strength": 0.0},
    ],
)
@pytest.mark.parametrize("objective", ["infonce", "byol"])
def test_all_options_of_fa_pass_where_the_cell_can_train(objective, fa):
    check(ObjectiveConfig(name=objective), FAConfig(**fa))


@pytest.mark.parametrize("views", ["first", "second"])
def test_one_plain_view_is_enough_to_train(views):
    check(ObjectiveConfig(), FAConfig(method="mask", architecture="post", views=views))


def test_the_heads_make_no_difference():
    simsiam = HeadConfig(
        projector_layers=3, projector_last_bn=True, projector_last_bn_affine=False, dropout=0.5
    )
    check(ObjectiveConfig(name="simsiam"), FAConfig(method="nn"), simsiam)
    check(ObjectiveConfig(name="moco"), FAConfig(), HeadConfig(projector_hidden_bn=False))
    with pytest.raises(UserError, match="no gradient reaches the backbone and the projector"):
        check(ObjectiveConfig(name="simsiam"), FAConfig(architecture="pre"), simsiam)


def test_global_random_state_neither_moves_nor_matters():
    for seed in range(8):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        check(ObjectiveConfig(name="byol"), FAConfig(method="mask"))
        assert torch.equal(torch.get_rng_state(), before)
        with pytest.raises(UserError, match="cannot train"):
            check(ObjectiveConfig(name="byol"), FAConfig(method="mask", architecture="post"))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("architecture", "side", "message"),
    [
        ("parallel", "online", "fa.side=online with fa.architecture=parallel: FA and predictor"),
        ("auto", "online", "fa.side=online with fa.architecture=parallel: FA and predictor"),
        ("pre", "target", "fa.side=target with fa.architecture=pre: FA on the other view"),
        ("post", "target", "fa.side=target with fa.architecture=post: FA on the other view"),
    ],
)
def test_a_side_that_contradicts_the_architecture_is_refused(architecture, side, message):
    with pytest.raises(UserError, match=message):
        resolve(ObjectiveConfig(name="byol"), FAConfig(architecture=architecture, side=side))


@pytest.mark.parametrize("side", ["target", "online"])
def test_basic_takes_either_side(side):
    cell = resolve(ObjectiveConfig(name="byol"), FAConfig(architecture="basic", side=side))
    assert (cell.side, cell.has_predictor) == (side, False)
