"""A batch whose loss or gradients were not finite, computed once more to see why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.engine import checkpoint, dist
from pretrain.engine.feed import Fed
from pretrain.engine.guards import FORMAT
from pretrain.engine.state import restore
from pretrain.engine.train import Run


def replay(config: PretrainConfig, file: str | Path, *, allow_changes: bool = False) -> None:
    """Build the batch of a file again, run forward and backward on it, print what came of it.

    Weights are those of the last checkpoint before the step; the file is the run's own, so that
    ``out`` may be left out. Nothing is trained, and nothing in the run's folder is changed.

    Args:
        config: The run's.
        file: ``OUT/nonfinite/step-*.json``.
        allow_changes: Replay with another config, where the weights fit.
    Raises:
        UserError: If the file is none of ours, or the samples are not those of that run.
    """
    path = Path(file)
    row = _read(path)
    config = replace(config, out=config.out or str(path.parent.parent))
    run = Run(config, resume=True, allow_changes=allow_changes)
    standing = _go_back(run, row["step"], allow_changes=allow_changes)
    fed = batch_again(run, row)
    output = run.compute_gradients(fed, row["step"] - 1)[0]
    gradients = [p.grad for p in run.model.online.parameters() if p.grad is not None]
    loss = float(dist.mean(output.loss.detach()))
    lines = [
        f"step {row['step']}, weights after step {standing}",
        f"loss {loss}, gradient norm {float(nn.utils.get_total_norm(gradients))}",
        *(describe(number, view) for number, view in enumerate(fed.views, 1)),
    ]
    num_processes = len(row["loss"])
    if num_processes != dist.world_size():
        lines.append(
            f"note: the run had {num_processes} processes, this has {dist.world_size()}: statistics"
            f" of BN, and so the loss, differ; NPROC={num_processes} makes it the same"
        )
    if dist.rank() == 0:
        print("\n".join(lines))
    if run.lock is not None:
        run.lock.close()


def batch_again(run: Run, row: dict[str, Any]) -> Fed:
    """This process's part of the batch, through the loader's own decoding and augmentation.

    Raises:
        UserError: If the sample numbers mean other pictures than in that run.
    """
    num = len(row["sample_ids"]) // dist.world_size()
    if num * dist.world_size() != len(row["sample_ids"]):
        raise UserError(
            f"--replay: {len(row['sample_ids'])} samples do not divide among {dist.world_size()} "
            "processes"
        )
    own = dist.local_rows(num)
    ids, visits, keys = (
        np.array(row[name][own], np.int64) for name in ("sample_ids", "visits", "keys")
    )
    fed = run.feed.again(ids, visits)
    if not np.array_equal(fed.batch.keys.cpu().numpy(), keys):
        raise UserError(
            "--replay: data.shards holds other pictures under these numbers; name the shards that "
            "the run was made with"
        )
    return fed


def describe(number: int, view: Float[Tensor, "n 3 s s"]) -> str:
    """One line of figures of a view: all processes' rows, values that are finite."""
    values = view.detach().double()
    is_finite = values.isfinite()
    finite = torch.where(is_finite, values, 0.0)
    num = float(dist.total(is_finite.sum().double()))
    num_others = int(dist.total((~is_finite).sum()))
    if num == 0:
        return f"view {number}: no value is finite"
    mean = float(dist.total(finite.sum())) / num
    variance = float(dist.total(torch.where(is_finite, (values - mean).square(), 0.0).sum())) / num
    low = -float(dist.highest(torch.where(is_finite, -values, -torch.inf).max()))
    high = float(dist.highest(torch.where(is_finite, values, -torch.inf).max()))
    spread = values.flatten(1).std(dim=1, correction=0)
    num_flat = int(dist.total((spread == 0).sum()))
    return (
        f"view {number}: mean {mean:.4f}, std {variance**0.5:.4f}, from {low:.4f} to {high:.4f}, "
        f"{num_others} values not finite, {num_flat} pictures of one colour"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--replay: {path} cannot be read ({error})") from error
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        raise UserError(
            f"--replay: {path} is no batch of a step that was not finite; they are in "
            "OUT/nonfinite/"
        )
    return row


def _go_back(run: Run, step: int, *, allow_changes: bool) -> int:
    """Take the newest checkpoint before a step; returns the step of the weights that are there."""
    if run.position.step < step:
        return run.position.step
    for path in _before(run.folder, step):
        position, _ = restore(
            checkpoint.load(path), run.config, run.model, run.optimizer, run.num_steps,
            run.feed.fingerprint, allow_changes=allow_changes,
        )  # fmt: skip
        return position.step
    return run.position.step


def _before(folder: Path, step: int) -> Iterator[Path]:
    """Kept checkpoints of fewer steps, newest first."""
    for path in sorted((folder / "checkpoints").glob("step-*.pth"), reverse=True):
        if int(path.stem[5:]) < step:
            yield path
