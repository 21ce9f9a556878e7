"""What ends a run before it does harm: values that are not finite, steps that hang, no memory.

docs/guards.md says what each guard looks at, when, and what it costs.
"""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.errors import RunFailed
from pretrain import collectives as dist
from pretrain.config import EngineConfig, PretrainConfig
from pretrain.data.loader import TwoViewBatch
from pretrain.engine import run_folder, saver
from pretrain.engine.state import Position

FOLDER = "nonfinite"
STDERR = 2  # file descriptor: faulthandler cannot write to a stream that a test has replaced
FORMAT = "fa-nonfinite-1"
_NONE = 1 << 62  # later than any step
_CPU_MEMORY = "DefaultCPUAllocator"
_KILLED_WORKER = ("is killed by signal: Killed", "is killed by signal: Bus error")


class NonFiniteLossError(RunFailed):
    """Loss, gradients or weights are NaN or infinite: going on would only destroy the weights.

    The message looks for the checkpoint when it is read: one that was being written is there then.

    Args:
        folder: Of the run.
        what: What was seen, and at which step.
    """

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(folder, what)

    def __str__(self) -> str:
        """What was seen, what is saved, what to change."""
        folder, what = self.args
        path = folder / saver.NAME
        saved = f"{path} holds an earlier state" if path.exists() else "no checkpoint was written"
        return f"{what}; {saved}. Lower optim.base_lr or lengthen optim.warmup_epochs"


@dataclass(frozen=True)
class _Noted:
    """What is kept of a step until it is looked at.

    Attributes:
        step: Its number, from 1 on.
        batch: The local samples; the pictures are not kept.
        loss: Of the local rows.
        norm: Of all gradients together.
    """

    step: int
    batch: TwoViewBatch
    loss: Float[Tensor, ""]
    norm: Float[Tensor, ""]


