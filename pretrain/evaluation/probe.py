"""Probes of the features while a run goes on: nearest neighbours, and a linear classifier.

The kNN probe looks at two labelled shard sets that pretraining never sees, between epochs. The
online probe learns from the training's own pictures; no gradient reaches the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from common.backbone import Preprocessing
from common.errors import UserError, require
from common.network import shapes_alone
from pretrain import collectives as dist
from pretrain.config import DataConfig, EvalConfig
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.data.loader import central_crops
from pretrain.data.shards import Samples, ShardIndex, num_classes, open_labelled
from pretrain.engine.run_folder import ProgressLog
from pretrain.engine.trainer import Callback, StepResult
from pretrain.features.memory_bank import top_k

_LOWEST_TEMPERATURE = 1e-30  # float32 holds it; the nearest entry alone decides
# Rows compared together: similarities never take more than 512 x 8192 x 4 bytes, 17 MB.
QUERY_CHUNK, BANK_CHUNK = 512, 8192
WORKERS_FROM = 20_000  # pictures; to start workers costs as much as to decode some hundred


# -- features and their neighbours --


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    index: Samples,
    data: DataConfig,
    device: torch.device,
    *,
    image_size: int = 0,
    batch_size: int = 256,
    max_samples: int | None = None,
    may_replace: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Pooled features of centre crops in index order, with BN in eval mode.

    They are written batch by batch into memory that is allocated once, on the CPU.

    Args:
        backbone: Image to pooled features.
        index: What to look at.
        data: Normalisation, and the side of the crop.
        device: Where the backbone is.
        image_size: Side of the crop in pixels, if it is another one.
        batch_size: Pictures looked at together.
        max_samples: Stop after the batch that reaches so many.
        may_replace: Of a sample that does not decode, take the features of another one.
        dtype: What features are stored in. Half precision keeps directions only: rows are brought
            to length 1 first, so that none can overflow.

    Returns:
        Features (CPU), labels (-1 where there is none).
    """
    num = index.num_samples
    if max_samples is not None:
        num = min(num, math.ceil(max_samples / batch_size) * batch_size)
    features = torch.empty(0, 0, dtype=dtype)
    labels = torch.empty(num, dtype=torch.int64)
    was_training = backbone.training
    backbone.eval()
    num_seen = 0
    size = image_size or data.image_size
    pixels = Preprocessing(data.pixel_mean, data.pixel_std)
    num_workers = data.num_workers if num >= WORKERS_FROM else 0
    for batch in central_crops(index, size, batch_size, num_workers, may_replace=may_replace):
        x = pixels.normalise(batch.views[0].to(device))
        computed = backbone(x).float()
        if num_seen == 0:
            features = torch.empty(num, computed.shape[1], dtype=dtype)
        part = slice(num_seen, num_seen + len(batch.labels))
        is_exact = dtype == torch.float32
        features[part] = computed if is_exact else functional.normalize(computed, dim=1)
        labels[part] = batch.labels
        num_seen = part.stop
        if num_seen == num:
            break
    backbone.train(was_training)
    return features, labels


