"""A cell that cannot train is refused before any work: tried on a tiny twin, by a backward pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from common.errors import UserError
from pretrain.config_method import FAConfig, HeadConfig, ObjectiveConfig
from pretrain.features.row_random import fa_generator
from pretrain.model.joint_embedding import ArchConfig, FAContrastive

_ARCH = ArchConfig(depth=18, width_per_group=4, stem_channels=4, res2_channels=4)
_DIM, _ROWS, _ENTRIES = 8, 4, 64


def refuse_without_gradient(objective: ObjectiveConfig, fa: FAConfig, heads: HeadConfig) -> None:
    """Refuse a cell whose backbone, projector, predictor or prototypes get no gradient.

    The answer depends on the cell alone, not on its sizes, so a tiny twin with filled queues gives
    it. Every process of a group must call it.

    Raises:
        UserError: Naming the parts without gradient and what to change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the answer shall not depend on the caller's random state
        model = _tiny_twin(objective, fa, heads)
        views = torch.randn(2, _ROWS, 3, 32, 32)
        output = model.step(views, fa_generator(0, 0, torch.device("cpu")))
    if output.loss.requires_grad:
        output.loss.backward()
    starved = [
        name for name, part in model.online.named_children() if not _has_gradient(part)
    ]  # fmt: skip
    if starved:
        cell = model.cell
        parts = " and the ".join(starved)
        raise UserError(
            f"objective.name={objective.name}, fa.method={fa.method}, fa.architecture="
            f"{cell.architecture}, fa.side={cell.side}, "
            f"fa.stop_gradient={str(fa.stop_gradient).lower()} cannot train: no gradient reaches "
            f"the {parts}. {_remedy(model, fa)}"
        )


def _tiny_twin(objective: ObjectiveConfig, fa: FAConfig, heads: HeadConfig) -> FAContrastive:
    heads = replace(
        heads, projector_hidden_dim=_DIM, predictor_hidden_dim=_DIM, output_dim=_DIM, dropout=0.0
    )
    objective = replace(objective, num_prototypes=_DIM, num_negatives=_ENTRIES)
    top_k = min(fa.top_k, _ENTRIES)
    fa = replace(
        fa, queue_size=_ENTRIES, min_fill=top_k, top_k=top_k,
        num_features=min(fa.num_features, top_k) if fa.uses_queue() else min(fa.num_features, 2),
    )  # fmt: skip
    model = FAContrastive(_ARCH, heads, objective, fa)
    if model.queue is not None:
        model.queue.put(torch.randn(_ENTRIES, _DIM))
    model.objective.put(torch.randn(2, _ENTRIES, _DIM))
    return model


def _has_gradient(part: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.ne(0).any()) for p in part.parameters())


def _remedy(model: FAContrastive, fa: FAConfig) -> str:
    if fa.stop_gradient and model.cell.side == "online":
        return (
            "FA stops the gradient of the features it takes, and no other reaches what computes "
            "them: use fa.stop_gradient=false, or fa.architecture=parallel"
        )
    return (
        "Use fa.architecture=parallel, or let gradient through (fa.stop_gradient, "
        "objective.stop_gradient)"
    )
