"""What the features look like while they train.

All figures are of the direction 1 -> 2 and of this process's rows, in one micro-batch where there
are several: ``n`` rows of width ``d``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pretrain.model.joint_embedding import StepOutput


@torch.no_grad()
def feature_std(z: Float[Tensor, "n d"]) -> float:
    """Mean std per dimension of the normalised features, times sqrt(d) (SimSiam, section 4.1).

    About 1 for features spread over the sphere, 0 when collapsed.
    """
    normalised = functional.normalize(z.float(), dim=1)
    return float(normalised.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5)


@torch.no_grad()
def effective_rank(z: Float[Tensor, "n d"]) -> float:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli, 2007).

    Of the centred, normalised features: between 1 and min(n, d); 0 if all rows are the same.
    """
    normalised = functional.normalize(z.double(), dim=1)
    singular = torch.linalg.svdvals(normalised - normalised.mean(dim=0))
    total = singular.sum()
    if total <= 1e-12 * z.shape[0]:
        return 0.0
    shares = singular / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def mean_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Mean cosine similarity between rows: how far FA moved them."""
    return float(functional.cosine_similarity(a.float(), b.float(), dim=1).mean())


NUM_BINS = 20  # of the histograms, from cosine -1 to 1


def diagnose(output: StepOutput) -> dict[str, float]:
    """Figures of one step's features.

    Returns:
        ``feature_std``, ``effective_rank``: of the projections, see statistics.py.
        ``fa_cosine``: mean cosine between what FA took and what it made.
        ``positive_cosine``, ``negative_cosine``: mean cosine between what predicts and what is
        predicted, for the two views of a sample and for views of two samples; ``.._std`` is the
        deviation over the pairs. A single row has no negatives: their keys are absent.
    """
    figures = {
        "feature_std": feature_std(output.projection),
        "effective_rank": effective_rank(output.projection),
        "fa_cosine": mean_cosine(output.original, output.augmented),
    }
    for name, cosines in _cosines(output).items():
        if len(cosines):
            figures[f"{name}_cosine"] = float(cosines.mean())
            figures[f"{name}_cosine_std"] = float(cosines.std(correction=0))
    return figures


def similarity_histograms(output: StepOutput) -> dict[str, list[float]]:
    """Share of the positive and of the negative pairs in each of ``NUM_BINS`` equal bins."""
    shares = {}
    for name, cosines in _cosines(output).items():
        counts = torch.histc(cosines.cpu(), bins=NUM_BINS, min=-1, max=1)
        shares[f"{name}s"] = [round(x, 6) for x in (counts / max(len(cosines), 1)).tolist()]
    return shares


@torch.no_grad()
def _cosines(output: StepOutput) -> dict[str, Tensor]:
    """Cosines between what predicts and what is predicted: n positives, n (n - 1) negatives."""
    online, target = (
        functional.normalize(x.float(), dim=1) for x in (output.online, output.target)
    )
    cosines: Float[Tensor, "n n"] = (online @ target.T).clamp(-1, 1)
    others = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    return {"positive": cosines.diagonal(), "negative": cosines[others]}
