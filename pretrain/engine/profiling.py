"""``--profile N``: a short run that says where the time of a step goes. No training run.

After warm-up steps the sections of N steps are timed (pretrain/engine/sections.py) without a
profiler, which would slow them down. A few more steps then run under PyTorch's profiler, for the
trace. Queues are filled with random features first, so that FA costs what it costs in a long run.
"""

from __future__ import annotations

import gzip
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from tqdm import tqdm

from common import provenance
from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.engine import dist, flops, run_folder
from pretrain.engine.feed import Fed
from pretrain.engine.metrics import MetricLog
from pretrain.engine.profile_summary import print_summary, rows_of
from pretrain.engine.sections import SectionTimer
from pretrain.engine.train import Run
from pretrain.models.contrastive import FAContrastive

FORMAT = "fa-profile-1"
NUM_WARMUP, MOST_TRACED, MOST_STEPS = 5, 3, 10_000
_NEVER = 1 << 40


def parse_num_steps(text: str) -> int:
    """The N of ``--profile N``.

    Raises:
        UserError: If it is no whole number from 1 to 10,000.
    """
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_STEPS:
        raise UserError(
            f"--profile {text}: N is the number of timed steps, 1 to {MOST_STEPS}; write "
            "--profile=N, or --profile after the last key=value"
        )
    return int(text)


