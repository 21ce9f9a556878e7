"""Several linear classifiers on the same features, one for each learning rate, trained at once.

Their weights are one tensor, so that a step is two matrix products whatever their number. Gradients
are written out (softmax minus one-hot): nothing is kept for a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pretrain import collectives as dist
from pretrain.data.random_numbers import counter_rng
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.extract import FeatureFile, bar


class LinearHeads:
    """``len(rates)`` classifiers that start from the same weights and differ in their rate only.

    SGD as torch.optim.SGD without dampening, LARS as ``pretrain.engine.optim.LARS``, each
    classifier's weight and bias being layers of their own. Under torchrun all processes hold the
    same: gradients are summed over them.

    Args:
        config: Optimiser, momentum, decay, start.
        dim: Of the features.
        num_classes: Of the labels.
        rates: Peak learning rate of each classifier.
        device: Where they are.
    Attributes:
        weight: float32 [heads, classes, dim].
        bias: float32 [heads, classes].
    """

    def __init__(
        self, config: LinearConfig, dim: int, num_classes: int, rates: Sequence[float],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        start = torch.randn(num_classes, dim, generator=generator) * config.init_std
        self.weight = start.to(device).repeat(len(rates), 1, 1)
        self.bias = torch.zeros(len(rates), num_classes, device=device)
        self._momentum = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self._rates = torch.tensor(list(rates), dtype=torch.float32, device=device)

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n heads classes"]:
        """Of every classifier."""
        heads, classes, dim = self.weight.shape
        flat = torch.addmm(self.bias.view(-1), features, self.weight.view(heads * classes, dim).T)
        return flat.view(len(features), heads, classes)

    @torch.no_grad()
    def step(
        self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], lr_factor: float
    ) -> Float[Tensor, " heads"]:
        """One optimiser step of all classifiers on one batch.

        Args:
            features: This process's part of the batch, float32; all parts have the same length.
            labels: Of these rows.
            lr_factor: What the schedule makes of the peak rates.
        Returns:
            Mean cross-entropy of each classifier before the step, of this process's part.
        """
        n, (heads, classes, dim) = len(labels), self.weight.shape
        flat = self.weight.view(heads * classes, dim)
        logits = torch.addmm(self.bias.view(-1, 1), flat, features.T).view(heads, classes, n)
        own = labels.view(1, 1, n).expand(heads, 1, n)
        losses = -logits.log_softmax(dim=1).gather(1, own).mean(dim=(1, 2))
        # Classes before samples: a softmax along the last, short dimension takes ten times as long.
        delta = logits.softmax(dim=1)
        delta.scatter_add_(1, own, delta.new_full((1, 1, 1), -1.0).expand_as(own))
        delta = delta.div_(n * dist.world_size()).view(heads * classes, n)
        gradients = [(delta @ features).view(heads, classes, dim), delta.sum(dim=1).view(heads, -1)]
        config, rates = self.config, self._rates * lr_factor
        for w, g, kept in zip((self.weight, self.bias), gradients, self._momentum, strict=True):
            g = dist.total(g)
            per_head = (-1, *[1] * (w.ndim - 1))
            if config.weight_decay:
                g = g.add(w, alpha=config.weight_decay)
            if config.optimizer == "lars":
                w_norm, g_norm = (x.flatten(1).norm(dim=1) for x in (w, g))
                ratio = config.lars_eta * w_norm / g_norm
                ratio = torch.where((w_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))
                g = g * ratio.view(per_head)
            kept.mul_(config.momentum).add_(g)
            change = g + config.momentum * kept if config.nesterov else kept
            w.sub_(change * rates.view(per_head))
        return losses

    def state_dict(self) -> dict[str, Any]:
        """Weights and momentum."""
        return {"weight": self.weight, "bias": self.bias, "momentum": self._momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        own = (self.weight, self.bias, *self._momentum)
        for mine, saved in zip(
            own, (state["weight"], state["bias"], *state["momentum"]), strict=True
        ):
            mine.copy_(saved)


TOP = 5


@torch.no_grad()
def places(
    logits: Float[Tensor, "n heads classes"], labels: Int[Tensor, " n"]
) -> Int[Tensor, "n heads"]:
    """Place of the right class in each classifier's order, from 0.

    Of equal logits the lower number comes first; a right class whose logit is not finite is last.
    """
    logits = logits.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    labels = labels.view(-1, 1, 1)
    own = logits.gather(2, labels.expand(-1, logits.shape[1], 1))
    numbers = torch.arange(logits.shape[2], device=labels.device)
    is_before = (logits > own) | ((logits == own) & (numbers < labels))
    return is_before.sum(dim=2).masked_fill(~own.squeeze(2).isfinite(), logits.shape[2])


def accuracies(
    place: Int[Tensor, "n heads"], labels: Int[Tensor, " n"], num_classes: int
) -> dict[str, Any]:
    """``n``, ``top1`` and ``top5`` [heads], ``per_class`` [heads][classes], in [0, 1].

    A class without samples has None; ``top5`` is None where there are no more than 5 classes.
    """
    right = (place == 0).double()
    seen = labels.bincount(minlength=num_classes)
    of_class = right.new_zeros(num_classes, place.shape[1]).index_add_(0, labels, right)
    shares = (of_class / seen.clamp_min(1)[:, None]).T.tolist()
    return {
        "n": len(labels),
        "top1": right.mean(dim=0).tolist(),
        "top5": (place < TOP).double().mean(dim=0).tolist() if num_classes > TOP else None,
        "per_class": [
            [share if num else None for share, num in zip(row, seen.tolist(), strict=True)]
            for row in shares
        ],
    }


def best(top1: Sequence[float], rates: Sequence[float]) -> int:
    """The classifier with the highest accuracy; of equal ones the one with the lowest rate."""
    return min(range(len(rates)), key=lambda i: (-top1[i], rates[i]))


_MAX_LOGITS = 1 << 22  # numbers in the logits of one batch of an evaluation: 17 MB


def train(
    heads: LinearHeads, features: FeatureFile, labels: np.ndarray, samples: np.ndarray, *,
    title: str = "sweep",
) -> None:  # fmt: skip
    """Train classifiers on some samples.

    Each epoch takes the samples in another order; with several passes of random crops, epoch e
    takes pass e modulo their number. The last batch of an epoch is shorter where need be.

    Args:
        heads: The classifiers, which hold the config.
        features: Row p * n + i holds sample i in pass p.
        labels: int64 [n], of all samples.
        samples: int64, numbers of those to train on.
        title: Of the progress bar.
    """
    config, device = heads.config, heads.weight.device
    steps_per_epoch = -(-len(samples) // config.batch_size)
    step = 0
    with bar(config.epochs * steps_per_epoch, title, "step") as progress:
        for epoch in range(config.epochs):
            first_row = epoch % max(1, config.passes) * len(labels)
            order = counter_rng("linear-order", config.seed, epoch).permutation(samples)
            for start in range(0, len(order), config.batch_size):
                batch = order[start : start + config.batch_size]
                x = features.read(first_row + batch).to(device)
                y = torch.from_numpy(labels[batch]).to(device)
                heads.step(x, y, config.lr_factor(step, steps_per_epoch))
                step += 1
            progress.update(steps_per_epoch)


def score(
    heads: LinearHeads,
    features: FeatureFile,
    labels: np.ndarray,
    samples: np.ndarray | None = None,
) -> dict[str, Any]:
    """Accuracies of each classifier on some samples, or on all; see ``accuracies``."""
    samples = np.arange(len(labels)) if samples is None else samples
    num_heads, num_classes, _ = heads.weight.shape
    chunk = max(1, min(1024, _MAX_LOGITS // (num_heads * num_classes)))
    found, right = [], torch.from_numpy(labels[samples])
    for start in range(0, len(samples), chunk):
        part = slice(start, start + chunk)
        logits = heads.logits(features.read(samples[part]).to(heads.weight.device))
        found.append(places(logits, right[part].to(logits.device)).cpu())
    return accuracies(torch.cat(found), right, num_classes)
