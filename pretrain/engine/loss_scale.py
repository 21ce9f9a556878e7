"""The loss scale of fp16: gradients too small for fp16 are kept, those too large leave a step out.

bf16 and fp32 need none: everything here is then the identity.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.engine import guards
from pretrain.engine.state import Position

INITIAL = 2.0**16
"""The first scale, torch's own: it falls within a few steps to one that fits."""


class LossScale:
    """PyTorch's gradient scaler, with one reading of the device for each step.

    Args:
        config: ``precision`` and ``min_loss_scale``.
        folder: The run's, for errors.
        device: Where steps run.
    """

    def __init__(self, config: EngineConfig, folder: Path, device: torch.device) -> None:
        self.is_on = config.precision == "fp16"
        self.is_loss_bad = False
        self._least, self._folder = config.min_loss_scale, folder
        self._scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL, enabled=self.is_on)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss that ``backward`` is called on."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """After the backward pass: the gradients of the loss itself; ``overflowed`` must follow."""
        self._scaler.unscale_(optimizer)

    def overflowed(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, position: Position
    ) -> bool:
        """Whether gradients were too large for the scale, so that the update must be left out.

        The scale then falls to a half; after 2000 steps without it doubles. A loss that is not
        finite is not the scale's fault: the scale stays, and ``is_loss_bad`` asks the guard to
        look. All processes must call it; they decide alike.

        Args:
            loss: Of this process's rows.
            optimizer: Its gradients are those of the loss itself.
            position: Where steps that are left out here are counted.
        Raises:
            NonFiniteLossError: If the scale falls below ``min_loss_scale``.
        """
        if not self.is_on:
            return False
        (found,) = self._scaler._found_inf_per_device(optimizer).values()  # all on one device
        is_bad = (~loss.detach().isfinite()).to(found)
        seen = dist.highest(torch.stack([found.squeeze(), is_bad])).tolist()
        has_overflowed, self.is_loss_bad = bool(seen[0]), bool(seen[1])
        if self.is_loss_bad:
            self._scaler.update(self._scaler.get_scale())
            return False
        self._scaler.update()
        if has_overflowed:
            position.num_overflow_steps += 1
            self._check(position)
        return has_overflowed

    def _check(self, position: Position) -> None:
        scale = self._scaler.get_scale()
        if scale < self._least:
            what = (
                f"the loss scale has collapsed: it is {scale:g} at step {position.step + 1}, below "
                f"engine.min_loss_scale ({self._least:g}), after {position.num_overflow_steps} "
                "steps whose gradients were not finite in fp16; use engine.precision=bf16 or fp32"
            )
            raise guards.NonFiniteLossError(self._folder, what)

    def figures(self, position: Position) -> dict[str, float]:
        """For a row of the log: the scale, and the steps left out for it; nothing without one."""
        if not self.is_on:
            return {}
        num = position.num_overflow_steps
        return {"loss_scale": self._scaler.get_scale(), "num_overflow_steps": num}

    def state_dict(self) -> dict[str, Any] | None:
        """Plain numbers for the checkpoint; None without a scale."""
        return self._scaler.state_dict() if self.is_on else None

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; one of a run in another precision has no scale to go on from."""
        if self.is_on and state is not None:
            self._scaler.load_state_dict(state)
