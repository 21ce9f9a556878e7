"""Are the weights in two files the same network? By each tensor, and by a picture's features.

The files may be of any two layouts: each is read as itself, and its features are computed by the
library that its layout belongs to (Detectron2's ResNet, or the reference in torchvision's layout).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import sha256_of
from detection.convert import keymap
from detection.convert.conventions import Preprocessing
from detection.convert.source import Source, read_source
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
        layouts: Of A and B; see keymap.LAYOUTS, or "auto".
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
    sources: list[Source] = []
    for name, path, layout, branch in zip("ab", (first, second), layouts, branches, strict=True):
        try:
            source = read_source(
                path, layout=layout, branch=branch, stride_in_1x1=stride_in_1x1, assume=True
            )
        except UserError as error:
            return report | {"refused": str(error), "reasons": [str(error)]}
        sources.append(source)
        report[name] = _description(source)
    a, b = sources
    if a.arch != b.arch:
        reason = f"another architecture: {first} is a {a.arch}, {second} a {b.arch}"
        return report | {"refused": reason, "reasons": [reason]}
    report |= _compare(a, b, preprocessing, picture, size)
    report["reasons"] = _reasons(report, tolerance)
    return report | {"same": not report["reasons"]}


def _description(source: Source) -> dict[str, Any]:
    return {
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


def _compare(
    a: Source, b: Source, preprocessing: Preprocessing | None, picture: Path | None, size: int
) -> dict[str, Any]:
    from detection.convert import parity  # imports Detectron2

    stated = [s.preprocessing for s in (a, b) if s.origins["preprocessing"] in _STATED]
    pixels = preprocessing or (stated[0] if stated else a.preprocessing)
    image = pixels.normalise(parity.comparison_picture(picture, size))
    features = [_features(source, image) for source in (a, b)]
    tensors = {
        name: {"same_bits": same_bits(value, b.tensors[name]),
               "relative_difference": _relative_difference(value, b.tensors[name])}
        for name, value in a.tensors.items()
    }  # fmt: skip
    return {
        "tensors": tensors,
        "stages": {stage: _relative_difference(value, features[1][stage])
                   for stage, value in features[0].items()},
        "counters": _compare_counters(a, b),
        "preprocessing": _compare_preprocessing(stated),
    }  # fmt: skip


def _features(source: Source, image: Tensor) -> dict[str, Tensor]:
    """Features by the library that the file's layout belongs to."""
    from detection.convert import parity

    if source.layout != "detectron2":
        return parity.reference_features(source.arch, source.tensors, image)
    return parity.detectron2_features(
        source.arch, to_detectron2(source), image, stride_in_1x1=source.stride_in_1x1
    )


def _relative_difference(first: Tensor, second: Tensor) -> float | None:
    """max|a - b| / max(|a|, |b|); 0 where both are 0, None where it is no number."""
    if torch.equal(first, second):
        return 0.0
    scale = torch.maximum(first.abs().max(), second.abs().max()).double()
    difference = ((first.double() - second.double()).abs().max() / scale).item()
    return difference if difference < float("inf") else None


def _compare_counters(a: Source, b: Source) -> dict[str, int]:
    shared = a.counters.keys() & b.counters.keys()
    num_equal = sum(torch.equal(a.counters[name], b.counters[name]) for name in shared)
    return {"num_equal": num_equal, "num_different": len(shared) - num_equal,
            "num_only_in_a": len(a.counters) - len(shared),
            "num_only_in_b": len(b.counters) - len(shared)}  # fmt: skip


def _compare_preprocessing(stated: list[Preprocessing]) -> str:
    """Whether the files agree on the pixels they expect: "same", "different" or "not stated"."""
    if len(stated) < 2:
        return "not stated"
    a, b = stated
    pairs = zip((*a.mean, *a.std), (*b.mean, *b.std), strict=True)
    return "same" if all(abs(x - y) < 1e-6 for x, y in pairs) else "different"


def _reasons(report: dict[str, Any], tolerance: float) -> list[str]:
    """Why two networks are not the same; empty if they are."""

    def differs(value: float | None) -> bool:
        return value is None or value > tolerance

    reasons = []
    tensors = [n for n, x in report["tensors"].items() if differs(x["relative_difference"])]
    if tensors:
        places = sorted({_stage_of(name) for name in tensors})
        reasons.append(f"{len(tensors)} of {len(report['tensors'])} tensors differ "
                       f"({', '.join(places)}), first {tensors[0]}")  # fmt: skip
    stages = [stage for stage, value in report["stages"].items() if differs(value)]
    if stages:
        reasons.append(f"the features differ from {stages[0]} on ({', '.join(stages)})")
    if report["preprocessing"] == "different":
        reasons.append("the files state different pixel statistics")
    return reasons


def _stage_of(name: str) -> str:
    """layer1.0.conv1.weight -> res2."""
    return keymap.detectron2_name(name).partition(".")[0]


def text(report: dict[str, Any]) -> str:
    """The report for a person; every tensor stands in the JSON only."""
    lines = [_file_line(name.upper(), report[name]) for name in "ab" if name in report]
    lines += [f"   note on {name.upper()}: {note}"
              for name in "ab" for note in report.get(name, {}).get("notes", ())]  # fmt: skip
    if report["refused"] is None:
        lines += _figures(report)
    if report["same"]:
        return "\n".join([*lines, "the same network"])
    return "\n".join([*lines, *(f"not the same: {reason}" for reason in report["reasons"])])


def _file_line(name: str, file: dict[str, Any]) -> str:
    arch = file["arch"]
    return (
        f"{name}  {file['file']}  ({file['layout']}, {file['branch']}; ResNet-{arch['depth']} "
        f"{arch['width_per_group']}/{arch['stem_channels']}/{arch['res2_channels']}; "
        f"{file['num_tensors']} tensors, {file['num_dropped']} keys dropped)"
    )


def _figures(report: dict[str, Any]) -> list[str]:
    tensors = report["tensors"]
    num_equal = sum(x["same_bits"] for x in tensors.values())
    off = {name: x["relative_difference"] for name, x in tensors.items() if not x["same_bits"]}
    worst = sorted(off.items(), key=lambda x: -1 if x[1] is None else x[1], reverse=True)
    lines = [f"tensors: {num_equal} of {len(tensors)} equal bit by bit"]
    lines += [f"   {name}  relative difference {_shown(value)}" for name, value in worst[:8]]
    lines += [f"   and {len(worst) - 8} more (all of them: --json)"] if len(worst) > 8 else []
    stages = "  ".join(f"{stage} {_shown(value)}" for stage, value in report["stages"].items())
    counters = ", ".join(f"{number} {key.removeprefix('num_').replace('_', ' ')}"
                         for key, number in report["counters"].items() if number)  # fmt: skip
    return [
        *lines,
        f"features on the picture, relative difference: {stages} "
        f"(allowed {report['tolerance']:.0e})",
        f"batch counters: {counters or 'none'}; pixel statistics: {report['preprocessing']}",
    ]


def _shown(value: float | None) -> str:
    return "no number" if value is None else f"{value:.1e}"
