"""Import this before torchvision: torch's compiler then stays out, until something is compiled.

torch 2.15 imports ``torch._dynamo`` where torchvision defines ROIAlign and where an optimiser is
made. That takes 1.2 s of processor time and 150 MB in each process, as long as torch itself, and
does nothing where nothing is compiled. A process that has imported it already is left as it is.
"""

import gc
import importlib
import sys
import types
from typing import Any

_collects_garbage = gc.isenabled()
gc.disable()  # else it looks again and again at all that torch makes: 0.2 s

import torch  # noqa: E402

_COMPILER = "torch._dynamo"


def _later(name: str) -> Any:
    """A function of the compiler that is imported when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **options: getattr(
        importlib.import_module(f"{_COMPILER}.utils"), name
    )(*args, **options)  # fmt: skip


def _import_torchvision() -> None:
    """With a stand-in for the compiler, which has what ROIAlign imports and is gone afterwards."""
    package, utils = types.ModuleType(_COMPILER), types.ModuleType(f"{_COMPILER}.utils")
    package.__path__ = []
    utils.__dict__["__getattr__"] = _later
    stand_ins = {module.__name__: module for module in (package, utils)}
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("torchvision.ops")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def begin_program() -> None:
    """For a program that has imported its modules; not for a library.

    Modules stay to the end, so no collection looks at them again, the last one neither (0.4 s).
    SGD, Adam and own optimisers do without the compiler; a step that is itself inside
    ``torch.compile`` would be traced in one piece.
    """
    if not gc.get_freeze_count():  # once: what a later call finds may be garbage
        gc.freeze()
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
if _collects_garbage:
    gc.enable()