def profile(config: PretrainConfig, num_steps: int) -> dict[str, Any]:
    """Run warm-up steps, N timed ones and a few traced ones; write and print what they cost.

    ``OUT/profile/trace.json.gz`` opens in Perfetto (ui.perfetto.dev) or chrome://tracing;
    ``OUT/profile/summary.json`` has the figures. No checkpoint, no row of a log, no probe.

    Args:
        config: The whole config; ``out`` must hold no run.
        num_steps: Timed steps.
    Returns:
        The summary.
    Raises:
        UserError: As ``Run``, or if the run has fewer steps.
    """
    run = Run(_only_steps(config), resume=False)
    num_traced = min(num_steps, MOST_TRACED)
    total = NUM_WARMUP + num_steps + num_traced
    if run.num_steps < total:
        raise UserError(
            f"--profile {num_steps} takes {total} steps ({NUM_WARMUP} of them to warm up, "
            f"{num_traced} traced), and this run has {run.num_steps}: take fewer, or raise "
            "optim.epochs"
        )
    fill_queues(run.model)
    folder = run.folder / "profile"
    folder.mkdir(exist_ok=True)
    is_main = dist.rank() == 0
    if is_main:
        print(f"profile: {total} steps, not a training run; weights are not kept", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name, run.hang_timer:
        log = MetricLog(Path(name), -1, -1) if is_main else None
        try:
            measured = _measure(run, log, num_steps, num_traced, folder)
        finally:
            if log is not None:
                log.close()
    summary = _summary(run, measured) if is_main else {}
    if is_main:
        run_folder.write_json(folder / "summary.json", summary)
        print_summary(summary, folder)
    if run.lock is not None:
        run.lock.close()
    dist.stop()
    return summary


def _only_steps(config: PretrainConfig) -> PretrainConfig:
    """The same steps, without checkpoints, probes, pictures and trackers around them."""
    return replace(
        config,
        engine=replace(config.engine, checkpoint_every_steps=_NEVER, on_collapse="warn"),
        eval=replace(config.eval, probe_train=None, probe_val=None, num_pictures=0),
        tracking=replace(config.tracking, wandb=False),
    )


@torch.no_grad()
def fill_queues(model: FAContrastive) -> None:
    """Random features in every queue; the global random state stays."""
    generator = torch.Generator().manual_seed(0)
    if model.queue is not None:
        buffer = model.queue.features
        model.queue.put(torch.randn(buffer.shape, generator=generator).to(buffer.device))
    if model.objective.negatives is not None:
        shape = model.objective.negatives[0].get_buffer("features").shape
        device = model.objective.negatives[0].get_buffer("features").device
        model.objective.put(torch.randn(2, *shape, generator=generator).to(device))


class Batches:
    """The run's batches in portions; an epoch that ends in the middle is followed by the next."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._iterator: Iterator[Fed] | None = None

    def take(self, num: int, after_each: Callable[[], None] = lambda: None) -> Iterator[Fed]:
        """So many batches; ``after_each`` is called when the loop asks for what follows."""
        for _ in range(num):
            yield self._next()
            after_each()

    def _next(self) -> Fed:
        position = self._run.position
        while True:
            if self._iterator is None:
                self._iterator = self._run.feed.epoch(position.epoch, position.step_in_epoch)
            fed = next(self._iterator, None)
            if fed is not None:
                return fed
            self._iterator = None
            position.epoch, position.step_in_epoch = position.epoch + 1, 0

    def close(self) -> None:
        """Let the loader's workers go."""
        self._iterator = None


def _measure(
    run: Run, log: MetricLog | None, num_steps: int, num_traced: int, folder: Path
) -> dict[str, Any]:
    """Warm up, time, trace."""
    batches, device = Batches(run), run.device
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    total = NUM_WARMUP + num_steps + num_traced
    with _bar(total, is_shown=log is not None) as bar:
        run.steps(batches.take(NUM_WARMUP), log, bar)
        _forget_peak(device)
        with SectionTimer(device) as timer:
            timer.bound()
            run.steps(batches.take(num_steps, timer.bound), log, bar)
            seconds, costs = timer.step_seconds(), timer.costs()
        peak = _peak_memory_bytes(device)
        with torch_profile(activities=activities) as trace:
            started = time.perf_counter()
            run.steps(batches.take(num_traced), log, bar)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            traced_seconds = (time.perf_counter() - started) / num_traced
        batches.close()
    if log is not None:
        _write_trace(trace, folder / "trace.json.gz")
    return {
        "seconds": seconds, "costs": costs, "peak_memory_bytes": peak,
        "traced_seconds": traced_seconds, "num_traced": num_traced,
    }  # fmt: skip


def _bar(total: int, *, is_shown: bool) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 10
    return tqdm(
        total=total, desc="profile", unit="step", disable=not is_shown, mininterval=interval
    )


def _write_trace(trace: torch_profile, path: Path) -> None:
    """Compressed in large pieces: torch's own ``.gz`` takes ten times as long."""
    plain, partial = path.with_name("trace.partial.json"), path.with_name("trace.partial.gz")
    trace.export_chrome_trace(str(plain))
    with open(plain, "rb") as source, gzip.open(partial, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    plain.unlink()
    os.replace(partial, path)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_bytes(device: torch.device) -> int:
    """Of the GPU since it was forgotten, otherwise of this process and its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return provenance.peak_memory_bytes()


def _summary(run: Run, measured: dict[str, Any]) -> dict[str, Any]:
    config, device, seconds = run.config, run.device, measured["seconds"]
    mean = sum(seconds) / len(seconds)
    precision = flops.precision_of(run.gradients.autocast(), device)
    counted = flops.model_flops(run.model, config.data.image_size)
    ceiling = flops.ceiling(device, precision)
    per_step = counted.per_picture * config.data.batch_size // dist.world_size()
    return {
        "format": FORMAT,
        "note": "a profile, not a training run; queues were filled with random features",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "num_threads": torch.get_num_threads(),
        "num_processes": dist.world_size(),
        "batch_size": config.data.batch_size,
        "image_size": config.data.image_size,
        "num_warmup_steps": NUM_WARMUP,
        "num_steps": len(seconds),
        "step_ms": {
            "mean": 1e3 * mean,
            "median": 1e3 * statistics.median(seconds),
            "min": 1e3 * min(seconds),
            "max": 1e3 * max(seconds),
        },
        "images_per_second": config.data.batch_size / mean,
        "sections": rows_of(measured["costs"], sum(seconds), len(seconds)),
        "flops": {
            **vars(counted),
            "per_picture": counted.per_picture,
            "per_step_and_device": per_step,
        },
        "ceiling": dict(vars(ceiling)),
        "mfu": per_step / (mean * ceiling.flops_per_second),
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "trace": {
            "file": "trace.json.gz",
            "num_steps": measured["num_traced"],
            "step_ms": 1e3 * measured["traced_seconds"],
        },
    }
