"""The published protocol: pictures are read, cropped and passed through the network every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from pretrain import collectives as dist
from pretrain.data.loader import Loader, TwoViewDataset
from pretrain.data.shards import Subset
from pretrain.engine import checkpoint
from pretrain.engine.stop import StopRequest, stopped
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.extract import Blocks, Extractor, bar, each_block
from pretrain.evaluation.linear.heads import LinearHeads, Score
from pretrain.evaluation.linear.sets import Sets

FORMAT = "fa-linear-checkpoint-1"
NAME = "checkpoint.pth"
_STEPS_PER_LOOK = 10  # for a signal, where several processes have to agree


@dataclass
class Position:
    """Finished steps: of all, and of the epoch that has begun."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


class FullTraining:
    """Classifiers trained on random crops; exact resume at any step.

    Args:
        extractor: The frozen network.
        sets: What to train on.
        config: How.
        folder: Where the checkpoint lies.
        identity: What the result depends on, as plain types; a checkpoint of another is refused.
        device: Of the classifiers.
        resume: Go on from the folder's checkpoint if there is one.
    Attributes:
        curve: For each finished epoch the top-1 accuracy of every classifier on the training
            batches as they came, each before its step, in [0, 1]; None where it was not counted.
    Raises:
        UserError: A checkpoint of another evaluation, or fewer samples than a batch.
    """

    def __init__(
        self, extractor: Extractor, sets: Sets, config: LinearConfig, folder: Path,
        identity: dict[str, Any], device: torch.device, *, resume: bool,
    ) -> None:  # fmt: skip
        self._extractor, self._config, self._device = extractor, config, device
        self._path, self._identity = folder / NAME, identity
        dataset = TwoViewDataset(
            Subset(sets.train, sets.fitted), image_size=extractor.image_size,
            crop_scales=(config.crop_scale,), seed=config.seed,
            flip_probability=config.flip_probability,
        )  # fmt: skip
        self._loader = Loader(
            dataset, batch_size=config.batch_size, rank=dist.rank(), world_size=dist.world_size(),
            num_workers=config.num_workers, shuffle_window=config.shuffle_window,
            last_batch=config.last_batch,
        )  # fmt: skip
        self.steps_per_epoch = self._loader.num_steps
        self.heads = LinearHeads(
            config, extractor.dim, sets.num_classes, config.peak_rates(), device
        )
        self.position = Position()
        self.curve: list[list[float] | None] = []
        self._num_right = torch.zeros(len(config.peak_rates()), device=device)
        self._num_seen = 0
        self.stop = StopRequest()
        if resume and self._path.exists():
            self._restore()

    def _restore(self) -> None:
        state = checkpoint.read(self._path)
        if state.get("format") != FORMAT:
            raise UserError(f"{self._path} is no checkpoint of a linear evaluation; choose another "
                            "--out")  # fmt: skip
        changes = checkpoint.different_keys(state["identity"], self._identity)
        if changes:
            raise UserError(
                f"{self._path} is of another evaluation: {'; '.join(changes)}. Restore these "
                "values to resume, or choose another --out"
            )
        self.heads.load_state_dict(state["heads"])
        self.position = Position(**state["position"])
        kept = state.get("curve")  # checkpoints of earlier versions have none
        self.curve = kept["top1"] if kept else [None] * self.position.epoch
        if kept:
            self._num_seen = kept["num_seen"]
            self._num_right.copy_(kept["num_right"])

    def _save(self) -> None:
        if dist.rank() == 0:
            state = {
                "format": FORMAT,
                "identity": self._identity,
                "heads": self.heads.state_dict(),
                "position": dict(vars(self.position)),
                "curve": {"top1": self.curve, "num_right": self._num_right,
                          "num_seen": self._num_seen},
            }  # fmt: skip
            checkpoint.save(state, self._path)

    def train(self) -> None:
        """To the end of the last epoch.

        Raises:
            StoppedBySignal: After the state was saved.
        """
        total, position = self.steps_per_epoch * self._config.epochs, self.position
        with bar(total, "train", "step", initial=position.step) as progress, self.stop:
            while position.epoch < self._config.epochs:
                for batch in self._loader.epoch(position.epoch, position.step_in_epoch):
                    losses = self._step(batch.views[0], batch.labels)
                    progress.update()
                    if position.step % _STEPS_PER_LOOK == 0:
                        progress.set_postfix(loss=f"{float(losses.min()):.3f}", refresh=False)
                    self._after_step()
                position.epoch, position.step_in_epoch = position.epoch + 1, 0
                self._end_epoch()
        self._save()

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        factor = self._config.lr_factor(self.position.step, self.steps_per_epoch)
        features, labels = self._extractor(images), labels.to(self._device)
        is_right = self.heads.logits(features).argmax(dim=2) == labels[:, None]
        self._num_right += dist.total(is_right.sum(dim=0).float())
        self._num_seen += len(labels) * dist.world_size()
        losses = self.heads.step(features, labels, factor)
        self.position.step += 1
        self.position.step_in_epoch += 1
        return losses

    def _end_epoch(self) -> None:
        self.curve.append((self._num_right / self._num_seen).tolist() if self._num_seen else None)
        self._num_right.zero_()
        self._num_seen = 0

    def _after_step(self) -> None:
        step = self.position.step
        number = 0
        if not dist.is_on() or step % _STEPS_PER_LOOK == 0:
            number = self.stop.agreed(self._device)
        if number or step % self._config.checkpoint_every_steps == 0:
            self._save()
        if number:
            raise stopped(number, step)

    def score(self, samples: Any, title: str) -> dict[str, Any]:
        """Accuracies on central crops of labelled samples; see ``Score.figures``."""
        num_heads, num_classes, _ = self.heads.weight.shape
        score = Score(num_heads, num_classes, self._device)
        labels: np.ndarray = samples.labels

        def see(features: torch.Tensor, ids: torch.Tensor) -> None:
            own = torch.from_numpy(labels[ids.numpy()])
            score.add(self.heads.logits(features), own.to(self._device))

        blocks = Blocks(samples, self._extractor.image_size, 0, self._config)
        each_block(self._extractor, blocks, title, self._config.num_workers, see)
        return score.figures()
