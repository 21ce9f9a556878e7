"""Statistics of frozen batch norms, measured on training pictures.

A frozen random backbone keeps batch-norm statistics 0 and 1, under which its features may shrink
or grow from stage to stage: it would lose to any pretrained one for that reason alone. So every
arm with a frozen backbone gets the same treatment first: the statistics of all frozen norms are
measured on the same training pictures (fvcore's precise BN), then frozen. Weights and biases stay.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn


class _ImagesToBackbone(nn.Module):
    """A detector's way from pictures to feature maps."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.get_submodule("backbone")
        self._preprocess: Callable[[Any], Any] = getattr(detector, "preprocess_image")  # noqa: B009

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Normalise and pad the pictures, then run the backbone."""
        return self.backbone(self._preprocess(batch).tensor)


def calibrate_frozen_norms(
    detector: nn.Module, batches: Iterable[list[dict[str, Any]]], num_batches: int
) -> int:
    """Replace the statistics of every frozen batch norm in the backbone.

    Args:
        detector: A GeneralizedRCNN; changed in place, its training mode is kept.
        batches: Training batches.
        num_batches: How many of them are read.

    Returns:
        Number of norms calibrated (0: nothing is frozen).
    """
    path = _ImagesToBackbone(detector)
    frozen = {
        name: module
        for name, module in path.backbone.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
    }
    if not frozen or num_batches < 1:
        return 0
    was_training = {module: module.training for module in path.modules()}
    path.eval()
    measured = {name: _as_batch_norm(module) for name, module in frozen.items()}
    for name, module in measured.items():
        _replace(path.backbone, name, module)
    with torch.no_grad():
        update_bn_stats(path, batches, num_batches)
    for name, module in frozen.items():
        for field in ("running_mean", "running_var"):
            module.get_buffer(field).copy_(measured[name].get_buffer(field))
        _replace(path.backbone, name, module)
    for module, training in was_training.items():
        module.training = training
    return len(frozen)


def _as_batch_norm(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    """A batch norm in training mode with a frozen one's scale and shift, on its device."""
    scale = frozen.get_buffer("weight")
    norm = nn.BatchNorm2d(frozen.num_features, eps=frozen.eps, device=scale.device)
    norm.weight.data.copy_(scale)
    norm.bias.data.copy_(frozen.get_buffer("bias"))
    return norm.train()


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
