#!/usr/bin/env python3
"""Look at this machine and say what is there, what is missing, and what to do about it.

Example:
    .venv/bin/python tools/doctor.py
    .venv/bin/python tools/doctor.py --json

Exit status: 0 everything needed is there (remarks are possible), 1 something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
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

    status: Literal["ok", "remark", "missing"]
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
        for candidate in (*ALIASES.get(name, ()), name):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(candidate)
    detail = ", ".join(f"{name} {versions.get(name, 'missing')}" for name in PACKAGES)
    absent = ", ".join(name for name in PACKAGES if name not in versions)
    if absent:
        return Finding("missing", detail, f"{SETUP} (lacking: {absent})")
    return Finding("ok", detail)


def check_devices() -> Finding:
    """Processors that torch sees."""
    import torch

    device = "no CUDA GPU, the CPU-sized presets are meant for this"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        device = f"GPU: {', '.join(names)}"
    elif torch.backends.mps.is_available():
        device = "Apple GPU (not used by the pipeline)"
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return Finding("ok", f"{cores} CPU cores, torch uses {threads}; {device}")


def check_torchvision_operators() -> Finding:
    """Compiled NMS and ROIAlign, which Faster R-CNN here runs on."""
    import torch
    from torchvision.ops import nms, roi_align

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]])
    kept = nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist()
    pooled = roi_align(torch.ones(1, 1, 8, 8), [boxes], output_size=2)
    if kept != [0] or tuple(pooled.shape) != (2, 1, 2, 2):
        return Finding("missing", "wrong results", SETUP)
    return Finding("ok", "NMS and ROIAlign work")


def check_detectron2() -> Finding:
    """Detectron2 and its compiled operators."""
    from common.provenance import library_version
    from detection import compat

    version = library_version("detectron2") or "of unknown version"
    compiled = "there" if compat.has_compiled_operators() else "absent, none is needed"
    return Finding("ok", f"{version}; compiled operators: {compiled}")


def check_opencv() -> Finding:
    """OpenCV loads and knows JPEG."""
    import cv2
    import numpy as np

    written, data = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))
    if not written or cv2.imdecode(data, cv2.IMREAD_COLOR) is None:
        return Finding("missing", "cannot write JPEG", SETUP)
    return Finding("ok", f"{cv2.__version__}, JPEG works")


def check_programs() -> Finding:
    """Programs that only some uses need."""
    has_compiler = any(map(shutil.which, ("g++", "clang++")))
    has_browser = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    remedies = [
        *(["torch.compile needs a compiler: apt-get install g++"] * (not has_compiler)),
        *(["the report's browser test: apt-get install chromium"] * (not has_browser)),
    ]
    detail = ", ".join(
        f"{name}: {'yes' if is_there else 'no'}"
        for name, is_there in (("C++ compiler", has_compiler), ("Chromium", has_browser))
    )
    return Finding("remark" if remedies else "ok", detail, "; ".join(remedies))


def check_disk() -> Finding:
    """Free space where results go."""
    free_gib = shutil.disk_usage(".").free / 2**30
    if free_gib < 2:
        remedy = "below 2 GiB a run may fail: free some space or give --out on another disk"
        return Finding("remark", f"{free_gib:.0f} GiB free", remedy)
    return Finding("ok", f"{free_gib:.0f} GiB free")


def check_memory() -> Finding:
    """Memory for the presets."""
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":", 1) for line in file)
        available_gib = int(rows["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError, ValueError):  # macOS does not say
        return Finding("ok", "unknown")
    if available_gib < 4:
        remedy = "the demo preset may need up to 6 GiB: close programs or use the smoke preset"
        return Finding("remark", f"{available_gib:.1f} GiB available", remedy)
    return Finding("ok", f"{available_gib:.1f} GiB available")


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "packages": check_packages,
    "devices": check_devices,
    "torchvision operators": check_torchvision_operators,
    "Detectron2": check_detectron2,
    "OpenCV": check_opencv,
    "programs": check_programs,
    "disk": check_disk,
    "memory": check_memory,
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    findings = {}
    for name, check in CHECKS.items():
        try:
            findings[name] = check()
        except Exception as error:  # a broken installation may raise anything when imported
            first_line = (str(error).splitlines() or [""])[0]
            detail = f"{type(error).__name__}: {first_line}"
            findings[name] = Finding("missing", detail, remedy_for(name, error))
    num_missing = sum(finding.status == "missing" for finding in findings.values())
    if options.json:
        rows = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
        print(json.dumps({"ready": num_missing == 0, "findings": rows}, indent=1))
    else:
        marks = {"ok": "ok     ", "remark": "remark ", "missing": "MISSING"}
        for name, finding in findings.items():
            print(f"{marks[finding.status]}  {name}: {finding.detail}")
            if finding.remedy:
                print(f"         -> {finding.remedy}")
        print(f"{num_missing} missing, see the remedies above" if num_missing else "ready")
    return 1 if num_missing else 0


if __name__ == "__main__":
    sys.exit(main())
