"""Torch, imported on first use: settings with their functions can be read without it.

``from common.lazy import functional, torch`` stands for the imports of these names. It serves
bodies of functions; decorators and base classes would import torch at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import distributed as distributed
    from torch.nn import functional as functional
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    torch, distributed, functional = map(
        _Lazy, ("torch", "torch.distributed", "torch.nn.functional")
    )
