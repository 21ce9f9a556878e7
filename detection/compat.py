"""Entry point to Detectron2: import this module before any name of `detectron2`.

Detectron2's reader of weights, and its question whether torch's compiler is at work, are patched
here, at run time, and nowhere else. What it needs of torch, numpy and Pillow is the work of the
build: the pure-Python one that tools/install_detectron2.py makes, or a user's own of the current
main branch.

Not patched, but avoided: `detectron2.model_zoo` imports `pkg_resources`, gone since setuptools 82.
The base YAMLs are kept in configs/detection/, and no module here may import `model_zoo`.
"""

from __future__ import annotations

import common.startup  # noqa: F401  (before torchvision)

# isort: split
import importlib
import importlib.util
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from common import checkpoints
from common.errors import UserError


def require_detectron2() -> Path:
    """Find the installed Detectron2 without importing it.

    Returns:
        Folder of the package.

    Raises:
        UserError: If there is none, naming the remedy.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        raise UserError(
            "Detectron2 is not installed; run `bash tools/setup.sh`, or "
            "`.venv/bin/python tools/install_detectron2.py`, or install an official build"
        )
    return Path(spec.origin).parent


def has_compiled_operators() -> bool:
    """Whether Detectron2's own C++/CUDA library is there; Faster R-CNN does without."""
    return any(require_detectron2().glob("_C.*"))


def patch_safe_pickle() -> None:
    """Detectron2's checkpointer reads `.pkl` with `pickle.load`, which runs what the file says.

    The name `pickle` in that one module is pointed at the restricted reader instead.

    Raises:
        UserError: If Detectron2 is missing, or reads weights in another way.
    """
    require_detectron2()
    with warnings.catch_warnings():  # torch's, about each function that Detectron2 scripts
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", message="`torch.jit.script`", category=kind)
        importlib.import_module("detectron2.engine")
        module = importlib.import_module("detectron2.checkpoint.detection_checkpoint")
    if not hasattr(module, "pickle"):
        raise UserError(
            "this Detectron2 reads .pkl weights in a way detection/compat.py does not know, so it "
            "cannot be kept from running code in them; install the tested build with "
            "`.venv/bin/python tools/install_detectron2.py --force`"
        )
    module.__dict__["pickle"] = SimpleNamespace(load=checkpoints.load)


def silence_torch() -> None:
    """Keep torch's advice to the authors of Detectron2 off the user's screen."""
    warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def leave_compiler_out() -> None:
    """Detectron2's convolutions ask torch's compiler whether it is at work, and import it for that.

    The public function that says the same does not.
    """
    wrappers = importlib.import_module("detectron2.layers.wrappers")
    if hasattr(wrappers, "check_if_dynamo_compiling"):
        wrappers.__dict__["check_if_dynamo_compiling"] = torch.compiler.is_compiling


patch_safe_pickle()
leave_compiler_out()
silence_torch()
