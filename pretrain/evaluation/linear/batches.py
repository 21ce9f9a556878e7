"""What classifiers are trained on: stored features, or those of random crops made in each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.data.loader import Loader
from pretrain.data.random_numbers import counter_rng
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.features import Features
from pretrain.evaluation.linear.frozen import FrozenBackbone


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


class CropBatches:
    """The batches of a loader with the features of their first view, computed as they come."""

    def __init__(self, loader: Loader, backbone: FrozenBackbone) -> None:
        self._loader, self._backbone, self.num_steps = loader, backbone, loader.num_steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[FeatureBatch]:
        """Batches ``start_step`` .. of an epoch."""
        for batch in self._loader.epoch(epoch, start_step):
            yield FeatureBatch(self._backbone(batch.views[0]), batch.labels)
