"""The pretraining loop, whole and visible."""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from tqdm import tqdm

from pretrain import collectives as dist
from pretrain.config import PretrainConfig
from pretrain.data.input_pipeline import Fed, Feed
from pretrain.engine import device as speed
from pretrain.engine import guards, run_folder, saver
from pretrain.engine.accumulation import Gradients
from pretrain.engine.device import autocast_type, choose_device, uses_fused
from pretrain.engine.guards import HangTimer, NonFiniteGuard
from pretrain.engine.log import MetricLog, check_wandb
from pretrain.engine.loss_scale import LossScale
from pretrain.engine.optim import (
    ema_tau,
    lr_factor,
    lr_schedule,
    make_optimizer,
    peak_lr,
    set_lr,
)
from pretrain.engine.rows import Meter, Rows, Step
from pretrain.engine.state import Position, restore, to_checkpoint
from pretrain.engine.stop import StopRequest, stopped
from pretrain.evaluation.online_probe import OnlineProbe, evaluate, watched
from pretrain.evaluation.probe import Probe
from pretrain.evaluation.run_pictures import RunPictures
from pretrain.features.row_random import fa_generator
from pretrain.model.diagnostics import CollapseError
from pretrain.model.joint_embedding import FAContrastive, StepOutput
from pretrain.model.method_check import refuse_without_gradient


