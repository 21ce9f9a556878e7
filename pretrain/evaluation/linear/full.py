"""The published protocol: pictures are read, cropped and passed through the network every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.errors import require
from pretrain import collectives as dist
from pretrain.data.loader import Loader
from pretrain.data.shards import Subset
from pretrain.engine import checkpoint
from pretrain.engine.stop import StopRequest, stopped
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.extract import Extractor, bar, random_crops
from pretrain.evaluation.linear.heads import LinearHeads
from pretrain.evaluation.linear.sets import Sets

FORMAT = "fa-linear-checkpoint-1"
NAME = "checkpoint.pth"
_STEPS_PER_LOOK = 10  # for a signal, where several processes have to agree


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
        step: Finished steps of all epochs.
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
        self._loader = Loader(
            random_crops(Subset(sets.train, sets.fitted), extractor.image_size, config),
            batch_size=config.batch_size, rank=dist.rank(), world_size=dist.world_size(),
            num_workers=config.num_workers, shuffle_window=config.shuffle_window,
            last_batch=config.last_batch,
        )  # fmt: skip
        self.steps_per_epoch = self._loader.num_steps
        rates = config.peak_rates()
        self.heads = LinearHeads(config, extractor.dim, sets.num_classes, rates, device)
        self.step, self.curve = 0, []
        self._num_right, self._num_seen = torch.zeros(len(rates), device=device), 0
        self.stop = StopRequest()
        if resume and self._path.exists():
            self._restore()

    def _restore(self) -> None:
        state = checkpoint.read(self._path)
        require(
            state.get("format") == FORMAT,
            f"{self._path} is no checkpoint of a linear evaluation; choose another --out",
        )
        changes = checkpoint.different_keys(state["identity"], self._identity)
        require(
            not changes,
            f"{self._path} is of another evaluation: {'; '.join(changes)}. Restore these values "
            "to resume, or choose another --out",
        )
        self.heads.load_state_dict(state["heads"])
        self.step = state["position"]["step"]
        if curve := state.get("curve"):  # checkpoints of earlier versions have none
            self.curve, self._num_seen = curve["top1"], curve["num_seen"]
            self._num_right.copy_(curve["num_right"])
        while len(self.curve) < self.step // self.steps_per_epoch:
            self._end_epoch()

    def _save(self) -> None:
        if dist.rank() == 0:
            curve = {"top1": self.curve, "num_right": self._num_right, "num_seen": self._num_seen}
            state = {
                "format": FORMAT,
                "identity": self._identity,
                "heads": self.heads.state_dict(),
                "position": {"step": self.step},
                "curve": curve,
            }
            checkpoint.save(state, self._path)

    def train(self) -> None:
        """To the end of the last epoch.

        Raises:
            StoppedBySignal: After the state was saved.
        """
        total = self.steps_per_epoch * self._config.epochs
        with bar(total, "train", "step", initial=self.step) as progress, self.stop:
            while self.step < total:
                for batch in self._loader.epoch(*divmod(self.step, self.steps_per_epoch)):
                    losses = self._train_step(batch.views[0], batch.labels)
                    progress.update()
                    if self.step % _STEPS_PER_LOOK == 0:
                        progress.set_postfix(loss=f"{float(losses.min()):.3f}", refresh=False)
                    # One process may stop at once; several agree now and then.
                    is_asked = not dist.is_on() or self.step % _STEPS_PER_LOOK == 0
                    number = self.stop.agreed(self._device) if is_asked else 0
                    if number or self.step % self._config.checkpoint_every_steps == 0:
                        self._save()
                    if number:
                        raise stopped(number, self.step)
        self._save()

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        features, labels = self._extractor(images), labels.to(self._device)
        is_right = self.heads.logits(features).argmax(dim=2) == labels[:, None]
        self._num_right += dist.total(is_right.sum(dim=0).float())
        self._num_seen += len(labels) * dist.world_size()
        factor = self._config.lr_factor(self.step, self.steps_per_epoch)
        losses = self.heads.step(features, labels, factor)
        self.step += 1
        if self.step % self.steps_per_epoch == 0:
            self._end_epoch()
        return losses

    def _end_epoch(self) -> None:
        self.curve.append((self._num_right / self._num_seen).tolist() if self._num_seen else None)
        self._num_right.zero_()
        self._num_seen = 0
