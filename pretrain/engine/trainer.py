"""The pretraining loop: ``Trainer.train``, ``steps`` and ``step``, and what a callback may add."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from tqdm import tqdm

from pretrain import collectives as dist
from pretrain.config import PretrainConfig
from pretrain.data.input_pipeline import DeviceBatch, InputPipeline
from pretrain.data.loader import TwoViewBatch
from pretrain.engine import checkpoint, rendezvous, run_folder
from pretrain.engine.accumulation import Gradients
from pretrain.engine.device import autocast_type
from pretrain.engine.guards import HangTimer, LossScale, NonFiniteGuard, NonFiniteLossError
from pretrain.engine.log import Meter, MetricLog, open_log, progress_bar
from pretrain.engine.optim import ema_tau, lr_factor, peak_lr, set_lr
from pretrain.engine.stop import StopRequest, stopped
from pretrain.features.row_random import fa_generator
from pretrain.model import diagnostics
from pretrain.model.joint_embedding import FAContrastive, StepOutput


class Callback:
    """What a run does beside its steps. Each method does nothing unless a subclass says otherwise.

    Every process has its own list of callbacks; a collective operation in a callback needs that
    callback in all of them.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step; not in a run that is resumed."""

    def on_forward_start(self) -> None:
        """Before the forward passes that the gradients of a step come from."""

    def on_forward_end(self) -> None:
        """After them."""

    def on_step_end(self, batch: TwoViewBatch) -> None:
        """After an update of the weights, with this process's samples; not if it was left out."""

    def figures(self) -> dict[str, float]:
        """What the row of a logged step holds besides; asked in the first process only."""
        return {}

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After the last step of each epoch."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last epoch: the last checkpoint is written, the log is closed."""

    def state_dict(self) -> dict[str, Any]:
        """Entries of the checkpoint that this callback adds, of plain types and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a checkpoint; returns what the user should know, if anything."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step leaves to look at.

    Attributes:
        output: Of the first micro-batch; its loss is that of all local rows.
        lr: The scheduled learning rate.
        queue: Figures of the support queue, in a logged step.
        is_skipped: Loss or gradients were not finite, so that nothing was changed.
    """

    output: StepOutput
    lr: float
    queue: dict[str, float] = field(default_factory=dict)
    is_skipped: bool = False