class Run:
    """One pretraining run: built from a config, advanced by ``train``.

    Args:
        config: The whole config; each part receives its own slice.
        resume: Continue from ``out/checkpoint.pth`` if there is one.
        allow_changes: Continue even with another config or other shards, where the weights fit.

    Raises:
        UserError: Anything in config, shards or checkpoint that cannot work, before any step.
    """

    def __init__(
        self, config: PretrainConfig, *, resume: bool, allow_changes: bool = False
    ) -> None:
        self.config = config
        check_wandb(config.tracking)
        self.device = choose_device(config.engine.device)
        self.autocast_type = autocast_type(config.engine.precision, self.device)
        dist.start(self.device.type)
        if config.engine.num_threads:
            torch.set_num_threads(config.engine.num_threads)
        self.folder = run_folder.prepare(config, resume=resume)
        self.lock = run_folder.hold(self.folder) if dist.rank() == 0 else None
        if self.lock is not None:
            weakref.finalize(self, self.lock.close)  # however the run ends
        self.feed = Feed(
            config.data, seed=config.seed, device=self.device,
            channels_last=config.engine.channels_last, folder=self.folder,
        )  # fmt: skip
        self.steps_per_epoch = self.feed.num_steps
        self.num_steps = self.steps_per_epoch * config.optim.epochs
        refuse_without_gradient(config.objective, config.fa, config.heads)
        torch.manual_seed(config.seed)
        self.model = FAContrastive(
            config.arch, config.heads, config.objective, config.fa, config.init.residual_gamma
        )
        speed.prepare(self.model, config.engine, self.device)
        self.optimizer = make_optimizer(
            self.model.online, config.optim, peak_lr(config.optim, config.data.batch_size),
            is_fused=uses_fused(config.engine.fused_optimizer, self.device),
        )  # fmt: skip
        self.schedule = lr_schedule(config.optim)
        self.position = Position()
        self.online_probe = OnlineProbe.open(
            config.eval, self.feed.samples, self.model.online.backbone, self.device
        )
        self.loss_scale = LossScale(config.engine, self.folder, self.device)
        self.notes: list[str] = []
        if resume and (self.folder / saver.NAME).exists():
            self._restore(allow_changes)
        self.saver = saver.CheckpointSaver(
            self.folder, num_kept=config.engine.keep_checkpoints,
            kept_every_steps=config.engine.keep_every_steps,
            in_background=config.engine.async_checkpoints,
        )  # fmt: skip
        self.saver.check_space(self._state())
        self.hang_timer = HangTimer(config.engine)
        self.gradients = Gradients(
            self.model, self._forward_through_ddp(), config.optim, self._autocast,
            self.loss_scale.scale,
        )  # fmt: skip
        networks = [n for n in (self.model.online, self.model.ema) if n is not None]
        self.guard = NonFiniteGuard(config.engine, self.folder, networks, self.device)
        self.num_new_bad_samples = 0  # of this process, not yet in the sum over all
        self.probe = Probe.open(config.eval, config.data, self.device)
        self.pictures = RunPictures(self.folder, config, self.feed.samples, self.probe, self.device)
        self.rows = Rows(config, self.folder, self.steps_per_epoch, self.position)
        self.stop = StopRequest()

    def _restore(self, allow_changes: bool) -> None:
        state, note = saver.load_newest(self.folder)
        self.position, changes = restore(
            state, self.config, self.model, self.optimizer, self.num_steps, self.feed.fingerprint,
            allow_changes=allow_changes,
        )  # fmt: skip
        self.notes = [note] if note else []
        self.notes += [f"going on with a changed config: {line}" for line in changes]
        self.loss_scale.load(state["scaler"])
        if self.online_probe and (note := self.online_probe.load(state.get("online_probe"))):
            self.notes.append(note)

    def _state(self) -> dict[str, Any]:
        state = to_checkpoint(
            self.config, self.model, self.optimizer, self.position, self.num_steps,
            self.feed.fingerprint, self.loss_scale.state_dict(),
        )  # fmt: skip
        online = {"online_probe": self.online_probe.state_dict()} if self.online_probe else {}
        return state | online

    def _forward_through_ddp(self) -> torch.nn.Module:
        if not dist.is_on():
            return self.model.online
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            self.model.online, device_ids=devices, broadcast_buffers=False
        )

    def train(self) -> None:
        """Run to the end: epochs of steps, with logs, probes and checkpoints on their way."""
        is_main = dist.rank() == 0
        fresh = self.position.step == 0
        log = self.rows.open_log(fresh=fresh) if is_main else None
        bar = tqdm(
            total=self.num_steps, initial=self.position.step, desc="pretrain", unit="step",
            disable=not is_main, mininterval=0.5 if sys.stderr.isatty() else 10, file=sys.stderr,
        )  # fmt: skip
        open_log = log or contextlib.nullcontext()
        with bar, open_log, self.stop, self.saver, self.hang_timer:
            for note in self.notes:
                if log is not None:
                    self.rows.warn(log, bar, message=note)
            if is_main:
                run_folder.write_description(self.folder, self.config, self.device)
            if fresh and log is not None:
                self._probe(log)
                self.pictures.at_start(self.model.online.backbone, self.feed)
            while self.position.epoch < self.config.optim.epochs:
                where = self.position
                self.steps(self.feed.epoch(where.epoch, where.step_in_epoch), log, bar)
                self._end_epoch(log)
        if is_main:
            self._finish()
        if self.lock is not None:
            self.lock.close()
        dist.stop()

    def _end_epoch(self, log: MetricLog | None) -> None:
        self.position.epoch += 1
        self.position.step_in_epoch = 0
        is_last = self.position.epoch == self.config.optim.epochs
        if log and (is_last or self.position.epoch % self.config.eval.knn_every_epochs == 0):
            self._probe(log)
        if is_last:
            self._save_checkpoint()

    def steps(self, batches: Iterable[Fed], log: MetricLog | None, bar: tqdm) -> None:
        """One step on each batch, with all that belongs to it."""
        meter = Meter()
        for fed in batches:
            self.hang_timer.restart()
            started = time.perf_counter()
            is_logged = self._is_logged(self.position.step + 1)
            done = self._step(fed, is_logged=is_logged)
            self.position.step += 1
            self.position.step_in_epoch += 1
            self.num_new_bad_samples += fed.batch.num_bad
            self.position.train_seconds += time.perf_counter() - started + fed.waited
            meter.num_steps += 1
            meter.num_images += self.config.data.batch_size
            meter.data_seconds += fed.waited
            bar.update()
            self._book(done, log, bar, is_logged=is_logged)
            if is_logged and not done.is_skipped:
                self._log(done, meter, log, bar)
                meter = Meter()
            if self._is_saved(self.position.step):
                self._save_checkpoint()
            if is_logged or not dist.is_on():  # several processes agree where they wait anyway
                self._stop_if_asked(log)

    def _book(self, done: Step, log: MetricLog | None, bar: tqdm, *, is_logged: bool) -> None:
        """Sum the bad samples over the processes where rows or checkpoints tell; tell of a skip."""
        if is_logged or self._is_saved(self.position.step) or not dist.is_on():
            num = guards.value_or_sum(self.num_new_bad_samples, self.device)
            self.position.num_bad_samples += num
            self.num_new_bad_samples = 0
        if done.is_skipped and log is not None:
            event = guards.describe_skip(self.folder, self.position, self.config.engine)
            self.rows.warn(log, bar, **event)

    def _stop_if_asked(self, log: MetricLog | None) -> None:
        """After a signal to any process: save, and leave together."""
        number = self.stop.agreed(self.device)
        if not number:
            return
        error = stopped(number, self.position.step)
        self._save_checkpoint()
        self.saver.wait()
        if log is not None:
            self.rows.write(log, "event", message=str(error))
        raise error

    def _autocast(self) -> torch.autocast:
        kind = self.autocast_type
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    def _step(self, fed: Fed, *, is_logged: bool) -> Step:
        """One optimiser step: forward, loss, backward, update, EMA and queue."""
        config, step = self.config, self.position.step
        factor = lr_factor(self.schedule, step, self.num_steps)
        lr = set_lr(self.optimizer, peak_lr(config.optim, config.data.batch_size), factor)
        with record_function("guards"):
            self.guard.keep()
        outputs = self.compute_gradients(fed, step)
        loss = outputs[0].loss
        with record_function("guards"):
            if self.loss_scale.overflowed(loss, self.optimizer, self.position):
                return Step(outputs[0], lr, {})
            is_refused = self.guard.refuses(
                self.position, fed.batch, loss, self.model.online.parameters(),
                is_due=is_logged or self._is_saved(step + 1) or self.loss_scale.is_loss_bad,
            )  # fmt: skip
        if is_refused:
            return Step(outputs[0], lr, {}, is_skipped=True)
        with record_function("optimiser"):
            self.optimizer.step()
        ids, labels = fed.batch.sample_ids, fed.batch.labels
        if self.online_probe:
            self.online_probe.step(labels)
        first = slice(0, outputs[0].projection.shape[0])
        queue = self.model.queue_report(outputs[0], ids[first], labels[first]) if is_logged else {}
        tau = ema_tau(config.objective, step, self.num_steps)
        self.model.after_optimizer_step(tau, outputs, ids, labels)
        return Step(outputs[0], lr, queue)

    def compute_gradients(self, fed: Fed, step: int) -> list[StepOutput]:
        """Forward, loss and backward of one step, that follows on ``step`` finished ones."""
        config, progress = self.config, step / self.num_steps
        self.optimizer.zero_grad(set_to_none=True)
        generator = partial(fa_generator, config.seed, step, self.device)
        views = self.gradients.attacked(
            fed.views, generator, progress, config.adversarial, config.data
        )
        with watched(self.online_probe):
            outputs = self.gradients.compute(views, generator, progress)
        if step < self.model.frozen_prototype_steps and self.model.online.prototypes is not None:
            self.model.online.prototypes.weight.grad = None
        self.loss_scale.unscale(self.optimizer)
        return outputs

    def _is_saved(self, step: int) -> bool:
        return step % self.config.engine.checkpoint_every_steps == 0

    def _is_logged(self, step: int) -> bool:
        return step % self.config.engine.log_every_steps == 0 or step == self.num_steps

    def _log(self, done: Step, meter: Meter, log: MetricLog | None, bar: tqdm) -> None:
        with record_function("logging"):
            collapse = self.rows.step(
                done, meter, log, bar, self.online_probe, self.loss_scale.figures(self.position)
            )
        if self.config.engine.on_collapse == "stop":
            self._stop_together(collapse)

    def _stop_together(self, collapse: str | None) -> None:
        """The first process saves before the others hear of it: their end may end it too."""
        if collapse is not None:
            self._save_checkpoint()
            self.saver.wait()
        if dist.total(torch.tensor(float(collapse is not None), device=self.device)):
            raise CollapseError(
                f"{collapse or 'the first process saw the features collapse'}; the checkpoint is "
                "saved: --resume with engine.on_collapse=warn goes on"
            )

    def _probe(self, log: MetricLog) -> None:
        if self.probe is None:
            return
        figures = evaluate(self.probe, self.model.online.backbone, self.online_probe)
        self.rows.write(log, "knn", **figures)
        if self.position.step == 0:
            first = figures["knn_top1"]
            log.write("event", 0, message="kNN before training", knn_top1_initial=first)

    def _save_checkpoint(self) -> None:
        if dist.rank() != 0:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.model.online.parameters()):
            what = f"weights are no longer finite at step {self.position.step}"
            raise guards.NonFiniteLossError(self.folder, what)
        self.saver.save(self._state(), self.position.step)

    def _finish(self) -> None:
        """The last pictures, and ``summary.json``, which says that the run is complete."""
        self.pictures.at_end(self.model.online.backbone)
        run_folder.write_summary(self.folder, self.position, self.config, self.feed.num_samples)
