"""Import this before torchvision: torch's compiler then stays out, until something is compiled.

torch 2.15 imports ``torch._dynamo`` where torchvision defines ROIAlign and where an optimiser is
made. That takes 1.2 s of processor time and 150 MB in each process, as long as torch itself, and
does nothing where nothing is compiled. A process that has imported it already is left as it is.
"""

import importlib
import sys
import types
from typing import Any

import torch

_COMPILER = "torch._dynamo"


def _is_compile_supported(device_type: str) -> bool:
    return importlib.import_module(f"{_COMPILER}.utils").is_compile_supported(device_type)


def _import_torchvision() -> None:
    """With a stand-in for the compiler, which has what ROIAlign imports and is gone afterwards."""
    package, utils = types.ModuleType(_COMPILER), types.ModuleType(f"{_COMPILER}.utils")
    package.__path__ = []
    utils.__dict__["is_compile_supported"] = _is_compile_supported
    stand_ins = {module.__name__: module for module in (package, utils)}
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("torchvision.ops")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def simplify_optimizers() -> None:
    """Make SGD, Adam and own optimisers without the compiler; for a program, not for a library.

    A step that is itself inside ``torch.compile`` would then be traced in one piece.
    """
    if _COMPILER in sys.modules:
        return
    # Two decorators import it: what they decorate takes their place.
    for kind in (torch.optim.Optimizer, torch.optim.SGD, torch.optim.Adam):
        for name, method in list(vars(kind).items()):
            plain: Any = getattr(method, "__wrapped__", None)
            if plain is not None and name == "step":
                kind.step = torch.no_grad()(plain)
            elif plain is not None:
                plain.__dynamo_disable = plain


if _COMPILER not in sys.modules:
    _import_torchvision()
