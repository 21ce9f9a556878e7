"""Several linear classifiers on the same features, one for each learning rate, trained at once.

Their weights are one tensor, so that a step is a few matrix products whatever their number: for ten
classifiers as many ``nn.Linear`` and groups of an optimiser take two to four times as long where
features are short, and save no time where they are long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pretrain import collectives as dist
from pretrain.data.loader import Loader
from pretrain.data.random_numbers import counter_rng
from pretrain.engine.trainer import Position, StepResult
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.features import Features, FrozenBackbone

TOP = 5
_MAX_LOGITS = 1 << 22  # numbers in the logits of one batch of an evaluation: 17 MB


@dataclass(frozen=True)
class FeatureBatch:
    """Features [n, d] and labels [n] of this process's part of a batch, on any device."""

    features: Tensor
    labels: Tensor
    waited: float = 0.0  # seconds, and pictures that were replaced: what the loop counts
    num_bad: int = 0


class StoredBatches:
    """Batches of stored features: each epoch takes the samples in another order.

    With several passes of random crops, epoch e takes pass e modulo their number. The last batch of
    an epoch is shorter where need be.

    Args:
        features: Features of the samples, pass by pass.
        samples: int64, numbers of those to train on.
        config: Seed, batch size, passes.
    """

    def __init__(self, features: Features, samples: np.ndarray, config: LinearConfig) -> None:
        self._features, self._samples, self._config = features, samples, config
        self.num_steps = -(-len(samples) // config.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[FeatureBatch]:
        """Batches ``start_step`` .. of an epoch."""
        config, features = self._config, self._features
        first_row = epoch % max(1, config.passes) * len(features.labels)
        order = counter_rng("linear-order", config.seed, epoch).permutation(self._samples)
        for start in range(start_step * config.batch_size, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            labels = torch.from_numpy(features.labels[batch])
            yield FeatureBatch(features.read(first_row + batch), labels)

    def close(self) -> None:
        """Nothing prepares them."""


class CropBatches:
    """The batches of a loader with the features of their first view, computed as they come."""

    def __init__(self, loader: Loader, backbone: FrozenBackbone) -> None:
        self._loader, self._backbone, self.num_steps = loader, backbone, loader.num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[FeatureBatch]:
        """Batches ``start_step`` .. of an epoch."""
        for batch in self._loader.epoch(epoch, start_step):
            yield FeatureBatch(self._backbone(batch.views[0]), batch.labels)

    def close(self) -> None:
        """End the loader's workers."""
        self._loader.close()


class LinearHeads:
    """A ``Task``: classifiers that start from the same weights and differ in their rate only.

    SGD as torch.optim.SGD without dampening, LARS as ``pretrain.engine.optim.LARS``, each
    classifier's weight and bias being layers of their own. Under torchrun all processes hold the
    same: gradients are summed over them.

    Args:
        config: Optimiser, momentum, decay, schedule, start.
        rates: Peak learning rate of each classifier.
        dim: Of the features.
        num_classes: Of the labels.
        steps_per_epoch: For the schedule.
        device: Where they are.
    Attributes:
        weight: float32 [heads, classes, dim].
        bias: float32 [heads, classes].
        num_right: float32 [epochs, heads], samples that were right before their step.
        num_seen: float32 [epochs, 1], all samples.
    """

    def __init__(
        self, config: LinearConfig, rates: Sequence[float], dim: int, num_classes: int,
        steps_per_epoch: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._config, self._steps_per_epoch = config, steps_per_epoch
        generator = torch.Generator().manual_seed(config.seed)
        start = torch.randn(num_classes, dim, generator=generator) * config.init_std
        self.weight = start.to(device).repeat(len(rates), 1, 1).requires_grad_()
        self.bias = torch.zeros(len(rates), num_classes, device=device, requires_grad=True)
        self._momentum = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.num_right = torch.zeros(config.epochs, len(rates), device=device)
        self.num_seen = torch.zeros(config.epochs, 1, device=device)
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "heads classes n"]:
        """Of every classifier.

        Classes come before samples: a softmax along a last, short dimension takes ten times as
        long.
        """
        heads, classes, dim = self.weight.shape
        flat = torch.addmm(self.bias.view(-1, 1), self.weight.view(-1, dim), features.T)
        return flat.view(heads, classes, len(features))

    def step(
        self, batch: FeatureBatch, position: Position, *, is_logged: bool = False,
        is_saved: bool = False,
    ) -> StepResult:  # fmt: skip
        """One optimiser step of all classifiers; see ``Task``.

        The result holds the lowest of their mean cross-entropies before the step.
        """
        config, parameters = self._config, (self.weight, self.bias)
        logits = self.logits(batch.features.to(self.weight.device))
        labels = batch.labels.to(logits.device).expand(len(logits), -1)
        losses = functional.cross_entropy(logits, labels, reduction="none").mean(dim=1)
        gradients = torch.autograd.grad(losses.sum() / dist.world_size(), parameters)
        epoch = position.step // self._steps_per_epoch
        self.num_right[epoch] += dist.total((logits.argmax(dim=1) == labels).sum(dim=1).float())
        self.num_seen[epoch] += len(batch.labels) * dist.world_size()
        rates = self._rates * config.lr_factor(position.step, self._steps_per_epoch)
        with torch.no_grad():
            for w, g, momentum in zip(parameters, gradients, self._momentum, strict=True):
                g = dist.total(g)
                per_head = (-1, *[1] * (w.ndim - 1))
                if config.weight_decay:
                    g = g.add(w, alpha=config.weight_decay)
                if config.optimizer == "lars":
                    w_norm, g_norm = (x.flatten(1).norm(dim=1) for x in (w, g))
                    ratio = config.lars_eta * w_norm / g_norm
                    ratio = torch.where((w_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))
                    g = g * ratio.view(per_head)
                momentum.mul_(config.momentum).add_(g)
                change = g + config.momentum * momentum if config.nesterov else momentum
                w.sub_(change * rates.view(per_head))
        return StepResult(losses.detach().min())

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum and counts: its entry of the checkpoint."""
        own = [self.weight.detach(), self.bias.detach(), *self._momentum]
        return {"heads": [*own, self.num_right, self.num_seen]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Go on from a checkpoint of the same evaluation."""
        for own, saved in zip(self.state_dict()["heads"], state["heads"], strict=True):
            own.copy_(saved)
        return []


@dataclass(frozen=True)
class Scores:
    """Accuracies in [0, 1] of a classifier on a set.

    Attributes:
        n: Samples.
        top1: The highest logit is the right class's.
        top5: It is among the five highest; None where there are no more than 5 classes.
        per_class: ``top1`` of each class; None for a class without samples.
    """

    n: int
    top1: float
    top5: float | None
    per_class: dict[str, float | None]


@torch.no_grad()
def score(
    heads: LinearHeads, features: Features, classes: Sequence[str], rows: np.ndarray
) -> list[Scores]:
    """Scores of each classifier on some rows of the features, in bounded memory.

    Of equal logits the lower class comes first; a right class whose logit is not finite comes last.

    Args:
        heads: The classifiers.
        features: Of central crops.
        classes: Names of the labels.
        rows: int64, numbers of the rows that count.
    """
    device, (num_heads, num_classes, _) = heads.weight.device, heads.weight.shape
    chunk = max(1, min(1024, _MAX_LOGITS // (num_heads * num_classes)))
    numbers, parts = torch.arange(num_classes, device=device).view(-1, 1), []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        y = torch.from_numpy(features.labels[part]).to(device)
        logits = heads.logits(features.read(part).to(device))
        logits = logits.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        own = logits.gather(1, y.expand(num_heads, 1, -1))
        is_before = (logits > own) | ((logits == own) & (numbers < y))
        place = is_before.sum(dim=1).masked_fill(~own.squeeze(1).isfinite(), num_classes)
        parts.append(place.cpu())
    places = torch.cat(parts, dim=1).numpy()  # 0: the highest logit
    own_labels = features.labels[rows]
    counts = np.bincount(own_labels, minlength=num_classes).tolist()
    scores = []
    for place in places:
        num_right = np.bincount(own_labels[place == 0], minlength=num_classes).tolist()
        shares = [right / n if n else None for right, n in zip(num_right, counts, strict=True)]
        top5 = float(np.mean(place < TOP)) if num_classes > TOP else None
        per_class = dict(zip(classes, shares, strict=True))
        scores.append(Scores(len(rows), float(np.mean(place == 0)), top5, per_class))
    return scores
