"""The state of a run as a checkpoint: everything that the next step depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.config import PretrainConfig, to_plain
from pretrain.engine import checkpoint
from pretrain.errors import UserError
from pretrain.models.contrastive import FAContrastive

NOT_COMPARED = ("out", "engine", "eval")  # may change when a run goes on: they decide no gradient
# Where the shards lie, and how they are read; that they are the same is seen by their fingerprint.
DATA_NOT_COMPARED = ("shards", "num_workers")


@dataclass
class Position:
    """Where the run stands. ``step`` counts finished optimiser steps."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    num_bad_samples: int = 0
    train_seconds: float = 0.0


def to_checkpoint(
    config: PretrainConfig,
    model: FAContrastive,
    optimizer: torch.optim.Optimizer,
    position: Position,
    num_steps: int,
    data_fingerprint: str | None = None,
) -> dict[str, Any]:
    """Everything, as plain types and tensors (schema in docs/architecture.md).

    ``data_fingerprint`` says which samples the run sees; None where that cannot be known.
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
        "scaler": None,  # bf16 needs no loss scaling
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
        "versions": checkpoint.versions(),
    }


def restore(
    path: Path,
    config: PretrainConfig,
    model: FAContrastive,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    data_fingerprint: str | None = None,
) -> Position:
    """Load a checkpoint into a freshly built run.

    Raises:
        UserError: Damaged file, a changed config (the differences are shown), or changed shards.
    """
    state = checkpoint.load(path)
    saved = {k: v for k, v in state["config"].items() if k not in NOT_COMPARED}
    now = {k: v for k, v in to_plain(config).items() if k not in NOT_COMPARED}
    for plain in (saved, now):
        plain["data"] = {k: v for k, v in plain["data"].items() if k not in DATA_NOT_COMPARED}
    differences = checkpoint.different_keys(saved, now)
    if differences:
        raise UserError(
            f"{path} was made with another config: {'; '.join(differences)}. Restore these values "
            "to resume, or start a new run with another out=DIR"
        )
    if state["schedule"]["num_steps"] != num_steps:
        raise UserError(
            f"{path} was made for {state['schedule']['num_steps']} steps, the shards now give "
            f"{num_steps}: the data set has changed. Give the same shards, or another out=DIR"
        )
    known = state["schedule"].get("data_fingerprint")
    if known is not None and data_fingerprint is not None and known != data_fingerprint:
        raise UserError(
            f"{path} was made with other shards (or other weights of them) than data.shards names "
            "now, so the order of samples would be another. Give the same shards, or start a new "
            "run with another out=DIR"
        )
    model.online.load_state_dict(state["model"])
    if model.ema is not None:
        model.ema.load_state_dict(state["ema"])
    if model.queue is not None:
        model.queue.load_state_dict(state["queue"])
    if model.objective.negatives is not None:
        model.objective.negatives.load_state_dict(state["negatives"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["torch"])
    if torch.cuda.is_available():  # perhaps with fewer devices than before
        for device, cuda_state in enumerate(state["random"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)
    return Position(**state["position"])