class NonFiniteGuard:
    """Looks at loss and gradient norm between the backward pass and the update.

    With ``engine.on_nonfinite=skip`` it looks at every step; with ``stop`` at every step of a
    single process on a CPU, elsewhere at the steps that are logged or saved, so that a GPU is not
    waited for. The first step that was not finite is known exactly in either case. All processes
    decide alike.

    Args:
        config: ``on_nonfinite`` and ``max_nonfinite_steps``.
        folder: The run's folder.
        networks: Their buffers (BN statistics) are what a forward pass changes.
        device: Where steps run.
    """

    def __init__(
        self, config: EngineConfig, folder: Path, networks: Iterable[nn.Module],
        device: torch.device,
    ) -> None:  # fmt: skip
        self._config, self._folder, self._device = config, folder, device
        self._skips = config.on_nonfinite == "skip"
        self._is_always_due = self._skips or (device.type == "cpu" and not dist.is_on())
        self._noted: list[_Noted] = []
        buffers = [buffer for network in networks for buffer in network.buffers()]
        self._buffers = buffers if self._skips else []
        self._kept = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Before the forward pass: remember what it changes, where a step may be taken back."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def refuses(
        self,
        position: Position,
        batch: TwoViewBatch,
        loss: Tensor,
        parameters: Iterable[nn.Parameter],
        *,
        is_due: bool,
    ) -> bool:
        """After the backward pass: whether the update must be left out.

        Args:
            position: Before this step; a step that is left out is counted there.
            batch: This process's samples.
            loss: Of this process's rows.
            parameters: With the gradients, which are the same in all processes.
            is_due: The device is waited for at this step anyway: it is logged or saved.
        Raises:
            NonFiniteLossError: With ``stop``, or after ``max_nonfinite_steps`` steps left out.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._noted.append(_Noted(position.step + 1, batch, loss.detach(), norm))
        if not (self._is_always_due or is_due):
            return False
        noted, self._noted = self._noted, []
        first = self._first(noted)
        if first == _NONE:
            return False
        what = self._write(next(x for x in noted if x.step == first), position)
        if not self._skips:
            raise self._error(f"{what} at step {first}", first)
        if position.num_skipped_steps >= self._config.max_nonfinite_steps:
            raise self._error(
                f"{what} at step {first}, and {position.num_skipped_steps} steps were left out "
                f"before, as many as engine.max_nonfinite_steps allows",
                first,
            )
        position.num_skipped_steps += 1
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)
        return True

    def _first(self, noted: list[_Noted]) -> int:
        """The first step that was not finite in any process."""
        seen = torch.stack([torch.stack([x.loss.double(), x.norm.double()]) for x in noted])
        bad = (~seen.isfinite().all(dim=1)).tolist()
        first = next((x.step for x, is_bad in zip(noted, bad, strict=True) if is_bad), _NONE)
        if not dist.is_on():
            return first
        return -int(dist.highest(torch.tensor(-first, device=self._device)))

    def _write(self, noted: _Noted, position: Position) -> str:
        """Write the step and its samples to a file; returns what was not finite."""
        one = dist.gather(torch.stack([noted.loss.double(), noted.norm.double()]).unsqueeze(0))
        losses, norm = one[:, 0].tolist(), float(one[:, 1].max())
        batch = {
            name: dist.gather(getattr(noted.batch, name)).tolist()
            for name in ("sample_ids", "visits", "keys")
        }
        if dist.rank() == 0:
            path = file_of(self._folder, noted.step)
            path.parent.mkdir(exist_ok=True)
            row = {
                "format": FORMAT, "step": noted.step, "epoch": position.epoch,
                "policy": self._config.on_nonfinite, "loss": [_plain(x) for x in losses],
                "gradient_norm": _plain(norm), **batch,
            }  # fmt: skip
            run_folder.write_json(path, row)
        loss = sum(losses) / len(losses)
        return f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"

    def _error(self, what: str, step: int) -> NonFiniteLossError:
        file = file_of(self._folder, step)
        return NonFiniteLossError(self._folder, f"{what}; its batch is in {file}")


def file_of(folder: Path, step: int) -> Path:
    """Where the batch of a step that was not finite is written."""
    return folder / FOLDER / f"step-{step:08d}.json"


def _plain(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)


class HangTimer:
    """Prints the stacks of all threads to stderr when no step ends for ``engine.watchdog_seconds``.

    The timer is faulthandler's own thread, which needs no lock of the interpreter. With
    ``engine.on_hang=stop`` the process then ends with status 1, so that torchrun starts the job
    again. It begins with the first batch, after the loader's processes are forked, and stops at the
    end of its context.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._seconds, self._stops = config.watchdog_seconds, config.on_hang == "stop"

    def restart(self) -> None:
        """Count from now; called when a batch has come, so that waiting for the next one counts."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=self._stops, file=STDERR)

    def __enter__(self) -> HangTimer:
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()


def out_of_memory(error: BaseException, config: PretrainConfig | None) -> str | None:
    """What to tell the user if an error says that memory has run out; None for any other error.

    Args:
        error: CUDA's, PyTorch's on a CPU, Python's, or that of a loader's worker that was killed.
        config: Of the run, for the values that now stand; None before it is read.
    """
    told = " ".join(str(error).split())
    is_worker = any(text in told for text in _KILLED_WORKER)
    is_cuda = isinstance(error, torch.OutOfMemoryError)
    is_cpu = isinstance(error, MemoryError) or _CPU_MEMORY in told
    if not (is_cuda or is_cpu or is_worker):
        return None
    where = "on the GPU" if is_cuda else "in a loader's process" if is_worker else "of the CPU"
    remedy = "; the last checkpoint is whole: the same command with --resume goes on from it"
    changes = "" if config is None else f". Lower {_largest(config, is_worker=is_worker)}"
    return f"out of memory {where} ({_start(told)}){changes}{remedy}"


def _largest(config: PretrainConfig, *, is_worker: bool) -> str:
    """The values that decide how much memory a step takes."""
    data, optim = config.data, config.optim
    sizes = f"data.batch_size ({data.batch_size}), data.image_size ({data.image_size})"
    if is_worker:
        return f"data.num_workers ({data.num_workers}), {sizes}"
    micro = f"{optim.micro_batch_size}" if optim.micro_batch_size else "0: the whole batch at once"
    engine = config.engine
    thrifty = "" if engine.activation_checkpointing else ", engine.activation_checkpointing=true"
    return (
        f"optim.micro_batch_size ({micro}), which keeps the batch, or {sizes}; or set "
        f"engine.precision=bf16 (now {engine.precision}){thrifty}; changes other than in engine "
        "need --allow-changes"
    )


def _start(text: str, most: int = 200) -> str:
    """The beginning of an error's text."""
    return (text if len(text) <= most else f"{text[:most]}..") or "no details"


def value_or_sum(local: int, device: torch.device) -> int:
    """A count summed over the processes; no tensor is made for one process."""
    return int(dist.total(torch.tensor(local, device=device))) if dist.is_on() else local


def describe_skip(folder: Path, position: Position, config: EngineConfig) -> dict[str, Any]:
    """The row of kind ``event`` for the step that was left out just now."""
    return {
        "message": f"step {position.step} was left out: loss or gradients not finite "
        f"({position.num_skipped_steps} of at most {config.max_nonfinite_steps}); its batch is in "
        f"{file_of(folder, position.step)}",
        "num_skipped_steps": position.num_skipped_steps,
    }
