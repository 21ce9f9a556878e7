"""Torch, imported on first use: settings with their functions can be read without it.

``from common.lazy import Tensor, functional, nn, torch`` stands for torch's own imports. It serves
annotations and bodies of functions; decorators and base classes would import torch at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
    from torch import distributed as distributed
    from torch import nn as nn
    from torch.nn import functional as functional
else:

    class _Lazy:
        def __init__(self, module: str) -> None:
            self._name, self._module = module, None

        def __getattr__(self, attribute: str) -> Any:
            if self._module is None:
                self._module = importlib.import_module(self._name)
            return getattr(self._module, attribute)

    torch, nn, functional = _Lazy("torch"), _Lazy("torch.nn"), _Lazy("torch.nn.functional")
    distributed, Tensor = _Lazy("torch.distributed"), "Tensor"  # the latter is for annotations
