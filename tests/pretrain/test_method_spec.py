"""Methods without gradient are refused, and no others: the rule against a backward pass."""

from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from pretrain.config import FAConfig, refuse_without_gradient, resolve
from pretrain.objectives.base import Objective
from pretrain.objectives.byol import Byol
from tests.pretrain.conftest import make_fa, make_objective
from tests.pretrain.model.references import enter, step

OBJECTIVES = tuple(Objective.registry.names())
PLACES = [
    ("basic", "target"), ("basic", "online"), ("pre", "auto"), ("post", "auto"),
    ("parallel", "auto"),
]  # fmt: skip
ENTRIES = 64


def starved_parts(make_model, make_views, objective: Objective, fa: FAConfig):
    """The parts of a small network that a backward pass with filled queues does not reach."""
    options = dict(vars(objective))
    name = options.pop("name")
    model = make_model(name, objective_options=options, **vars(fa))
    if model.queue is not None:
        model.queue.put(torch.randn(ENTRIES, model.queue.features.shape[1]))
    enter(model, torch.randn(2, ENTRIES, model.online.projector[-1].out_features))
    loss = step(model, make_views(n=4)).loss
    if loss.requires_grad:
        loss.backward()
    return [
        name
        for name, part in model.online.named_children()
        if not any(p.grad is not None and bool(p.grad.ne(0).any()) for p in part.parameters())
    ]


def fa_of(**options) -> FAConfig:
    return make_fa(**{"queue_size": ENTRIES, "min_fill": 8} | options)


@pytest.mark.parametrize(("architecture", "side"), PLACES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_method_is_refused_if_and_only_if_a_part_gets_no_gradient(
    make_model, make_views, objective, architecture, side
):
    if objective == "masked_prediction":
        pytest.skip("takes masks without stop in one architecture: test_masked_prediction.py")
    config = make_objective(objective, num_negatives=ENTRIES, num_prototypes=8)
    for method in ("none", "nn", "mask"):
        for stop in (True, False):
            fa = fa_of(method=method, architecture=architecture, side=side, stop_gradient=stop)
            parts = starved_parts(make_model, make_views, config, fa)
            assert_refused_only(parts, config, fa)


def assert_refused_only(parts, objective, fa):
    """Refused with exactly these parts and two remedies that work; accepted without any."""
    if not parts:
        refuse_without_gradient(objective, fa)
        return
    with pytest.raises(UserError, match="cannot train: no gradient reaches the ") as caught:
        refuse_without_gradient(objective, fa)
    message = str(caught.value)
    assert f"no gradient reaches the {' and the '.join(parts)}. " in message
    for option in (f"objective.name={objective.name}", f"fa.method={fa.method}"):
        assert option in message
    assert f"fa.architecture={fa.architecture}" in message
    assert "use fa.stop_gradient=false, or fa.architecture=parallel" in message
    for remedy in ({"stop_gradient": False}, {"architecture": "parallel", "side": "auto"}):
        refuse_without_gradient(objective, replace(fa, **remedy))


@pytest.mark.parametrize(("architecture", "side"), PLACES)
@pytest.mark.parametrize("target_stop", [True, False])
@pytest.mark.parametrize("objective", ["simclr", "simsiam"])
def test_the_targets_own_stop_counts(
    make_model, make_views, objective, target_stop, architecture, side
):
    config = make_objective(objective, stop_gradient=target_stop)
    fa = fa_of(method="mask", architecture=architecture, side=side)
    assert_refused_only(starved_parts(make_model, make_views, config, fa), config, fa)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "nn", "nn": {"top_k": 8}, "num_features": 4},
        {"method": "nn", "nn": {"top_k": 5, "choice": "consensus", "distance": "truncated"}},
        {"method": "nn+noise", "queue_dtype": "fp16", "strength_start": 0.0},
        {"method": "mask|mixup", "partner": "view", "num_features": 4},
        {"method": "extrapolate", "partner": "queue", "num_features": 3, "feature_loss": "free"},
        {"method": "cutmix", "views": "second"},
        {"method": "noise", "strength": 0.0},
        {"method": "mask", "architecture": "post", "views": "first"},
        {"method": "mask", "architecture": "post", "views": "second"},
        {"method": "noise", "architecture": "pre", "views": "second"},
        {"method": "mask|mixup", "partner": "view", "architecture": "pre"},
        {"method": "nn+mask", "architecture": "post", "strength": 0.0},
    ],
)
def test_other_options_of_fa_follow_the_rule(make_model, make_views, options):
    config, fa = make_objective("byol"), fa_of(**options)
    assert_refused_only(starved_parts(make_model, make_views, config, fa), config, fa)


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
        resolve(Byol(), FAConfig(architecture=architecture, side=side))


@pytest.mark.parametrize("side", ["target", "online"])
def test_basic_takes_either_side(side):
    spec = resolve(Byol(), FAConfig(architecture="basic", side=side))
    assert (spec.side, spec.architecture) == (side, "basic")
