"""SwAV (arXiv 2006.09882)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float

from common.errors import at_least, positive
from common.lazy import Tensor, functional, nn, torch
from pretrain import collectives as dist
from pretrain.objectives.base import Objective, Pair


@dataclass(frozen=True)
class SwAV(Objective):
    """The large views are assigned to prototypes; all other views predict each assignment."""

    architecture: ClassVar = "basic"
    stops_target: ClassVar = True
    target_has_gradient: ClassVar = False
    two_views_only: ClassVar = ""
    state_name: ClassVar = "prototypes"

    name: Literal["swav"] = "swav"
    temperature: float = 0.2
    num_prototypes: int = 3000
    sinkhorn_epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    frozen_prototype_steps: int = 313  # the prototypes stand still for so many steps

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "objective", "temperature", "sinkhorn_epsilon")
        at_least(self, "objective", num_prototypes=1, sinkhorn_iterations=1)
        at_least(self, "objective", frozen_prototype_steps=0)

    def make_state(self, dim: int, num_samples: int | None = None) -> nn.ParameterDict:
        """The prototypes, ``weight`` [K, d]: rows that start uniform on the unit sphere."""
        weight = functional.normalize(torch.randn(self.num_prototypes, dim), dim=1)
        return nn.ParameterDict({"weight": weight})

    def prepare(
        self, target: Float[Tensor, "n d"], state: nn.ParameterDict
    ) -> Float[Tensor, "n K"]:
        """The target's codes; see ``prototype_scores`` and ``sinkhorn``."""
        scores, iterations = prototype_scores(target, state["weight"]), self.sinkhorn_iterations
        return sinkhorn(scores, epsilon=self.sinkhorn_epsilon, num_iterations=iterations)

    def loss(self, pair: Pair, state: nn.ParameterDict) -> Float[Tensor, ""]:
        """See ``prototype_scores`` and ``swav_loss``."""
        logits = prototype_scores(pair.online, state["weight"])
        return swav_loss(logits, pair.target, temperature=self.temperature)

    def before_update(self, state: nn.ParameterDict, step: int) -> None:
        """Prototypes without gradient stand still."""
        if step < self.frozen_prototype_steps:
            state["weight"].grad = None


def prototype_scores(
    x: Float[Tensor, "n d"], prototypes: Float[Tensor, "K d"]
) -> Float[Tensor, "n K"]:
    """Cosine similarity of each feature to each prototype, in [-1, 1].

    Only a prototype's direction counts: it is normalised here, in every forward pass, where SwAV
    normalises the parameter itself before each step.
    """
    return functional.normalize(x, dim=1) @ functional.normalize(prototypes, dim=1).T


def sinkhorn(
    scores: Float[Tensor, "n K"], *, epsilon: float, num_iterations: int
) -> Float[Tensor, "n K"]:
    """Codes: soft assignments of the global batch to prototypes in equal shares (arXiv 2006.09882).

    Sinkhorn-Knopp on exp(scores / epsilon), in logarithms, so that no epsilon over- or underflows.
    Each iteration gives all prototypes the same mass over the rows of all processes, then every row
    mass 1. Computed in fp32, or fp64 for fp64 scores. The codes are targets and carry no gradient.

    Args:
        scores: Similarities of the local features to the prototypes.
        epsilon: Entropy of the assignment, in units of the scores; 0.05 in the paper.
        num_iterations: Iterations, at least 1; 3 in the paper.

    Returns:
        Codes of the local rows, each row of sum 1.
    """
    with torch.no_grad():
        log_codes = (scores if scores.dtype == torch.float64 else scores.float()) / epsilon
        for _ in range(num_iterations):
            # The largest and the sum over the rows of all processes.
            largest = dist.gather(log_codes.amax(dim=0, keepdim=True)).amax(dim=0)
            mass = dist.total((log_codes - largest).exp().sum(dim=0))
            log_codes = log_codes - largest - mass.log()
            log_codes = log_codes.log_softmax(dim=1)
        return log_codes.exp()


def swav_loss(
    logits: Float[Tensor, "n K"], codes: Float[Tensor, "n K"], *, temperature: float
) -> Float[Tensor, ""]:
    """Cross entropy of one view's prototype scores against the other's codes (arXiv 2006.09882).

    Args:
        logits: Similarities of the predicting view's features to the prototypes.
        codes: Soft assignments of the target view (``sinkhorn``), rows of sum 1.
        temperature: Divides the logits.

    Returns:
        Scalar, nats.
    """
    return -(codes * functional.log_softmax(logits / temperature, dim=1)).sum(dim=1).mean()
