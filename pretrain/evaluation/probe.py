"""The kNN probe: two labelled shard sets that pretraining never sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from pretrain.config import DataConfig, EvalConfig
from pretrain.data.index.mixture import Samples
from pretrain.data.index.shards import ShardIndex
from pretrain.evaluation.features import extract_features
from pretrain.evaluation.knn import knn_top1


@dataclass(frozen=True)
class Probe:
    """Bank (``train``) and queries (``val``) of the probe, and how it looks at them."""

    train: ShardIndex
    val: ShardIndex
    config: EvalConfig
    data: DataConfig
    device: torch.device

    @classmethod
    def open(cls, config: EvalConfig, data: DataConfig, device: torch.device) -> Probe | None:
        """The probe of the config, or None where none is set.

        Raises:
            UserError: Unlabelled shards, other classes in the two sets, fewer samples than k.
        """
        if config.probe_train is None or config.probe_val is None:
            return None
        train = ShardIndex.open(config.probe_train, data.cache)
        val = ShardIndex.open(config.probe_val, data.cache)
        for path, index in ((config.probe_train, train), (config.probe_val, val)):
            if len(index.labels) == 0 or int(index.labels.min()) < 0:
                raise UserError(
                    f"probe shards {path} hold samples without labels; make them of class folders "
                    "with tools/make_shards.py, or leave eval.probe_train and eval.probe_val out"
                )
        if train.classes != val.classes:
            raise UserError(
                f"probe shards differ in classes: {config.probe_train} has {train.classes}, "
                f"{config.probe_val} has {val.classes}; make both of the same class folders"
            )
        if train.num_samples < config.knn_k:
            raise UserError(
                f"eval.knn_k={config.knn_k}, but {config.probe_train} holds {train.num_samples} "
                "samples; lower knn_k"
            )
        return cls(train, val, config, data, device)

    def features(
        self,
        backbone: nn.Module,
        index: Samples,
        each_batch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features [n, d] in ``eval.knn_dtype`` and labels [n] of a set or of a part.

        ``each_batch`` is called with the features (float32) and the labels of every batch.
        """
        features, labels, _ = extract_features(
            backbone,
            index,
            image_size=self.config.image_size or self.data.image_size,
            mean=self.data.pixel_mean,
            std=self.data.pixel_std,
            device=self.device,
            dtype=getattr(torch, self.config.knn_dtype),
            each_batch=each_batch,
        )
        return features, labels

    def top1(
        self, backbone: nn.Module, each_batch: Callable[[Tensor, Tensor], None] | None = None
    ) -> float:
        """Accuracy of the kNN classifier, in [0, 1]; ``each_batch`` sees the validation set."""
        bank, bank_labels = self.features(backbone, self.train)
        queries, labels = self.features(backbone, self.val, each_batch)
        return knn_top1(
            bank,
            bank_labels,
            queries,
            labels,
            k=self.config.knn_k,
            temperature=self.config.knn_temperature,
            device=self.device,
        )