@torch.no_grad()
def knn_grid(
    bank: Float[Tensor, "m d"],
    bank_labels: Int[Tensor, " m"],
    queries: Float[Tensor, "n d"],
    query_labels: Int[Tensor, " n"],
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    device: torch.device | None = None,
) -> list[list[float]]:
    """Shares of queries classified right by exp(similarity / temperature) votes of the k nearest.

    The protocol of Wu et al. (arXiv 1805.01978), for every k with every temperature in one pass
    over the similarities, whose memory is bounded. The bank holds at least the largest k entries.

    Returns:
        Accuracies in [0, 1]: a row for each k, in it a value for each temperature.
    """
    assert len(queries) > 0
    assert len(bank) >= max(ks)
    similarity, nearest = top_k(
        queries, bank, max(ks), is_unit=False, chunk_rows=QUERY_CHUNK, chunk_entries=BANK_CHUNK,
        device=device,
    )  # fmt: skip
    similarity, nearest = similarity.cpu(), nearest.cpu()  # where labels are
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    correct = [[0] * len(temperatures) for _ in ks]
    for start in range(0, len(queries), QUERY_CHUNK):
        part = slice(start, start + QUERY_CHUNK)
        labels = bank_labels[nearest[part]]
        for column, temperature in enumerate(temperatures):
            # As shares of the nearest entry's vote: exp(1 / 0.011) is beyond float32.
            gaps = similarity[part] - similarity[part].amax(dim=1, keepdim=True)
            weights = (gaps / max(temperature, _LOWEST_TEMPERATURE)).exp_()
            for row, k in enumerate(ks):
                votes = torch.zeros(len(weights), num_classes)
                votes.scatter_add_(1, labels[:, :k], weights[:, :k])
                correct[row][column] += int((votes.argmax(dim=1) == query_labels[part]).sum())
    return [[count / len(queries) for count in row] for row in correct]


# -- the probes --


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
        require(
            train.num_samples >= config.knn_k,
            f"eval.knn_k={config.knn_k}, but {config.probe_train} holds {train.num_samples} "
            "samples; lower knn_k",
        )
        return cls(train, val, config, data, device)

    def features(self, backbone: nn.Module, index: Samples) -> tuple[Tensor, Tensor]:
        """Features [n, d] in ``eval.knn_dtype`` and labels [n] of a set or of a part."""
        size, dtype = self.config.image_size, getattr(torch, self.config.knn_dtype)
        return extract_features(
            backbone, index, self.data, self.device, image_size=size, dtype=dtype
        )

    def top1(self, backbone: nn.Module) -> float:
        """Accuracy of the kNN classifier, in [0, 1]."""
        bank, queries = (self.features(backbone, index) for index in (self.train, self.val))
        ks, temperatures = [self.config.knn_k], [self.config.knn_temperature]
        return knn_grid(*bank, *queries, ks=ks, temperatures=temperatures, device=self.device)[0][0]


class KnnCallback(Callback):
    """Rows of kind ``knn``: before the first step and every ``knn_every_epochs`` epochs.

    Args:
        probe: Its sets are looked at by this process alone.
        backbone: Whose features are looked at.
        log: Where rows are written.
    """

    def __init__(self, probe: Probe, backbone: nn.Module, log: ProgressLog) -> None:
        self._probe, self._backbone, self._log = probe, backbone, log

    def on_start(self) -> None:
        """The accuracy of the initial weights stands in an event as well."""
        top1 = self._write_row()
        self._log.write("event", message="kNN before training", knn_top1_initial=top1)

    def on_epoch_end(self) -> None:
        """If the epoch is one of those, or the last."""
        epoch, every = self.trainer.position.epoch, self._probe.config.knn_every_epochs
        if epoch == self.trainer.num_epochs or epoch % every == 0:
            self._write_row()

    def _write_row(self) -> float:
        top1 = self._probe.top1(self._backbone)
        self._log.write("knn", knn_top1=top1)
        return top1


