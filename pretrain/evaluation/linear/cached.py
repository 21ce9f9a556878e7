"""Training on stored features: a sweep over learning rates in the time of one classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pretrain.data.order import counter_rng
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.extract import bar
from pretrain.evaluation.linear.heads import LinearHeads, Score

_MAX_LOGITS = 1 << 22
"""Numbers in the logits of one batch of an evaluation: 17 MB."""


class Rows(Protocol):
    """Features by row, on the disk or in memory."""

    def read(self, rows: np.ndarray) -> Tensor:
        """Float32 [n, dim], on the CPU."""
        ...


def train(
    features: Rows,
    labels: np.ndarray,
    samples: np.ndarray,
    *,
    config: LinearConfig,
    rates: Sequence[float],
    dim: int,
    num_classes: int,
    device: torch.device,
    title: str = "sweep",
) -> LinearHeads:
    """Classifiers trained on some samples.

    Each epoch takes the samples in another order; with several passes of random crops, epoch e
    takes pass e modulo their number. The last batch of an epoch is shorter where need be.

    Args:
        features: Row p * n + i holds sample i in pass p.
        labels: int64 [n], of all samples.
        samples: int64, numbers of those to train on.
        config: Epochs, batch, optimiser, schedule, seed.
        rates: Peak learning rates.
        dim: Of a feature.
        num_classes: Of the labels.
        device: Where the classifiers are.
        title: Of the progress bar.
    """
    heads = LinearHeads(config, dim, num_classes, rates, device)
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
    return heads


def score(
    heads: LinearHeads,
    features: Rows,
    labels: np.ndarray,
    samples: np.ndarray,
    device: torch.device,
) -> dict:
    """Accuracies of each classifier on some samples; see ``Score.figures``."""
    num_heads, num_classes, _ = heads.weight.shape
    score = Score(num_heads, num_classes, device)
    chunk = max(1, min(1024, _MAX_LOGITS // (num_heads * num_classes)))
    for start in range(0, len(samples), chunk):
        part = samples[start : start + chunk]
        logits = heads.logits(features.read(part).to(device))
        score.add(logits, torch.from_numpy(labels[part]).to(device))
    return score.figures()
