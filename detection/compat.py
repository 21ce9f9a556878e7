"""Entry point to Detectron2: import this module before any name of `detectron2`.

Detectron2's last release is of 2021. What does not work with current versions of torch, numpy,
Pillow or setuptools is patched here, at run time, and nowhere else. Each patch has a name and is
applied only where it is needed. The pure-Python build that tools/install_detectron2.py makes needs
only `safe-pickle`; the others are for a user's own build of the v0.6 tag.

Not patched, but avoided: `detectron2.model_zoo` imports `pkg_resources`, gone since setuptools 82.
The base YAMLs are kept in configs/detection/, and no module here may import `model_zoo`.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def _source_mentions(file: str, text: str) -> bool:
    """Whether a file of the installed Detectron2 holds `text`; False if the file is gone."""
    path = require_detectron2() / file
    return path.is_file() and text in path.read_text()


def patch_numpy_aliases() -> bool:
    """v0.6 says `np.str`, `np.int` and `np.bool`, which numpy 1.24 removed."""
    import numpy as np

    needed = {
        "str": ("data/datasets/pascal_voc.py", "np.str)"),
        "int": ("data/build.py", "np.int)"),
        "bool": ("modeling/proposal_generator/rrpn.py", "np.bool)"),
    }
    aliases = {"str": str, "int": int, "bool": bool}
    missing = [
        name
        for name, (file, text) in needed.items()
        if _source_mentions(file, text) and name not in vars(np)
    ]
    for name in missing:
        setattr(np, name, aliases[name])
    return bool(missing)


def patch_pillow_linear() -> bool:
    """v0.6 says `Image.LINEAR`, which Pillow 10 removed; it was another name of `BILINEAR`."""
    from PIL import Image

    if hasattr(Image, "LINEAR") or not _source_mentions(
        "data/transforms/transform.py", "Image.LINEAR"
    ):
        return False
    Image.LINEAR = Image.Resampling.BILINEAR  # pyright: ignore[reportAttributeAccessIssue]
    return True


def _import_quietly(name: str) -> ModuleType:
    """Import without torch's warning about each function that fvcore and Detectron2 script."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", message="`torch.jit.script`", category=kind)
        importlib.import_module("detectron2.engine")
        return importlib.import_module(name)


def patch_safe_pickle() -> bool:
    """Detectron2's checkpointer reads `.pkl` with `pickle.load`, which runs what the file says.

    The name `pickle` in that one module is pointed at the restricted reader instead.
    """
    module = _import_quietly("detectron2.checkpoint.detection_checkpoint")
    if not hasattr(module, "pickle"):
        raise UserError(
            "this Detectron2 reads .pkl weights in a way detection/compat.py does not know, so it "
            "cannot be kept from running code in them; install the tested build with "
            "`.venv/bin/python tools/install_detectron2.py --force`"
        )
    if getattr(module.pickle, "load", None) is checkpoints.load:
        return False
    module.__dict__["pickle"] = SimpleNamespace(load=checkpoints.load)
    return True


# In order of use: the first two must stand before Detectron2's data modules are imported.
PATCHES: dict[str, Callable[[], bool]] = {
    "numpy-aliases": patch_numpy_aliases,
    "pillow-linear": patch_pillow_linear,
    "safe-pickle": patch_safe_pickle,
}
_active: list[str] = []


def install_patches() -> list[str]:
    """Apply the patches that this environment needs; calling it again changes nothing.

    Returns:
        Names of the patches in force, in order.

    Raises:
        UserError: If Detectron2 is missing.
    """
    require_detectron2()
    _active.extend(name for name, patch in PATCHES.items() if patch() and name not in _active)
    return list(_active)


install_patches()
