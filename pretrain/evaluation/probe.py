"""The kNN probe: two labelled shard sets that pretraining never sees, looked at between epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from common.errors import UserError
from pretrain.config import DataConfig, EvalConfig
from pretrain.data.loader import central_crops
from pretrain.data.shards import Samples, ShardIndex, open_labelled
from pretrain.engine.run_folder import ProgressLog
from pretrain.engine.trainer import Callback
from pretrain.evaluation.knn import knn_top1
from pretrain.evaluation.online_probe import OnlineProbe


def normalise(
    images: UInt8[Tensor, "n 3 s s"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[Tensor, "n 3 s s"]:
    """(image / 255 - mean) / std per channel, float32."""
    shape = (1, 3, 1, 1)
    x = images.float().div_(255)
    return x.sub_(x.new_tensor(mean).view(shape)).div_(x.new_tensor(std).view(shape))


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    index: Samples,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device,
    batch_size: int = 256,
    max_samples: int | None = None,
    dtype: torch.dtype = torch.float32,
    each_batch: Callable[[Float[Tensor, "n d"], Int[Tensor, " n"]], None] | None = None,
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Pooled features of centre crops in index order, with BN in eval mode.

    They are written batch by batch into memory that is allocated once, on the CPU.

    Args:
        backbone: Image to pooled features.
        index: What to look at.
        image_size: Side of the crop, pixels.
        mean: Of the normalisation, RGB.
        std: Of the normalisation, RGB.
        device: Where the backbone is.
        batch_size: Pictures looked at together.
        max_samples: Stop after the batch that reaches so many.
        dtype: What features are stored in. Half precision keeps directions only: rows are brought
            to length 1 first, so that none can overflow.
        each_batch: Called with each batch's features (float32, on ``device``) and labels.

    Returns:
        Features (CPU), labels (-1 where there is none), sample ids.
    """
    num = index.num_samples
    if max_samples is not None:
        num = min(num, math.ceil(max_samples / batch_size) * batch_size)
    features = torch.empty(0, 0, dtype=dtype)
    labels, ids = (torch.empty(num, dtype=torch.int64) for _ in range(2))
    was_training = backbone.training
    backbone.eval()
    num_seen = 0
    for batch in central_crops(index, image_size, batch_size):
        computed = backbone(normalise(batch.views[0].to(device), mean, std)).float()
        if each_batch is not None:
            each_batch(computed, batch.labels)
        if num_seen == 0:
            features = torch.empty(num, computed.shape[1], dtype=dtype)
        part = slice(num_seen, num_seen + len(batch.labels))
        is_exact = dtype == torch.float32
        features[part] = computed if is_exact else functional.normalize(computed, dim=1)
        labels[part], ids[part] = batch.labels, batch.sample_ids
        num_seen = part.stop
        if num_seen == num:
            break
    backbone.train(was_training)
    return features, labels, ids


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
        sets = {"eval.probe_train": config.probe_train, "eval.probe_val": config.probe_val}
        train, val = open_labelled(sets, data.cache)
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
        config, bank = self.config, self.features(backbone, self.train)
        queries = self.features(backbone, self.val, each_batch)
        k, temperature = config.knn_k, config.knn_temperature
        return knn_top1(*bank, *queries, k=k, temperature=temperature, device=self.device)


class KnnCallback(Callback):
    """Rows of kind ``knn``: before the first step and every ``knn_every_epochs`` epochs.

    Args:
        probe: Its sets are looked at by this process alone.
        online: Its accuracy on the validation set stands beside, if the classes are the same.
        backbone: Whose features are looked at.
        log: Where rows are written.
    """

    def __init__(
        self, probe: Probe, online: OnlineProbe | None, backbone: nn.Module, log: ProgressLog
    ) -> None:
        if online is None or online.classes is None or online.classes != probe.val.classes:
            online = None
        self._probe, self._online, self._backbone, self._log = probe, online, backbone, log

    def on_start(self) -> None:
        """The accuracy of the initial weights stands in an event as well."""
        top1 = self._write_row()
        self._log.write("event", message="kNN before training", knn_top1_initial=top1)

    def on_epoch_end(self) -> None:
        """If the epoch is one of those, or the last."""
        epoch, every = self.trainer.position.epoch, self._probe.config.knn_every_epochs
        if epoch == self.trainer.num_epochs or epoch % every == 0:
            self._write_row()

    @torch.no_grad()
    def _write_row(self) -> float:
        online, num_right = self._online, 0

        def judge(features: Tensor, labels: Tensor) -> None:
            nonlocal num_right
            if online is not None:
                predicted = online.classifier(features).argmax(dim=1).cpu()
                num_right += int((predicted == labels).sum())

        row = {"knn_top1": self._probe.top1(self._backbone, judge)}
        if online is not None:
            row["online_top1_val"] = num_right / self._probe.val.num_samples
        self._log.write("knn", **row)
        return row["knn_top1"]
