"""What pretraining trains: the contrastive model, one step of it, and its part of a checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from common.checkpoints import FORMAT
from common.config import dotted, to_plain
from common.errors import UserError, require
from pretrain import collectives as dist
from pretrain.config import PretrainConfig
from pretrain.data.input_pipeline import DeviceBatch, InputPipeline
from pretrain.data.random_numbers import stable_hash
from pretrain.engine.accumulation import Gradients
from pretrain.engine.checkpoint import different_keys
from pretrain.engine.guards import NonFiniteGuard
from pretrain.engine.optim import load_state, lr_factor, peak_lr, set_lr
from pretrain.engine.trainer import Position, StepResult
from pretrain.features.augmentations.base import fa_generator
from pretrain.features.mixing import Mixing
from pretrain.model.joint_embedding import FAContrastive
from pretrain.precision import autocast_type

ROWS_PER_HISTOGRAM = 10  # a histogram goes with every tenth logged row, and with the last
# Beginnings of keys that may change when a run goes on: they decide no gradient, or its rounding
# only; or where the shards lie and how they are read, which their fingerprint sees.
NOT_COMPARED = (
    "out", "engine.", "eval.", "tracking.", "data.shards", "data.num_workers", "data.cache_dir",
    "data.cache_gb", "data.read_retries", "data.read_timeout_seconds", "data.max_bad_samples",
)  # fmt: skip
# Keys that older checkpoints lack, and what was done then. These are compared.
ADDED_LATER = {
    "engine.batch_norm": "per_process",
    "optim.lars_norm": "joint",
    "data.augmentation.view1.crop.interpolation": "bilinear",
    "data.augmentation.view2.crop.interpolation": "bilinear",
    "data.augmentation.small_crops.num": 0,
    **{f"objective.mixing.{key}": value for key, value in vars(Mixing()).items()},
}
SMALL_CROPS = "data.augmentation.small_crops."  # without any, their settings are not compared


class ContrastiveTask:
    """A contrastive model with its optimiser.

    Args:
        config: The whole config.
        model: On its device.
        optimizer: Of the online network's parameters.
        input_pipeline: ``num_steps`` of an epoch, and ``fingerprint`` of the samples.
        folder: Of the run.
        device: Of the model.

    Raises:
        UserError: If the micro-batches cannot be shared out among the processes.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: FAContrastive,
        optimizer: torch.optim.Optimizer,
        input_pipeline: InputPipeline,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.folder, self.device = folder, device
        # By their keys in a checkpoint; None: this run has none.
        self._parts: dict[str, nn.Module | None] = {
            "model": model.online, "ema": model.ema, "queue": model.queue, "negatives": model.memory
        }  # fmt: skip
        self.num_steps = input_pipeline.num_steps * config.optim.epochs
        self.data_fingerprint = input_pipeline.fingerprint
        self.autocast_type = autocast_type(config.engine.precision, device)
        self.guard = NonFiniteGuard(config.engine, folder, model, device)
        forward: nn.Module = model.online
        if dist.is_on():
            devices = [device] if device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=devices, broadcast_buffers=False)
        scale = self.guard.scaler.scale
        self.gradients = Gradients(model, forward, config.optim, self.autocast, scale)

    def autocast(self) -> torch.autocast:
        """A fresh context in which forward passes run."""
        kind = self.autocast_type
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    def step(
        self, batch: DeviceBatch, position: Position, *, is_logged: bool, is_saved: bool
    ) -> StepResult:
        """One optimiser step: forward, loss, backward, update, EMA and queue; see ``Task``.

        Raises:
            NonFiniteLossError: Loss or gradients are not finite, or fp16 cannot hold gradients.
        """
        config, step, progress = self.config, position.step, position.step / self.num_steps
        factor = lr_factor(config.optim, step, self.num_steps)
        lr = set_lr(self.optimizer, peak_lr(config.optim, config.data.batch_size), factor)
        self.optimizer.zero_grad(set_to_none=True)
        generator = partial(fa_generator, config.seed, step, self.device)
        ids, labels = batch.samples.sample_ids, batch.samples.labels
        if position.epoch > 0 and position.step_in_epoch == 0:
            digest = stable_hash("epoch", config.seed, position.epoch, num_bytes=7)
            seed = int.from_bytes(digest, "little")
            self.model.start_epoch(torch.Generator().manual_seed(seed))
        views = self.gradients.attacked(
            batch.views, generator, progress, config.adversarial, config.data, ids
        )
        outputs = self.gradients.compute(views, generator, progress, ids)
        first, loss = outputs[0], outputs[0].loss.detach()
        self.model.before_update(step)
        with record_function("guards"):
            has_overflowed = self.guard.check(
                batch.samples, loss, self.optimizer, position, is_due=is_logged or is_saved
            )
        queue = {}
        if not has_overflowed:
            with record_function("optimiser"):
                self.optimizer.step()
            # The queue's figures are those before the batch itself enters.
            if is_logged:
                num = len(first.projection)
                queue = self.model.queue_report(first, ids[:num], labels[:num])
            tau = config.objective.tau(step, self.num_steps)
            self.model.after_optimizer_step(tau, outputs, ids, labels)
        figures, histograms = {}, {}
        if is_logged and dist.rank() == 0:
            with record_function("logging"):
                figures = {"lr": lr, **first.figures(), "fa_active": int(first.is_augmented)}
                figures |= queue
                if self.guard.scaler.is_enabled():
                    figures["loss_scale"] = self.guard.scaler.get_scale()
                    figures["num_overflow_steps"] = position.num_overflow_steps + has_overflowed
                every = ROWS_PER_HISTOGRAM * config.engine.log_every_steps
                if (step + 1) % every == 0 or step + 1 == self.num_steps:
                    histograms = first.histograms()
        return StepResult(loss, figures, histograms, has_overflowed, first)

    def state_dict(self) -> dict[str, Any]:
        """All but position and random state, which the loop adds."""
        parts = {k: None if m is None else m.state_dict() for k, m in self._parts.items()}
        return parts | {
            "format": FORMAT,
            "arch": to_plain(self.config.arch),
            "preprocessing": {
                "mean": list(self.config.data.pixel_mean),
                "std": list(self.config.data.pixel_std),
                "order": "RGB",
            },
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.guard.scaler.state_dict(),
            "schedule": {"num_steps": self.num_steps, "data_fingerprint": self.data_fingerprint},
            "config": to_plain(self.config),
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> list[str]:
        """Bring a freshly built model into the state of a checkpoint; see ``Task``.

        Raises:
            UserError: A changed config or changed shards (the differences are shown), or weights
                that do not fit.
        """
        changes = self._changes(state)
        require(
            allow_changes or not changes,
            f"the checkpoint was made with another config: {'; '.join(changes)}. Restore these "
            "values to resume, allow them with --allow-changes, or start a new run with another "
            "out=DIR",
        )
        name, before = self.config.optim.name, state["config"]["optim"]["name"]
        require(
            name == before,
            f"optim.name={name}: the checkpoint holds momenta of {before}, which {name} cannot go "
            "on from; restore it, or start a new run with another out=DIR",
        )
        try:
            for key, part in self._parts.items():
                if part is not None:
                    part.load_state_dict(state[key])
            load_state(self.optimizer, state["optimizer"])
            if state.get("scaler"):  # of a run in fp16
                self.guard.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "the checkpoint does not fit this config "
                f"({'; '.join(changes) or 'no change seen'}): {' '.join(str(error).split())[:200]}"
            ) from error
        return changes

    def _changes(self, state: dict[str, Any]) -> list[str]:
        """What differs from the run that the checkpoint was made by, a line each."""
        plain = state["config"], to_plain(self.config)
        configs = [ADDED_LATER | dotted(config) for config in plain]
        have_small = all(config[f"{SMALL_CROPS}num"] for config in configs)
        unused = NOT_COMPARED if have_small else (*NOT_COMPARED, SMALL_CROPS)
        before, now = (
            {k: v for k, v in config.items() if k in ADDED_LATER or not k.startswith(unused)}
            for config in configs
        )
        changes = different_keys(before, now)
        num_steps = state["schedule"]["num_steps"]
        if num_steps != self.num_steps and not changes:
            changes.append(
                f"it was made for {num_steps} steps, the shards now give {self.num_steps}"
            )
        fingerprints = {state["schedule"].get("data_fingerprint"), self.data_fingerprint}
        if len(fingerprints - {None}) == 2:
            changes.append("data.shards: other shards, or other weights of them")
        return changes