class OnlineProbe(Callback):
    """The classifier, its optimiser (Adam), and what it got right since the last look.

    It starts from zero weights, so that it draws no random number. All processes hold the same:
    gradients and counts are summed over them.

    Args:
        backbone: Whose outputs of the training's forward passes are learnt from.
        num_classes: Of the labels.
        lr: Constant learning rate.
        device: Of the backbone.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, lr: float, device: torch.device
    ) -> None:
        self._lr = lr
        dim = cast(int, backbone.output_dim)
        with shapes_alone():  # draws no random number
            linear = nn.Linear(dim, num_classes)
        self.classifier = linear.to_empty(device=device)
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), lr)
        self._counts = torch.zeros(3, dtype=torch.float64, device=device)  # seen, right, loss
        self._outputs: list[Tensor] = []
        backbone.register_forward_hook(self._note)

    @classmethod
    def open(
        cls, config: EvalConfig, samples: Samples | None, backbone: nn.Module, device: torch.device
    ) -> OnlineProbe | None:
        """The probe of the config, or None where it is off.

        Args:
            config: The eval section.
            samples: What the run trains on; None for a stream.
            backbone: The online network's.
            device: Of the backbone.

        Raises:
            UserError: If no sample has a label, or the number of classes cannot be known.
        """
        if not config.online_probe:
            return None
        if samples is None:
            raise UserError(
                "eval.online_probe=true: a stream does not tell its classes; use "
                "data.streaming=false, or eval.online_probe=false"
            )
        most = int(samples.labels.max(initial=-1))
        require(
            most >= 0,
            "eval.online_probe=true, but no sample of data.shards has a label (several sets keep "
            "theirs only if all have the same classes); make the shards of class folders with "
            "tools/make_shards.py --labels folders, or set eval.online_probe=false",
        )
        return cls(backbone, num_classes(samples, "data.shards"), config.online_probe_lr, device)

    def _note(self, backbone: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():  # cached micro-batches pass twice
            output = output.detach()
            self._outputs.append(output.mean(dim=(2, 3)) if output.ndim == 4 else output)

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """Learn from the step, if it was made."""
        if not result.has_overflowed:
            self.step(batch.samples.labels, len(batch.views))
        self._outputs = []

    def step(self, labels: Int[Tensor, " n"], num_views: int = 2) -> None:
        """One step on the features of both large views; rows labelled -1 are left out.

        So are rows that are not finite.
        A batch without any label has no gradient; Adam's momentum still moves the weights.
        """
        # The step's own forward passes are the last ones; those of an attack come before them.
        outputs: list[Tensor] = []
        while sum(map(len, outputs)) < num_views * len(labels):
            outputs.insert(0, self._outputs.pop())
        # Rows in the order of the batch; the views take turns in the outputs.
        views = [torch.cat(outputs[view::num_views]).float() for view in (0, 1)]
        assert all(len(view) == len(labels) for view in views), [len(view) for view in views]
        features = torch.cat(views)
        is_finite = features.isfinite().all(dim=1)  # the guards look at some steps only
        features = features.nan_to_num_(0, 0, 0)
        labels = labels.repeat(2).where(is_finite, -1)
        logits = self.classifier(features)
        loss = functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        parameters = list(self.classifier.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        seen, right = (labels >= 0).sum(), (logits.argmax(dim=1) == labels).sum()
        counts = torch.stack([seen.float(), right.float(), loss.detach()])
        summed = dist.total(torch.cat([*(g.flatten() for g in gradients), counts]))
        parts = summed.split([*(p.numel() for p in parameters), 3])
        for parameter, part in zip(parameters, parts[:-1], strict=True):
            parameter.grad = (part / summed[-3].clamp(min=1)).view_as(parameter)
        self.optimizer.step()
        self._counts += parts[-1]

    def figures(self) -> dict[str, float]:
        """``online_top1`` and ``online_loss`` since the last call; nothing if no label was seen."""
        seen, right, loss = self._counts.tolist()
        self._counts.zero_()
        return {"online_top1": right / seen, "online_loss": loss / seen} if seen else {}

    def state_dict(self) -> dict[str, Any]:
        """Its entry of the checkpoint."""
        parts = {"classifier": self.classifier, "optimizer": self.optimizer}
        own = {name: part.state_dict() for name, part in parts.items()}
        return {"online_probe": own | {"counts": self._counts}}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a checkpoint; says so where the classifier has to start anew."""
        own = state.get("online_probe")
        if own is None or own["classifier"]["weight"].shape != self.classifier.weight.shape:
            why = "none" if own is None else "one of another size"
            return f"eval.online_probe: the checkpoint holds {why}: the classifier starts anew"
        self.classifier.load_state_dict(own["classifier"])
        self.optimizer.load_state_dict(own["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self._counts.copy_(own["counts"])
        return None