class Trainer:
    """One pretraining run. ``pretrain.run.make_trainer`` builds it from a config.

    Args:
        config: The whole config.
        folder: Of the run.
        lock: Of the folder, in the first process; ``close`` frees it.
        device: Of the model.
        input_pipeline: The batches.
        model: On its device.
        optimizer: Of the online network's parameters.
        callbacks: Called in this order.

    Raises:
        UserError: If the micro-batches cannot be shared out among the processes.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: Path,
        lock: run_folder.FolderLock | None,
        device: torch.device,
        input_pipeline: InputPipeline,
        model: FAContrastive,
        optimizer: torch.optim.Optimizer,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.folder, self.lock, self.device = config, folder, lock, device
        self.input_pipeline, self.model, self.optimizer, self.callbacks = (
            input_pipeline,
            model,
            optimizer,
            callbacks,
        )
        self.num_steps = input_pipeline.num_steps * config.optim.epochs
        self.run_state = checkpoint.RunState(
            config, model, optimizer, self.num_steps, input_pipeline.fingerprint
        )
        self.position = checkpoint.Position()
        self.notes: list[str] = []
        self.autocast_type = autocast_type(config.engine.precision, device)
        self.loss_scale = LossScale(config.engine, folder, device)
        forward: torch.nn.Module = model.online
        if dist.is_on():
            devices = [device] if device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=devices, broadcast_buffers=False)
        self.gradients = Gradients(
            model, forward, config.optim, self._autocast, self.loss_scale.scale
        )
        self.guard = NonFiniteGuard(config.engine, folder, model, device)
        self.collapse_alarm = diagnostics.CollapseAlarm(config.engine)
        self.saver = checkpoint.CheckpointSaver(folder, config.engine)
        self.hang_timer = HangTimer(config.engine)
        self.stop = StopRequest()
        self.log: MetricLog | None = None  # of the first process, while it trains
        self.bar = tqdm(disable=True)
        self.num_new_bad_samples = 0  # of this process, not yet in the sum over all

    def train(self) -> None:
        """Run to the end: epochs of steps, with logs, callbacks and checkpoints on their way.

        Raises:
            UserError: If the disk has no room for the checkpoints.
            RunFailed: If loss or weights are not finite, or the features collapse (both by config).
            StoppedBySignal: After a signal; the checkpoint is saved.
        """
        position, is_fresh = self.position, self.position.step == 0
        self.saver.check_space(self.state())
        if dist.rank() == 0:
            self.log = open_log(self.config, self.folder, position, self.input_pipeline.num_steps)
        self.bar = progress_bar("pretrain", self.num_steps, position.step)
        log = self.log or contextlib.nullcontext()
        with self.bar, log, self.stop, self.saver, self.hang_timer:
            for note in self.notes:
                self.warn(note)
            if dist.rank() == 0:
                run_folder.write_description(self.folder, self.config, self.device)
            if is_fresh:
                for callback in self.callbacks:
                    callback.on_start(self)
            while position.epoch < self.config.optim.epochs:
                self.steps(self.input_pipeline.epoch(position.epoch, position.step_in_epoch))
                position.epoch += 1
                position.step_in_epoch = 0
                for callback in self.callbacks:
                    callback.on_epoch_end(self)
                if position.epoch == self.config.optim.epochs:
                    self.save()
        for callback in self.callbacks:
            callback.on_end(self)
        if dist.rank() == 0:
            run_folder.write_summary(
                self.folder, position, self.config, self.input_pipeline.num_samples
            )
        self.close()

    def steps(self, batches: Iterable[DeviceBatch]) -> None:
        """One step on each batch, then its rows, its checkpoint, and the end if a signal asks."""
        position, meter = self.position, Meter()
        for batch in batches:
            self.hang_timer.restart()
            started = time.perf_counter()
            is_logged = self._is_logged(position.step + 1)
            is_saved = self._is_saved(position.step + 1)
            result = self.step(batch, is_logged=is_logged)
            position.step += 1
            position.step_in_epoch += 1
            position.train_seconds += time.perf_counter() - started + batch.waited
            meter.num_images += self.config.data.batch_size
            meter.data_seconds += batch.waited
            self.bar.update()
            # Several processes sum, and agree to stop, only where they wait for each other anyway.
            self.num_new_bad_samples += batch.samples.num_bad
            if is_logged or is_saved or not dist.is_on():
                num = self.num_new_bad_samples
                if dist.is_on():
                    num = int(dist.total(torch.tensor(num, device=self.device)))
                position.num_bad_samples += num
                self.num_new_bad_samples = 0
            if result.is_skipped:
                self.warn(
                    f"step {position.step} was left out: loss or gradients not finite "
                    f"({position.num_skipped_steps} of at most "
                    f"{self.config.engine.max_nonfinite_steps}); its batch is in "
                    f"{self.guard.file_of(position.step)}",
                    num_skipped_steps=position.num_skipped_steps,
                )
            elif is_logged:
                self._log(result, meter)
                meter = Meter()
            if is_saved:
                self.save()
            if is_logged or not dist.is_on():
                self._stop_if_asked()

    def step(self, batch: DeviceBatch, *, is_logged: bool) -> StepResult:
        """One optimiser step: forward, loss, backward, update, EMA and queue."""
        config, step = self.config, self.position.step
        factor = lr_factor(config.optim, step, self.num_steps)
        lr = set_lr(self.optimizer, peak_lr(config.optim, config.data.batch_size), factor)
        with record_function("guards"):
            self.guard.keep()
        outputs = self.compute_gradients(batch, step)
        first = outputs[0]
        # The update is left out if fp16 overflowed, or if loss or gradients are not finite.
        with record_function("guards"):
            if self.loss_scale.overflowed(first.loss, self.optimizer, self.position):
                return StepResult(first, lr)
            is_due = is_logged or self._is_saved(step + 1) or self.loss_scale.is_loss_bad
            if self.guard.refuses(self.position, batch.samples, first.loss, is_due=is_due):
                return StepResult(first, lr, is_skipped=True)
        with record_function("optimiser"):
            self.optimizer.step()
        for callback in self.callbacks:
            callback.on_step_end(batch.samples)
        # The queue's figures are those before the batch itself enters.
        ids, labels = batch.samples.sample_ids, batch.samples.labels
        num = len(first.projection)
        queue = self.model.queue_report(first, ids[:num], labels[:num]) if is_logged else {}
        tau = ema_tau(config.objective, step, self.num_steps)
        self.model.after_optimizer_step(tau, outputs, ids, labels)
        return StepResult(first, lr, queue)

    def compute_gradients(self, batch: DeviceBatch, step: int) -> list[StepOutput]:
        """Forward, loss and backward of the step that follows ``step`` finished ones."""
        config, progress = self.config, step / self.num_steps
        self.optimizer.zero_grad(set_to_none=True)
        generator = partial(fa_generator, config.seed, step, self.device)
        views = self.gradients.attacked(
            batch.views, generator, progress, config.adversarial, config.data
        )
        for callback in self.callbacks:
            callback.on_forward_start()
        outputs = self.gradients.compute(views, generator, progress)
        for callback in self.callbacks:
            callback.on_forward_end()
        if step < self.model.frozen_prototype_steps and self.model.online.prototypes is not None:
            self.model.online.prototypes.weight.grad = None
        self.loss_scale.unscale(self.optimizer)
        return outputs

    def _autocast(self) -> torch.autocast:
        kind = self.autocast_type
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.engine.log_every_steps == 0 or step == self.num_steps

    def _is_saved(self, step: int) -> bool:
        return step % self.config.engine.checkpoint_every_steps == 0

    # -- what is written --

    def write(self, kind: str, **values: Any) -> None:
        """One row of the log, at the present step; only the first process has a log."""
        if self.log is not None:
            epoch = self.position.step / self.input_pipeline.num_steps
            self.log.write(kind, self.position.step, epoch=epoch, **values)

    def warn(self, message: str, **values: Any) -> None:
        """A row of kind ``event``, and its message on the terminal."""
        if self.log is not None:
            self.write("event", message=message, **values)
            self.bar.write(f"warning: {message}", file=sys.stderr)

    def _log(self, result: StepResult, meter: Meter) -> None:
        """The row of a step, and the alarm if the features have collapsed; in all processes."""
        output, position, config = result.output, self.position, self.config.engine
        collapse = None
        with record_function("logging"):
            loss = float(dist.mean(output.loss.detach()))
            if not math.isfinite(loss):
                raise NonFiniteLossError(self.folder, f"the loss is {loss} at step {position.step}")
            rates = meter.rates()
            self.bar.set_postfix(loss=f"{loss:.3f}", images_s=f"{rates['images_per_second']:.0f}")
            if self.log is not None:
                figures = diagnostics.diagnose(output)
                row = {"loss": loss, "lr": result.lr, **figures}
                row |= {"fa_active": int(output.is_augmented), **result.queue}
                for callback in self.callbacks:
                    row |= callback.figures()
                row |= self.loss_scale.figures(position)
                row |= {
                    "num_bad_samples": position.num_bad_samples,
                    "num_skipped_steps": position.num_skipped_steps,
                }
                self.write("train", **row, **rates)
                every = diagnostics.ROWS_PER_HISTOGRAM * config.log_every_steps
                if position.step % every == 0 or position.step == self.num_steps:
                    self.write("similarity", **diagnostics.similarity_histograms(output))
                collapse = self.collapse_alarm.look(figures, output.projection, position.step)
                if collapse is not None:
                    self.warn(**self.collapse_alarm.event(figures, collapse))
        if config.on_collapse == "stop":
            # The first process saves before the others hear of it: their end may end it too.
            if collapse is not None:
                self.save()
                self.saver.wait()
            if dist.total(torch.tensor(float(collapse is not None), device=self.device)):
                raise diagnostics.CollapseError(
                    f"{collapse or 'the first process saw the features collapse'}; the checkpoint "
                    "is saved: --resume with engine.on_collapse=warn goes on"
                )

    def _stop_if_asked(self) -> None:
        """After a signal to any process: save, and leave together."""
        number = self.stop.agreed(self.device)
        if number:
            error = stopped(number, self.position.step)
            self.save()
            self.saver.wait()
            self.write("event", message=str(error))
            raise error

    # -- the state --

    def state(self) -> dict[str, Any]:
        """The checkpoint of the present step."""
        state = self.run_state.to_checkpoint(self.position, self.loss_scale.state_dict())
        for callback in self.callbacks:
            state |= callback.state_dict()
        return state

    def restore(self, *, allow_changes: bool) -> None:
        """Go on from the newest whole checkpoint of the folder.

        Args:
            allow_changes: Even with another config or other shards, where the weights fit.

        Raises:
            UserError: If no checkpoint is whole, or it does not belong to this run.
        """
        state, note = checkpoint.load_newest(self.folder)
        self.position, changes = self.run_state.restore(state, allow_changes=allow_changes)
        self.loss_scale.load(state["scaler"])
        notes = [note, *(f"going on with a changed config: {line}" for line in changes)]
        notes += [callback.load_state_dict(state) for callback in self.callbacks]
        self.notes = [note for note in notes if note]

    def save(self) -> None:
        """Write the checkpoint of the present step; the first process does so.

        Raises:
            NonFiniteLossError: If the weights are not finite; the checkpoint before stays.
        """
        if dist.rank() != 0:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.model.online.parameters()):
            what = f"weights are no longer finite at step {self.position.step}"
            raise NonFiniteLossError(self.folder, what)
        self.saver.save(self.state(), self.position.step)

    def close(self) -> None:
        """Free the folder and leave the process group."""
        if self.lock is not None:
            self.lock.close()
        rendezvous.stop()
