#!/usr/bin/env python3
"""Look at this machine and say what is there, what is missing, and what to do about it.

Example:
    .venv/bin/python tools/doctor.py
    .venv/bin/python tools/doctor.py --json

Exit status: 0 everything needed is there, 1 something is missing, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "pillow", "simplejpeg",
            "jsonargparse", "fvcore", "pycocotools")  # fmt: skip
# Other names of the same library, one of which a machine may bring.
ALIASES = {"opencv-python": ("opencv-python-headless", "opencv-contrib-python",
                             "opencv-contrib-python-headless")}  # fmt: skip
SETUP = "run `bash tools/setup.sh --force`"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty when nothing is to be done."""

    status: Literal["ok", "missing"]
    detail: str
    remedy: str = ""


def check_python() -> Finding:
    """Interpreter and system."""
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):  # noqa: UP036 (the doctor may be called with any interpreter)
        return Finding("missing", detail, "Python 3.11 or newer is needed")
    return Finding("ok", detail)


def check_packages() -> Finding:
    """Versions of the main packages."""
    versions = {}
    for name in PACKAGES:
        for candidate in (name, *ALIASES.get(name, ())):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(candidate)
    absent = ", ".join(name for name in PACKAGES if name not in versions)
    detail = ", ".join(map(" ".join, versions.items()))
    remedy = f"{SETUP} (lacking: {absent})" if absent else ""
    return Finding("missing" if absent else "ok", detail, remedy)


def check_devices() -> Finding:
    """Processors that torch sees."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    device = f"GPU: {', '.join(gpus)}" if gpus else "no CUDA GPU: use the presets for CPUs"
    return Finding("ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}; {device}")


def check_compiled_libraries() -> Finding:
    """NMS and ROIAlign, which Faster R-CNN here runs on; OpenCV's JPEG."""
    import cv2
    import numpy as np
    import torch
    from torchvision.ops import nms, roi_align

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]])
    kept = nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist()
    pooled = roi_align(torch.ones(1, 1, 8, 8), [boxes], output_size=2)
    _, data = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if kept != [0] or tuple(pooled.shape) != (2, 1, 2, 2) or image is None:
        return Finding("missing", "wrong results", SETUP)
    return Finding("ok", f"NMS, ROIAlign and OpenCV {cv2.__version__} work")


def check_detectron2() -> Finding:
    """Detectron2 and its compiled operators."""
    from common.provenance import library_version
    from detection import compat

    version = library_version("detectron2") or "of unknown version"
    compiled = "there" if compat.has_compiled_operators() else "absent, none is needed"
    return Finding("ok", f"{version}; compiled operators: {compiled}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "packages": check_packages,
    "devices": check_devices,
    "compiled libraries": check_compiled_libraries,
    "Detectron2": check_detectron2,
}


def remedy_for(name: str, error: BaseException) -> str:
    """What to do about a check that raised."""
    text = str(error)
    if "nms does not exist" in text or "has no attribute 'nms'" in text:
        return f"torch and torchvision are not of one build: take both from one index, or {SETUP}"
    if "libGL" in text or "libgthread" in text:
        return "a system library is missing: apt-get install libgl1 libglib2.0-0"
    if name == "Detectron2":
        return f"run `.venv/bin/python tools/install_detectron2.py --force`, or {SETUP}"
    return SETUP


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check; one that raises becomes a finding with a remedy. Returns the exit status."""
    make_parser: Callable[..., argparse.ArgumentParser] = argparse.ArgumentParser
    with contextlib.suppress(Exception):  # not installed, or an old Python: the checks say so
        from common.errors import command_parser as make_parser
    parser = make_parser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    findings = {}
    for name, check in CHECKS.items():
        try:
            findings[name] = check()
        except Exception as error:  # a broken installation may raise anything when imported
            detail = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            findings[name] = Finding("missing", detail, remedy_for(name, error))
    is_ready = all(finding.status != "missing" for finding in findings.values())
    if options.json:
        rows = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
        print(json.dumps({"ready": is_ready, "findings": rows}, indent=1))
    else:
        for name, finding in findings.items():
            remedy = f"\n         -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.status:7}  {name}: {finding.detail}{remedy}")
        print("ready" if is_ready else "not ready, see the remedies above")
    return 0 if is_ready else 1


if __name__ == "__main__":
    sys.exit(main())
