"""Are the weights in two files the same network? By each tensor, and by a picture's features.

The files may be of any two layouts: each is read as itself, and its features are computed by the
library that its layout belongs to (Detectron2's ResNet, or the reference in torchvision's layout).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.backbone import BackboneCheckpoint, Preprocessing, read_backbone
from common.errors import UserError
from common.files import sha256_of
from common.layouts import detectron2_name
from detection.convert import parity
from detection.convert.to_detectron2 import same_bits, to_detectron2

TOLERANCE = 1e-5
_STATED = ("checkpoint", "card", "config")


def verify(
    first: Path,
    second: Path,
    *,
    layouts: tuple[str, str] = ("auto", "auto"),
    branches: tuple[str, str] = ("online", "online"),
    stride_in_1x1: bool | None = None,
    preprocessing: Preprocessing | None = None,
    picture: Path | None = None,
    size: int = 224,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Compare the weights of two files.

    Args:
        first: File A.
        second: File B.
        layouts: Of A and B; see common.layouts.LAYOUTS, or "auto".
        branches: Of A and B.
        stride_in_1x1: For Detectron2 files whose card does not say it.
        preprocessing: The picture's; default: what A says, or B.
        picture: Compare on this picture; default: a generated one.
        size: Side of the square the picture is brought to, in pixels.
        tolerance: Largest relative difference of a tensor or a stage that counts as the same.

    Returns:
        Plain JSON: "same" is the verdict, "reasons" says why not, "a" and "b" what was read,
        "tensors" and "stages" the relative differences, "counters" and "preprocessing" whether they
        agree. A file that is no complete ResNet makes "refused" the reason.

    Raises:
        UserError: If a file is missing, or the picture cannot be read.
    """
    for path in (first, second):
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
    report: dict[str, Any] = {"same": False, "refused": None, "tolerance": tolerance}
    sources: list[BackboneCheckpoint] = []
    for name, path, layout, branch in zip("ab", (first, second), layouts, branches, strict=True):
        try:
            source = read_backbone(
                path, layout=layout, branch=branch, stride_in_1x1=stride_in_1x1, assume=True
            )
        except UserError as error:
            return report | {"refused": str(error), "reasons": [str(error)]}
        sources.append(source)
        report[name] = {
            "file": str(source.path),
            "sha256": sha256_of(source.path),
            "layout": source.layout,
            "branch": source.branch,
            "arch": asdict(source.arch),
            "num_tensors": len(source.tensors),
            "num_dropped": len(source.dropped),
            "preprocessing": asdict(source.preprocessing),
            "origins": source.origins,
            "stride_in_1x1": source.stride_in_1x1,
            "notes": list(source.notes),
        }
    a, b = sources
    if a.arch != b.arch:
        reason = f"another architecture: {first} is a {a.arch}, {second} a {b.arch}"
        return report | {"refused": reason, "reasons": [reason]}

    # Tensors, and the features that each file's own library computes from them.
    stated = [s.preprocessing for s in sources if s.origins["preprocessing"] in _STATED]
    pixels = preprocessing or (stated[0] if stated else a.preprocessing)
    image = pixels.normalise(parity.comparison_picture(picture, size))
    features = [
        parity.reference_features(source.arch, source.tensors, image)
        if source.layout != "detectron2"
        else parity.detectron2_features(
            source.arch, to_detectron2(source), image, stride_in_1x1=source.stride_in_1x1
        )
        for source in sources
    ]
    tensors = {
        name: {"same_bits": same_bits(value, b.tensors[name]),
               "relative_difference": _difference(value, b.tensors[name])}
        for name, value in a.tensors.items()
    }  # fmt: skip
    stages = {stage: _difference(value, features[1][stage]) for stage, value in features[0].items()}
    shared = a.counters.keys() & b.counters.keys()
    num_equal = sum(torch.equal(a.counters[name], b.counters[name]) for name in shared)
    agreement = "not stated"
    if len(stated) == 2:
        pairs = zip(*((*pixels.mean, *pixels.std) for pixels in stated), strict=True)
        agreement = "same" if all(abs(x - y) < 1e-6 for x, y in pairs) else "different"

    # Why they are not the same. Batch counters do not decide, since evaluation does not use them.
    def differs(value: float | None) -> bool:
        return value is None or value > tolerance

    reasons = []
    changed = [name for name, row in tensors.items() if differs(row["relative_difference"])]
    if changed:
        places = {detectron2_name(name).partition(".")[0] for name in changed}
        reasons.append(f"{len(changed)} of {len(tensors)} tensors differ "
                       f"({', '.join(sorted(places))}), first {changed[0]}")  # fmt: skip
    changed = [stage for stage, value in stages.items() if differs(value)]
    if changed:
        reasons.append(f"the features differ from {changed[0]} on ({', '.join(changed)})")
    if agreement == "different":
        reasons.append("the files state different pixel statistics")
    return report | {
        "tensors": tensors,
        "stages": stages,
        "counters": {
            "num_equal": num_equal,
            "num_different": len(shared) - num_equal,
            "num_only_in_a": len(a.counters) - len(shared),
            "num_only_in_b": len(b.counters) - len(shared),
        },
        "preprocessing": agreement,
        "reasons": reasons,
        "same": not reasons,
    }


def _difference(first: Tensor, second: Tensor) -> float | None:
    """Relative; None where it is no number, as JSON has no infinity."""
    value = parity.relative_difference(first, second)
    return value if value < float("inf") else None


def text(report: dict[str, Any]) -> str:
    """The report for a person; every tensor stands in the JSON only."""
    lines = []
    for name in "ab":
        if name in report:
            file, arch = report[name], report[name]["arch"]
            lines.append(
                f"{name.upper()}  {file['file']}  ({file['layout']}, {file['branch']}; ResNet-"
                f"{arch['depth']} {arch['width_per_group']}/{arch['stem_channels']}/"
                f"{arch['res2_channels']}; {file['num_tensors']} tensors, {file['num_dropped']} "
                "keys dropped)"
            )
            lines += [f"   note on {name.upper()}: {note}" for note in file["notes"]]
    if report["refused"] is None:
        tensors = report["tensors"]
        off = {name: x["relative_difference"] for name, x in tensors.items() if not x["same_bits"]}
        worst = sorted(off.items(), key=lambda x: -1 if x[1] is None else x[1], reverse=True)
        lines.append(f"tensors: {len(tensors) - len(off)} of {len(tensors)} equal bit by bit")
        lines += [f"   {name}  relative difference {_figure(value)}" for name, value in worst[:8]]
        lines += [f"   and {len(worst) - 8} more (all of them: --json)"] if len(worst) > 8 else []
        stages = (f"{stage} {_figure(value)}" for stage, value in report["stages"].items())
        lines.append(
            f"features on the picture, relative difference: {'  '.join(stages)} "
            f"(allowed {report['tolerance']:.0e})"
        )
        counters = ", ".join(f"{number} {key.removeprefix('num_').replace('_', ' ')}"
                             for key, number in report["counters"].items() if number)  # fmt: skip
        lines.append(
            f"batch counters: {counters or 'none'}; pixel statistics: {report['preprocessing']}"
        )
    if report["same"]:
        return "\n".join([*lines, "the same network"])
    return "\n".join([*lines, *(f"not the same: {reason}" for reason in report["reasons"])])


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{value:.1e}"
