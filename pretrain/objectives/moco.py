"""MoCo v2+ (arXiv 1911.05722, 2003.04297), with the loss in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float, Int

from common.errors import at_least, positive
from common.lazy import Tensor, functional, nn, torch
from pretrain.features.mixing import Mixing
from pretrain.objectives.base import EmaObjective, Pair

if TYPE_CHECKING:
    from pretrain.features.memory_bank import SupportQueue


@dataclass(frozen=True)
class MoCo(EmaObjective):
    """The EMA branch's projections are positive keys; those of past batches are negatives."""

    architecture: ClassVar = "basic"
    is_per_sample: ClassVar = True
    two_views_only: ClassVar = ""

    name: Literal["moco"] = "moco"
    temperature: float = 0.2
    num_negatives: int = 65536  # entries of each of the two queues of keys
    mixing: Mixing = field(default_factory=Mixing)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "objective", "temperature")
        at_least(self, "objective", num_negatives=1)

    def make_state(self, dim: int, num_samples: int | None = None) -> nn.ModuleList:
        """Queues of the plain keys of view 1 and of view 2."""
        from pretrain.features.memory_bank import SupportQueue

        return nn.ModuleList(SupportQueue(self.num_negatives, dim) for _ in range(2))

    def loss(self, pair: Pair, state: Sequence[SupportQueue]) -> Float[Tensor, ""]:
        """See ``moco_loss``, and ``Mixing`` where something is mixed."""
        queue = state[pair.target_view]
        negatives = queue.features[: queue.num_entries]
        tau, random = self.temperature, pair.random
        if self.mixing.is_on:
            return self.mixing.loss(
                pair.online, pair.target, negatives, temperature=tau, random=random, of_batch=False
            )
        return moco_loss(pair.online, pair.target, negatives, temperature=tau)

    def after_update(
        self,
        state: Sequence[SupportQueue],
        keys: Float[Tensor, "2 m d"],
        sample_ids: Int[Tensor, " m"] | None = None,
    ) -> None:
        """The keys enter the queues."""
        for queue, rows in zip(state, keys, strict=True):
            queue.put(rows)


def moco_loss(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "n d"],
    negatives: Float[Tensor, "K d"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross entropy of one positive key against a queue (MoCo, arXiv 1911.05722 and 2003.04297).

    Args:
        queries: Predictions of one view.
        keys: Positive key of each query.
        negatives: Plain keys of the past; none at all (K = 0) makes the loss 0.
        temperature: Divides the cosine similarities.

    Returns:
        Scalar, nats.
    """
    assert queries.shape == keys.shape, "one key for each query"
    queries, keys = functional.normalize(queries, dim=1), functional.normalize(keys, dim=1)
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ functional.normalize(negatives, dim=1).T], dim=1)
    labels = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    return functional.cross_entropy(logits / temperature, labels)
