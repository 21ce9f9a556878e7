"""``--profile N``: a short run that says where the time of a step goes. No training run.

After warm-up steps N steps are timed without a profiler, which would slow them down. A few more run
under PyTorch's profiler, for the trace and for the time of each range: the loop names its parts
with ``torch.profiler.record_function``. Queues are filled with random features first, so that FA
costs what it costs in a long run.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile as torch_profile

from common import provenance
from common.errors import require
from common.files import write_json
from pretrain import collectives as dist
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.contrastive_task import ContrastiveTask
from pretrain.engine.guards import CollapseAlarm, HangTimer, StopOnSignal
from pretrain.engine.run_folder import ProgressLog, RunFolder
from pretrain.engine.trainer import Trainer
from pretrain.model.joint_embedding import FAContrastive

FORMAT = "fa-profile-3"
NUM_WARMUP, NUM_TRACED = 5, 3
_LEFT_OUT = (Checkpoints, CollapseAlarm, HangTimer, ProgressLog, RunFolder, StopOnSignal)
RANGES = (
    "loader", "wait for views", "transfer", "augmentation", "EMA forward", "forward", "FA", "loss",
    "backward", "guards", "optimiser", "EMA update", "queue", "logging",
)  # fmt: skip
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def profile(trainer: Trainer[ContrastiveTask], num_steps: int) -> None:
    """Run warm-up steps, N timed ones and a few traced ones; write and print what they cost.

    ``OUT/profile/trace.json.gz`` opens in Perfetto (ui.perfetto.dev) or chrome://tracing;
    ``OUT/profile/summary.json`` has the figures. No checkpoint, no row of a log, no probe.

    Args:
        trainer: Fresh.
        num_steps: Timed steps.

    Raises:
        UserError: If the run has fewer steps.
    """
    total = NUM_WARMUP + num_steps + NUM_TRACED
    require(
        num_steps >= 1 and trainer.num_steps >= total,
        f"--profile={num_steps} takes {total} steps, warm-up and trace included, and this run has "
        f"{trainer.num_steps}: take fewer, but 1 at least, or raise optim.epochs",
    )
    task, device = trainer.task, trainer.device
    batch_size, is_cuda = task.config.data.batch_size, device.type == "cuda"
    folder = task.folder / "profile"
    fill_queues(task.model)
    folder.mkdir(exist_ok=True)

    def steps(num: int) -> float:
        """Seconds of one of so many steps."""
        started = time.perf_counter()
        for batch in itertools.islice(stream, num):
            trainer.step(batch)
        if is_cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / num

    # A bar without rows, and the online probe: nothing is saved, and a signal ends it at once.
    log = ProgressLog("profile")
    callbacks = trainer.callbacks  # one of them holds the folder's lock
    kept = [c for c in callbacks if not isinstance(c, _LEFT_OUT)]
    log.trainer, trainer.callbacks = trainer, [*kept, log]
    with contextlib.closing(batches(trainer)) as stream, log:
        flops = count_flops(lambda: steps(1))
        steps(NUM_WARMUP - 1)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = steps(num_steps)
        peak = (torch.cuda.max_memory_allocated if is_cuda else provenance.peak_memory_bytes)()
        with torch_profile() as trace:
            traced_seconds = steps(NUM_TRACED)
    trainer.callbacks = callbacks
    if dist.rank() != 0:
        return
    trace.export_chrome_trace(str(folder / "trace.json.gz"))
    times = range_seconds(trace.events() or (), is_cuda=is_cuda)
    ms, whole = {k: 1e3 * v / NUM_TRACED for k, v in times.items()}, 1e3 * traced_seconds
    ranges = [{"name": k, "ms": ms[k], "share": ms[k] / whole} for k in RANGES if k in ms]
    summary = {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "batch_size": batch_size,
        "step_ms": 1e3 * seconds,
        "images_per_second": batch_size / seconds,
        "ranges": ranges,
        "traced_step_ms": whole,
        "flops_per_step_and_device": flops,
        "peak_memory_bytes": peak,
    }
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{key}: {value}" for key, value in summary.items() if key != "ranges"))
    for row in ranges:
        print(f"{row['name']:16}{row['ms']:10.2f} ms{row['share']:8.1%}")
    print(f"{folder}: summary.json, trace.json.gz (ui.perfetto.dev); nothing was trained")


def range_seconds(events: Iterable[FunctionEvent], *, is_cuda: bool) -> dict[str, float]:
    """Seconds in each range of a trace: the host's, on a GPU those of the kernels it launched.

    On a GPU autograd launches the backward pass from threads of its own, outside of the range.
    """
    seconds: dict[str, float] = {}
    for event in events:
        name = event.name
        if is_cuda and name.startswith("autograd::engine::") and event.cpu_parent is None:
            name = "backward"
        if name in RANGES and event.device_type.name == "CPU":
            micros = event.device_time_total if is_cuda else event.cpu_time_total
            seconds[name] = seconds.get(name, 0.0) + micros / 1e6
    return seconds


def batches(trainer: Trainer[Any]) -> Generator[DeviceBatch]:
    """The run's batches from where it stands; an epoch that ends is followed by the next."""
    position = trainer.position
    while True:
        yield from trainer.batches.epoch(position.epoch, position.step_in_epoch)
        position.epoch, position.step_in_epoch = position.epoch + 1, 0


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the convolutions and matrix products that run in it, two per multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which speaks at exit

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def precision_of(autocast: contextlib.AbstractContextManager, device: torch.device) -> str:
    """In what convolutions run inside this context: fp32, tf32, bf16 or fp16."""
    with autocast:
        if torch.is_autocast_enabled(device.type):
            return _PRECISIONS[torch.get_autocast_dtype(device.type)]
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return "tf32" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "fp32"


@torch.no_grad()
def fill_queues(model: FAContrastive) -> None:
    """Random features in every queue; the global random state stays."""
    generator = torch.Generator().manual_seed(0)
    if model.queue is not None:
        buffer = model.queue.features
        model.queue.put(torch.randn(buffer.shape, generator=generator).to(buffer.device))
    if model.memory is not None:
        kept = next(x for x in model.memory.buffers() if x.ndim > 1 and x.is_floating_point())
        keys = torch.randn(2, *kept.shape[-2:], generator=generator).to(kept.device)
        ids = torch.arange(keys.shape[1], device=kept.device)
        model.objective.after_update(model.memory, keys, ids)
        model.start_epoch(generator)
