"""Features mixed within a contrastive loss, so that its positives and negatives are harder.

Synthetic hard negatives: MoCHi (arXiv 2010.01028, section 3). Extrapolated positives, interpolated
negatives: arXiv 2108.02982, as in its authors' code. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from common.errors import at_least
from common.lazy import Tensor, functional, torch
from pretrain.features.augmentations.base import RowRandom


@dataclass(frozen=True)
class Mixing:
    """What is mixed; by default nothing."""

    num_hardest: int = 1024  # N of MoCHi: so many negatives of each anchor are mixed
    num_pairs: int = 0  # s: synthetic negatives of each anchor, of two of them
    num_with_anchor: int = 0  # s': of one of them and the anchor itself
    extrapolate: float = 0.0  # alpha_ex of Beta, by which a positive pair moves apart; 2.0
    interpolate: float = 0.0  # alpha_in of Beta, by which negatives mix in pairs; 1.6

    def __post_init__(self) -> None:
        at_least(self, "objective.mixing", num_hardest=1, num_pairs=0, num_with_anchor=0)
        at_least(self, "objective.mixing", extrapolate=0, interpolate=0)

    @property
    def is_on(self) -> bool:
        """Whether anything is mixed."""
        return bool(self.num_pairs or self.num_with_anchor or self.extrapolate or self.interpolate)

    def loss(
        self,
        anchors: Float[Tensor, "n d"],
        positives: Float[Tensor, "n d"],
        negatives: Float[Tensor, "m d"],
        *,
        temperature: float,
        random: RowRandom | None,
        of_batch: bool,
    ) -> Float[Tensor, ""]:
        """Cross entropy of one positive against plain, interpolated and synthetic negatives.

        With anchor a, its positive k and negatives n, all normalised first:

            extrapolate   a + b (a - k) and k - b (a - k) replace a and k; b ~ Beta, by dimension
            interpolate   w n_j + (1 - w) n_pi(j) replaces n_j; pi a permutation, w ~ Beta likewise
            num_pairs     u n_i + (1 - u) n_j, normalised, is added; u ~ U(0, 1)
            num_with_anchor   u a + (1 - u) n_j, normalised, is added; u ~ U(0, 1/2)

        The n_i and n_j of the last two are drawn from the anchor's ``num_hardest`` negatives of the
        largest similarity. What is added has no gradient, so that only the anchor of its logit has.

        Args:
            anchors: Features of the local rows.
            positives: One for each anchor.
            negatives: For all anchors; the same on every process. None at all (m = 0): loss 0.
            temperature: Divides the similarities.
            random: Draws for these rows.
            of_batch: The negatives are the global batch's rows, once or several times. What was
                made of an anchor's own row is none of its negatives, also after interpolation.

        Returns:
            Scalar, nats.
        """
        assert random is not None
        assert len(anchors) == random.rows.stop - random.rows.start
        anchors, positives, negatives = (
            functional.normalize(x, dim=1) for x in (anchors, positives, negatives)
        )
        (m, dim), device, dtype = negatives.shape, anchors.device, anchors.dtype
        if self.extrapolate > 0:
            apart = random.beta(self.extrapolate, dim, dtype=dtype) * (anchors - positives)
            anchors, positives = anchors + apart, positives - apart
        rows = torch.arange(random.rows.start, random.rows.stop, device=device)
        owners = torch.arange(m, device=device) % random.num_rows
        is_own = (rows[:, None] == owners) & of_batch
        num_own = m // random.num_rows if of_batch else 0  # at most, for each anchor
        if self.interpolate > 0 and m > 0:
            partner = torch.randperm(m, generator=random.generator, device=device)
            share = RowRandom.whole(random.generator, m).beta(self.interpolate, dim, dtype=dtype)
            negatives = share * negatives + (1 - share) * negatives[partner]
            is_own, num_own = is_own | is_own[:, partner], 2 * num_own
        similarity = (anchors @ negatives.T).masked_fill(is_own, -torch.inf)
        logits = [(anchors * positives).sum(dim=1, keepdim=True), similarity]

        num_hardest = min(self.num_hardest, m - num_own)
        if num_hardest > 0 and self.num_pairs + self.num_with_anchor > 0:
            hardest = similarity.detach().topk(num_hardest, dim=1).indices

            def drawn(num: int) -> Float[Tensor, "n num d"]:
                which = random.integers(num_hardest, num)
                return negatives.detach()[hardest.gather(1, which)]

            made = []
            if self.num_pairs > 0:
                share = random.uniform(self.num_pairs, 1, dtype=dtype)
                made.append(share * drawn(self.num_pairs) + (1 - share) * drawn(self.num_pairs))
            if self.num_with_anchor > 0:
                share = random.uniform(self.num_with_anchor, 1, dtype=dtype) / 2
                own = anchors.detach()[:, None]
                made.append(share * own + (1 - share) * drawn(self.num_with_anchor))
            synthetic = functional.normalize(torch.cat(made, dim=1), dim=2)
            logits.append(torch.einsum("nd,nsd->ns", anchors, synthetic))
        labels = torch.zeros(len(anchors), dtype=torch.int64, device=device)
        return functional.cross_entropy(torch.cat(logits, dim=1) / temperature, labels)
