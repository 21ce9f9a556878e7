"""The pretraining loop, whole and visible."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pretrain.config import PretrainConfig
from pretrain.engine import diagnostics, dist, run_folder, saver
from pretrain.engine.diagnostics import CollapseAlarm, CollapseError
from pretrain.engine.feed import Fed, Feed
from pretrain.engine.metrics import MetricLog
from pretrain.engine.optim import (
    ema_tau,
    lr_factor,
    lr_schedule,
    make_optimizer,
    peak_lr,
    set_lr,
)
from pretrain.engine.state import Position, restore, to_checkpoint
from pretrain.engine.step import Gradients
from pretrain.engine.stop import StoppedBySignal, StopRequest
from pretrain.errors import UserError
from pretrain.eval.pictures import save_neighbours, save_views
from pretrain.eval.probe import Probe
from pretrain.models.cell_check import refuse_without_gradient
from pretrain.models.contrastive import FAContrastive, StepOutput
from pretrain.models.row_random import fa_generator


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite: going on would only destroy the weights."""


@dataclass
class Meter:
    """Time spent since the last log row: all of it, and waiting for data; seconds."""

    num_steps: int = 0
    num_images: int = 0
    data_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def rates(self) -> dict[str, float]:
        """Images per second, and the share of the time that was spent waiting for data."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_second": self.num_images / seconds,
            "data_wait_share": self.data_seconds / seconds,
        }


@dataclass(frozen=True)
class Step:
    """What one optimiser step leaves to look at."""

    output: StepOutput
    lr: float
    queue: dict[str, float]


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
        self.device = choose_device(config.engine.device)
        self.is_bf16 = uses_bf16(config.engine.precision, self.device)
        dist.start(self.device.type)
        if config.engine.num_threads:
            torch.set_num_threads(config.engine.num_threads)
        self.folder = run_folder.prepare(config, resume=resume)
        self.lock = run_folder.hold(self.folder) if dist.rank() == 0 else None
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
        self.model.to(self.device)
        if config.engine.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(
            self.model.online, config.optim, peak_lr(config.optim, config.data.batch_size)
        )
        self.schedule = lr_schedule(config.optim)
        self.position = Position()
        self.notes: list[str] = []
        if resume and (self.folder / saver.NAME).exists():
            self._restore(allow_changes)
        self.saver = saver.CheckpointSaver(
            self.folder, num_kept=config.engine.keep_checkpoints,
            kept_every_steps=config.engine.keep_every_steps,
            in_background=config.engine.async_checkpoints,
        )  # fmt: skip
        self.saver.check_space(self._state())
        self.gradients = Gradients(
            self.model, self._forward_through_ddp(), config.optim, self._autocast
        )
        self.probe = Probe.open(config.eval, config.data, self.device)
        self.alarm = CollapseAlarm(config.engine)
        self.stop = StopRequest()

    def _restore(self, allow_changes: bool) -> None:
        state, note = saver.load_newest(self.folder)
        self.position, changes = restore(
            state, self.config, self.model, self.optimizer, self.num_steps, self.feed.fingerprint,
            allow_changes=allow_changes,
        )  # fmt: skip
        self.notes = [note] if note else []
        self.notes += [f"going on with a changed config: {line}" for line in changes]

    def _state(self) -> dict[str, Any]:
        return to_checkpoint(
            self.config, self.model, self.optimizer, self.position, self.num_steps,
            self.feed.fingerprint,
        )  # fmt: skip

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
        log = self._open_log(fresh) if is_main else None
        bar = tqdm(
            total=self.num_steps, initial=self.position.step, desc="pretrain", unit="step",
            disable=not is_main, mininterval=0.5 if sys.stderr.isatty() else 10, file=sys.stderr,
        )  # fmt: skip
        open_log = contextlib.closing(log) if log else contextlib.nullcontext()
        with bar, open_log, self.stop, self.saver:
            for note in self.notes:
                if log is not None:
                    self._write(log, "event", message=note)
                    bar.write(f"warning: {note}", file=sys.stderr)
            if is_main:
                run_folder.write_description(self.folder, self.config, self.device)
            if fresh and log is not None:
                self._probe(log)
                self._save_view_pictures()
            while self.position.epoch < self.config.optim.epochs:
                self._train_epoch(log, bar)
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

    def _open_log(self, fresh: bool) -> MetricLog:
        """The log without the rows that will be written again."""
        step = -1 if fresh else self.position.step
        probe_is_due = self.position.step_in_epoch == self.steps_per_epoch
        return MetricLog(self.folder, step, step - 1 if probe_is_due else step)

    def _train_epoch(self, log: MetricLog | None, bar: tqdm) -> None:
        meter = Meter()
        for fed in self.feed.epoch(self.position.epoch, self.position.step_in_epoch):
            started = time.perf_counter()
            is_logged = self._is_logged(self.position.step + 1)
            done = self._step(fed, is_logged=is_logged)
            self.position.step += 1
            self.position.step_in_epoch += 1
            self.position.num_bad_samples += fed.batch.num_bad
            self.position.train_seconds += time.perf_counter() - started + fed.waited
            meter.num_steps += 1
            meter.num_images += self.config.data.batch_size
            meter.data_seconds += fed.waited
            bar.update()
            if is_logged:
                self._log(done, meter, log, bar)
                meter = Meter()
            if self.position.step % self.config.engine.checkpoint_every_steps == 0:
                self._save_checkpoint()
            if is_logged or not dist.is_on():  # several processes agree where they wait anyway
                self._stop_if_asked(log)

    def _stop_if_asked(self, log: MetricLog | None) -> None:
        """After a signal to any process: save, and leave together."""
        number = self.stop.agreed(self.device)
        if not number:
            return
        error = StoppedBySignal(number, self.position.step)
        self._save_checkpoint()
        self.saver.wait()
        if log is not None:
            self._write(log, "event", message=str(error))
        raise error

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_bf16)

    def _step(self, fed: Fed, *, is_logged: bool) -> Step:
        """One optimiser step: forward, loss, backward, update, EMA and queue."""
        config, step = self.config, self.position.step
        factor = lr_factor(self.schedule, step, self.num_steps)
        lr = set_lr(self.optimizer, peak_lr(config.optim, config.data.batch_size), factor)
        self.optimizer.zero_grad(set_to_none=True)
        generator = partial(fa_generator, config.seed, step, self.device)
        progress = step / self.num_steps
        views = self.gradients.attacked(
            fed.views, generator, progress, config.adversarial, config.data
        )
        outputs = self.gradients.compute(views, generator, progress)
        if step < self.model.frozen_prototype_steps and self.model.online.prototypes is not None:
            self.model.online.prototypes.weight.grad = None
        self.optimizer.step()
        ids, labels = fed.batch.sample_ids, fed.batch.labels
        first = slice(0, outputs[0].projection.shape[0])
        queue = self.model.queue_report(outputs[0], ids[first], labels[first]) if is_logged else {}
        tau = ema_tau(config.objective, step, self.num_steps)
        self.model.after_optimizer_step(tau, outputs, ids, labels)
        return Step(outputs[0], lr, queue)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.engine.log_every_steps == 0 or step == self.num_steps

    def _log(self, done: Step, meter: Meter, log: MetricLog | None, bar: tqdm) -> None:
        output = done.output
        loss = float(dist.mean(output.loss.detach()))
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        rates = meter.rates()
        bar.set_postfix(loss=f"{loss:.3f}", images_s=f"{rates['images_per_second']:.0f}")
        collapse = None
        if log is not None:
            figures = diagnostics.diagnose(output)
            row = {"loss": loss, "lr": done.lr, **figures, "fa_active": int(output.is_augmented)}
            bad = {"num_bad_samples": self.position.num_bad_samples}
            self._write(log, "train", **row, **done.queue, **bad, **rates)
            if self._is_histogram_due():
                self._write(log, "similarity", **diagnostics.similarity_histograms(output))
            collapse = self.alarm.look(figures, output.projection, self.position.step)
            if collapse is not None:
                self._write(log, "event", **self.alarm.event(figures, collapse))
                bar.write(f"warning: {collapse}", file=sys.stderr)
        if self.config.engine.on_collapse == "stop":
            self._stop_together(collapse)

    def _write(self, log: MetricLog, kind: str, **values: Any) -> None:
        epoch = self.position.step / self.steps_per_epoch
        log.write(kind, self.position.step, epoch=epoch, **values)

    def _is_histogram_due(self) -> bool:
        every = diagnostics.ROWS_PER_HISTOGRAM * self.config.engine.log_every_steps
        return self.position.step % every == 0 or self.position.step == self.num_steps

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

    def _diverged(self, what: str) -> NonFiniteLossError:
        path = self.folder / "checkpoint.pth"
        saved = f"{path} holds an earlier state" if path.exists() else "no checkpoint was written"
        return NonFiniteLossError(
            f"{what} at step {self.position.step}; {saved}. Lower optim.base_lr or lengthen "
            "optim.warmup_epochs"
        )

    def _probe(self, log: MetricLog) -> None:
        if self.probe is None:
            return
        top1 = self.probe.top1(self.model.online.backbone)
        self._write(log, "knn", knn_top1=top1)
        if self.position.step == 0:
            log.write("event", 0, message="kNN before training", knn_top1_initial=top1)

    def _save_checkpoint(self) -> None:
        if dist.rank() != 0:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.model.online.parameters()):
            raise self._diverged("weights are no longer finite")
        self.saver.save(self._state(), self.position.step)

    def _save_view_pictures(self) -> None:
        num = min(self.config.eval.num_pictures, self.config.data.batch_size)
        if num:
            first = self.feed.first_batch()
            ids, data = first.batch.sample_ids, self.config.data
            save_views(self.folder, self.feed.samples, ids, first.views, num, data)

    def _finish(self) -> None:
        """Neighbour gallery and ``summary.json``, which says that the run is complete."""
        num = self.config.eval.num_pictures
        if num:
            save_neighbours(
                self.folder,
                self.model.online.backbone,
                self.feed.samples,
                self.probe,
                num,
                self.device,
                self.config.data,
            )
        run_folder.write_summary(self.folder, self.position, self.config, self.feed.num_samples)


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Under torchrun each process of a machine takes the GPU of its own number.

    Raises:
        UserError: If ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but torch sees no GPU; use engine.device=auto or cpu")
    is_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", number) if is_cuda else torch.device("cpu")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether steps run under bf16 autocast; ``auto`` does so where the hardware computes in bf16.

    On a CPU without AVX512-BF16 or AMX bf16 is emulated and slower than fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
