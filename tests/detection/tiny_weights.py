"""Made for the conversion tests: small ResNets in torchvision's layout, in many wrappings."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.network import ResNet
from common.resnet import Arch
from tests.detection.tiny_detection import liven_norms

TINY = Arch(50, 2, 3, 8)


def torchvision_state(arch: Arch = TINY, seed: int = 0) -> dict[str, Tensor]:
    """A state_dict as torchvision's: its order, lively norms, batch counters that all differ."""
    return {name: value.clone() for name, value in _made(arch, seed).items()}


@functools.cache
def _made(arch: Arch, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = liven_norms(ResNet(arch), seed).state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    for number, name in enumerate(counters):
        state[name].fill_(1000 + 7 * number + seed)
    return dict(state)


def our_checkpoint(state: dict[str, Tensor], arch: Arch = TINY, **changes: Any) -> dict[str, Any]:
    """A checkpoint of ours around a backbone."""
    return {
        "format": "fa-pretrain-1",
        "arch": dict(vars(arch)),
        "preprocessing": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "order": "RGB"},
        "model": {f"backbone.{name}": value for name, value in state.items()}
        | {"projector.0.weight": torch.ones(4, 4)},
        "ema": None,
        **changes,
    }


def save(value: Any, path: Path) -> Path:
    """torch.save, for short tests."""
    torch.save(value, path)
    return path
