"""SimCLR (arXiv 2002.05709)."""

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
class SimClr(Objective):
    """Each target is found among both views of the global batch."""

    architecture: ClassVar = "basic"
    two_views_only: ClassVar = (
        "NT-Xent takes either view of a pair as the anchor, and a small crop is never predicted"
    )

    name: Literal["simclr"] = "simclr"
    temperature: float = 0.2
    mixing: Mixing = field(default_factory=Mixing)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "objective", "temperature")

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """See ``nt_xent_loss``, and ``Mixing`` where something is mixed."""
        columns, others = dist.gather(pair.online), dist.gather(pair.plain_target)
        tau = self.temperature
        if self.mixing.is_on:
            pairs = (pair.target, pair.online, torch.cat([columns, others]))
            return self.mixing.loss(*pairs, temperature=tau, random=pair.random, of_batch=True)
        first = dist.local_rows(len(pair.target)).start
        return nt_xent_loss(pair.target, columns, others, temperature=tau, first_positive=first)


def nt_xent_loss(
    rows: Float[Tensor, "n d"],
    columns: Float[Tensor, "m d"],
    others: Float[Tensor, "m d"],
    *,
    temperature: float,
    first_positive: int = 0,
) -> Float[Tensor, ""]:
    """Cross entropy of cosine similarities over both views of the batch (arXiv 2002.05709, eq. 1).

    SimCLR's NT-Xent with the anchor on the target side. Without FA and predictor (``rows`` are the
    local part of ``others``) the mean of this loss over the two orders of the views is the textbook
    loss over 2m samples.

    Args:
        rows: Targets A(t_2)_i, the local part of the batch: the anchors.
        columns: Predictions q(z_1)_j of the global batch; row i's positive is its own number.
        others: Un-augmented z_2,j of the global batch, negatives of every row but their own.
        temperature: Divides the similarities.
        first_positive: Number of row 0 in the global batch; row i's is ``first_positive + i``.

    Returns:
        Scalar, nats.
    """
    assert others.shape == columns.shape, "both are of the global batch"
    rows = functional.normalize(rows, dim=1)
    own = torch.arange(rows.shape[0], device=rows.device) + first_positive
    to_columns = rows @ functional.normalize(columns, dim=1).T
    to_others = rows @ functional.normalize(others, dim=1).T
    is_own = own[:, None] == torch.arange(others.shape[0], device=rows.device)
    logits = torch.cat([to_columns, to_others.masked_fill(is_own, -torch.inf)], dim=1)
    return functional.cross_entropy(logits / temperature, own)
