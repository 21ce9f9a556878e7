"""The state of a run as a checkpoint: everything that the next step depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from common import provenance
from common.config import to_plain
from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.engine import checkpoint
from pretrain.engine.optim import load_state
from pretrain.model.joint_embedding import FAContrastive

# May change when a run goes on: they decide no gradient, or its rounding only.
NOT_COMPARED = ("out", "engine", "eval", "tracking")
ENGINE_COMPARED = {"batch_norm": "per_process"}  # but for these; values of older checkpoints
# Where the shards lie, and how they are read; that they are the same is seen by their fingerprint.
DATA_NOT_COMPARED = (
    "shards", "num_workers", "cache_dir", "cache_gb", "read_retries", "read_timeout_seconds",
)  # fmt: skip


@dataclass
class Position:
    """Where the run stands.

    Attributes:
        step: Finished steps, those that were left out included.
        epoch: Finished epochs.
        step_in_epoch: Finished steps of the epoch that has begun.
        num_bad_samples: Pictures that were replaced, in all processes.
        num_skipped_steps: Steps left out since loss or gradients were not finite.
        num_overflow_steps: Steps left out since the loss scale of fp16 was too high.
        train_seconds: Time spent in steps and in waiting for data.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    num_bad_samples: int = 0
    num_skipped_steps: int = 0
    num_overflow_steps: int = 0
    train_seconds: float = 0.0


def to_checkpoint(
    config: PretrainConfig,
    model: FAContrastive,
    optimizer: torch.optim.Optimizer,
    position: Position,
    num_steps: int,
    data_fingerprint: str | None = None,
    scaler: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything, as plain types and tensors (schema in docs/architecture.md).

    ``data_fingerprint`` says which samples the run sees; None where that cannot be known.
    ``scaler`` is the state of the loss scale; None without one.
    """
    arch, negatives = config.arch, model.objective.negatives
    return {
        "format": checkpoint.FORMAT,
        "arch": {
            "depth": arch.depth,
            "width_per_group": arch.width_per_group,
            "stem_channels": arch.stem_channels,
            "res2_channels": arch.res2_channels,
        },
        "preprocessing": {
            "mean": list(config.data.pixel_mean),
            "std": list(config.data.pixel_std),
            "order": "RGB",
        },
        "model": model.online.state_dict(),
        "ema": None if model.ema is None else model.ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler,
        "schedule": {"num_steps": num_steps, "data_fingerprint": data_fingerprint},
        "queue": None if model.queue is None else model.queue.state_dict(),
        "negatives": None if negatives is None else negatives.state_dict(),
        "random": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        "position": dict(vars(position)),
        "config": to_plain(config),
        "step": position.step,
        "versions": provenance.versions(),
    }


def restore(
    state: dict[str, Any],
    config: PretrainConfig,
    model: FAContrastive,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    data_fingerprint: str | None = None,
    *,
    allow_changes: bool = False,
) -> tuple[Position, list[str]]:
    """Bring a freshly built run into the state of a checkpoint.

    Args:
        state: From ``checkpoint.load``.
        config: Of the run that goes on.
        model: Takes the weights, the EMA, the queues.
        optimizer: Takes its state.
        num_steps: Steps that the run has in all.
        data_fingerprint: Which samples the run sees; None where that cannot be known.
        allow_changes: Go on with another config or other shards where the weights fit.
    Returns:
        Where the run stands, and the changes that were allowed, a line each.
    Raises:
        UserError: A changed config or changed shards (the differences are shown), or weights that
            do not fit.
    """
    changes = _changes(state, config, num_steps, data_fingerprint)
    if changes and not allow_changes:
        raise UserError(
            f"the checkpoint was made with another config: {'; '.join(changes)}. Restore these "
            "values to resume, allow them with --allow-changes, or start a new run with another "
            "out=DIR"
        )
    try:
        _load(state, model, optimizer)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the checkpoint does not fit this config ({'; '.join(changes) or 'no change seen'}): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    torch.set_rng_state(state["random"]["torch"])
    if torch.cuda.is_available():  # perhaps with fewer devices than before
        for device, cuda_state in enumerate(state["random"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)
    position = Position(**state["position"])
    if changes:
        steps_per_epoch = num_steps // config.optim.epochs
        position.epoch, position.step_in_epoch = divmod(position.step, steps_per_epoch)
    return position, changes


def _changes(
    state: dict[str, Any], config: PretrainConfig, num_steps: int, data_fingerprint: str | None
) -> list[str]:
    """What differs from the run that the checkpoint was made by, a line each."""
    saved = {k: v for k, v in state["config"].items() if k not in NOT_COMPARED}
    now = {k: v for k, v in to_plain(config).items() if k not in NOT_COMPARED}
    for plain in (saved, now):
        plain["data"] = {k: v for k, v in plain["data"].items() if k not in DATA_NOT_COMPARED}
    for plain, whole in ((saved, state["config"]), (now, to_plain(config))):
        plain["engine"] = {k: whole["engine"].get(k, old) for k, old in ENGINE_COMPARED.items()}
    changes = checkpoint.different_keys(saved, now)
    schedule = state["schedule"]
    if schedule["num_steps"] != num_steps and not changes:
        changes.append(
            f"it was made for {schedule['num_steps']} steps, the shards now give {num_steps}"
        )
    known = schedule.get("data_fingerprint")
    if known is not None and data_fingerprint is not None and known != data_fingerprint:
        changes.append("data.shards: other shards, or other weights of them")
    return changes


def _load(state: dict[str, Any], model: FAContrastive, optimizer: torch.optim.Optimizer) -> None:
    model.online.load_state_dict(state["model"])
    if model.ema is not None:
        model.ema.load_state_dict(state["ema"])
    if model.queue is not None:
        model.queue.load_state_dict(state["queue"])
    if model.objective.negatives is not None:
        model.objective.negatives.load_state_dict(state["negatives"])
    load_state(optimizer, state["optimizer"])
