"""The grid: a cell is a base method with FA in one of four architectures."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError
from pretrain.config_method import FAConfig, ObjectiveConfig


@dataclass(frozen=True)
class BaseMethod:
    """What distinguishes the base methods.

    Attributes:
        has_ema: The target branch is an EMA copy of backbone and projector (BYOL, MoCo).
        stops_target: No gradient through the target branch.
        architecture: Where the method is published: with a predictor, or without.
        is_per_sample: The loss of a batch is the mean over its samples, each by itself.
    """

    has_ema: bool
    stops_target: bool
    architecture: str
    is_per_sample: bool


BASE_METHODS = {
    "simclr": BaseMethod(False, False, "basic", False),  # arXiv 2002.05709
    "infonce": BaseMethod(False, False, "parallel", False),  # NNCLR's loss, arXiv 2104.14548
    "moco": BaseMethod(True, True, "basic", True),  # v2+: arXiv 2003.04297, symmetric
    "byol": BaseMethod(True, True, "parallel", True),  # arXiv 2006.07733
    "simsiam": BaseMethod(False, True, "parallel", True),  # arXiv 2011.10566
    "swav": BaseMethod(False, True, "basic", False),  # arXiv 2006.09882
}


@dataclass(frozen=True)
class Cell:
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


def resolve(objective: ObjectiveConfig, fa: FAConfig) -> Cell:
    """Decide what the config leaves to the base method.

    Raises:
        UserError: For a combination that contradicts itself.
    """
    base = BASE_METHODS[objective.name]
    architecture = base.architecture if fa.architecture == "auto" else fa.architecture
    own_side = "online" if architecture in ("pre", "post") else "target"
    side = own_side if fa.side == "auto" else fa.side
    if side != own_side and architecture != "basic":
        reason = (
            "FA and predictor would act on one view, which is architecture pre (FA first) or post"
            if architecture == "parallel"
            else "FA on the other view than the predictor is architecture parallel"
        )
        raise UserError(f"fa.side={side} with fa.architecture={architecture}: {reason}")
    stops_target = base.stops_target if objective.stop_gradient is None else objective.stop_gradient
    return Cell(architecture, side, architecture != "basic", base.has_ema, stops_target)
