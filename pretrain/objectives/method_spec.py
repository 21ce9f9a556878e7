"""A method: a base method with feature augmentation in one of the four architectures."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import require
from pretrain.config import BASE_METHODS, FAConfig, ObjectiveConfig


@dataclass(frozen=True)
class MethodSpec:
    """A base method and an architecture, with everything that was left open decided.

    Attributes:
        architecture: basic, pre, post or parallel.
        side: Whose features A takes: those of the target or of the online branch.
        has_predictor: Whether there is a q.
        has_ema: Whether the target branch is an EMA copy.
        stops_target: Whether gradient stops at the target branch.
    """

    architecture: str
    side: str
    has_predictor: bool
    has_ema: bool
    stops_target: bool


def resolve(objective: ObjectiveConfig, fa: FAConfig) -> MethodSpec:
    """Decide what the config leaves to the base method.

    Raises:
        UserError: For a combination that contradicts itself.
    """
    base = BASE_METHODS[objective.name]
    architecture = base.architecture if fa.architecture == "auto" else fa.architecture
    own_side = "online" if architecture in ("pre", "post") else "target"
    side = own_side if fa.side == "auto" else fa.side
    reason = (
        "FA and predictor would act on one view, which is architecture pre (FA first) or post"
        if architecture == "parallel"
        else "FA on the other view than the predictor is architecture parallel"
    )
    require(
        side == own_side or architecture == "basic",
        f"fa.side={side} with fa.architecture={architecture}: {reason}",
    )
    stops_target = base.stops_target if objective.stop_gradient is None else objective.stop_gradient
    return MethodSpec(architecture, side, architecture != "basic", base.has_ema, stops_target)


def refuse_without_gradient(objective: ObjectiveConfig, fa: FAConfig) -> None:
    """Refuse a method in which backbone, projector or predictor get no gradient.

    FA that stops its gradient cuts off what lies before A. In ``post`` that is the predictor.
    Backbone and projector lie before A wherever A takes the online features; they still learn
    through the target branch, unless its gradient is stopped. With FA on one view only, the other
    direction trains everything.

    Raises:
        UserError: Naming the parts without gradient and what to change.
    """
    spec = resolve(objective, fa)
    starved = ["backbone", "projector"] if spec.stops_target else []
    starved += ["predictor"] if spec.architecture == "post" else []
    is_cut_off = fa.method != "none" and fa.stop_gradient and fa.views == "both"
    require(
        not (is_cut_off and spec.side == "online" and starved),
        f"objective.name={objective.name}, fa.method={fa.method}, fa.architecture="
        f"{spec.architecture}, fa.side={spec.side}, fa.stop_gradient=true cannot train: no "
        f"gradient reaches the {' and the '.join(starved)}. FA stops the gradient of the features "
        "it takes, and no other reaches what computes them: use fa.stop_gradient=false, or "
        "fa.architecture=parallel",
    )
