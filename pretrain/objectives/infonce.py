"""NNCLR's loss (arXiv 2104.14548); with FA of nearest neighbours it is NNCLR."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxtyping import Float

from common.errors import positive
from common.lazy import Tensor, functional, nn, torch
from pretrain import collectives as dist
from pretrain.features.mixing import Mixing
from pretrain.objectives.base import Objective, Pair


@dataclass(frozen=True)
class InfoNce(Objective):
    """Each target is found among the predictions of the global batch."""

    architecture: ClassVar = "parallel"
    two_views_only: ClassVar = ""

    name: Literal["infonce"] = "infonce"
    temperature: float = 0.2
    mixing: Mixing = field(default_factory=Mixing)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "objective", "temperature")

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """See ``infonce_loss``, and ``Mixing`` where something is mixed."""
        columns, tau = dist.gather(pair.online), self.temperature
        if self.mixing.is_on:
            pairs = (pair.target, pair.online, columns)
            return self.mixing.loss(*pairs, temperature=tau, random=pair.random, of_batch=True)
        first = dist.local_rows(len(pair.target)).start
        return infonce_loss(pair.target, columns, temperature=tau, first_positive=first)


def infonce_loss(
    rows: Float[Tensor, "n d"],
    columns: Float[Tensor, "m d"],
    *,
    temperature: float,
    first_positive: int = 0,
) -> Float[Tensor, ""]:
    """Cross entropy of cosine similarities, one positive per row (arXiv 2104.14548).

    NNCLR's form: rows to columns only.

    Args:
        rows: Targets A(t_2)_i, the local part of the batch.
        columns: Predictions q(z_1)_j of the global batch.
        temperature: Divides the similarities.
        first_positive: Column of row 0's positive; row i's is ``first_positive + i``.

    Returns:
        Scalar, nats.
    """
    logits = functional.normalize(rows, dim=1) @ functional.normalize(columns, dim=1).T
    positives = torch.arange(rows.shape[0], device=rows.device) + first_positive
    return functional.cross_entropy(logits / temperature, positives)
