"""Are two backbones the same function? By every tensor, and by the features of one picture.

A file is read as itself, and its features are computed by the library that its layout belongs to:
Detectron2's ResNet, or the reference of torchvision's blocks (with the usual widths it equals
torchvision's own; a test keeps this).
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from torch import Tensor, nn

from common.backbone import BackboneCheckpoint, ReferenceResNet, read_backbone
from common.errors import UserError
from common.files import finite, sha256_of
from common.resnet import Arch, detectron2_name
from detection.training.config import set_arch

STAGES = ("res2", "res3", "res4", "res5")
TOLERANCE = 1e-5
_STATED = ("checkpoint", "card", "config")


def build_bare_resnet(arch: Arch) -> ResNet:
    """Detectron2's ResNet with all four stages as outputs (a C4 detector's own stops at res4).

    Raises:
        UserError: If Detectron2 builds no ResNet of these widths.
    """
    if not arch.is_bottleneck and (arch.res2_channels, arch.stem_channels) != (64, 64):
        raise UserError(f"{arch}: Detectron2 builds ResNet-18/34 with 64 channels only")
    cfg = get_cfg()
    set_arch(cfg, arch)
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def comparison_picture(size: int) -> Tensor:
    """The picture that features are compared on: edges, gradients and texture.

    Args:
        size: Side in pixels.

    Returns:
        uint8 RGB (size, size, 3).
    """
    generator = np.random.default_rng(20)
    y, x = np.mgrid[0:size, 0:size] / size
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], axis=-1)
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06)[..., None] * np.array([0.7, -0.4, 0.3])
    noise = generator.normal(0, 0.08, (size, size, 3))
    return torch.from_numpy((255 * np.clip(smooth + disc + noise, 0, 1)).astype(np.uint8))


def to_detectron2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision-named tensors under Detectron2's names, in a fixed order."""
    return dict(sorted((detectron2_name(name), value) for name, value in tensors.items()))


@torch.no_grad()
def features(network: nn.Module, state: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """Features res2 to res5 in fp32 and evaluation mode; every tensor must find its place.

    Args:
        network: `ReferenceResNet`, or Detectron2's from `build_bare_resnet`.
        state: Its tensors, batch counters left out.
        image: Normalised pictures (N, 3, H, W), float32.
    """
    result = network.load_state_dict(state, strict=False)
    left = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    assert not left, f"missing {left}"
    assert not result.unexpected_keys, f"unexpected {result.unexpected_keys}"
    return network.eval()(image)


def compare(reference: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Compare the features of two networks, stage by stage.

    Returns:
        {"res2": `relative_difference`, ..}; infinity where the reference's stage is dead, since
        that proves nothing.
    """
    return {
        stage: relative_difference(reference[stage], other[stage])
        if reference[stage].any()
        else float("inf")
        for stage in STAGES
    }


def relative_difference(first: Tensor, second: Tensor) -> float:
    """max|a - b| / max(|a|, |b|); 0 where both are 0, infinity where it is no number."""
    if first.shape != second.shape:
        return float("inf")
    if torch.equal(first, second):
        return 0.0
    scale = torch.maximum(first.abs().max(), second.abs().max()).double()
    difference = ((first.double() - second.double()).abs().max() / scale).item()
    return difference if np.isfinite(difference) else float("inf")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two float32 tensors agree bit by bit; -0.0 and 0.0 do not."""
    return first.shape == second.shape and torch.equal(
        first.view(torch.int32), second.view(torch.int32)
    )


def verify(
    first: Path,
    second: Path,
    *,
    layouts: tuple[str, str] = ("auto", "auto"),
    branches: tuple[str, str] = ("online", "online"),
    size: int = 224,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Compare the weights of two files of any two layouts.

    Args:
        first: File A.
        second: File B.
        layouts: Of A and B; see common.resnet.LAYOUTS, or "auto".
        branches: Of A and B.
        size: Side of the picture in pixels; it is normalised as A says, or B.
        tolerance: Largest relative difference of a tensor or a stage that counts as the same.

    Returns:
        Plain JSON: "same" is the verdict, "reasons" says why not, "a" and "b" what was read,
        "tensors" and "stages" the relative differences (None: no number), "preprocessing" whether
        the pixels agree. A file that is no complete ResNet makes "refused" the reason.

    Raises:
        UserError: If a file is missing.
    """
    report: dict[str, Any] = {"same": False, "refused": None, "tolerance": tolerance}
    sources: list[BackboneCheckpoint] = []
    for name, path, layout, branch in zip("ab", (first, second), layouts, branches, strict=True):
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        try:
            source = read_backbone(path, layout=layout, branch=branch, assume=True)
        except UserError as error:
            return report | {"refused": str(error), "reasons": [str(error)]}
        sources.append(source)
        report[name] = {
            "file": str(source.path),
            "sha256": sha256_of(source.path),
            "layout": source.layout,
            "branch": source.branch,
            "arch": asdict(source.arch),
            "origins": source.origins,
            "notes": list(source.notes),
        }
    a, b = sources
    if a.arch != b.arch:
        reason = f"another architecture: {first} is a {a.arch}, {second} a {b.arch}"
        return report | {"refused": reason, "reasons": [reason]}

    # Tensors, and the features that each file's own library computes from them.
    stated = [s.preprocessing for s in sources if s.origins["preprocessing"] in _STATED]
    pixels = stated[0] if stated else a.preprocessing
    image = pixels.normalise(comparison_picture(size))
    computed = [
        features(build_bare_resnet(s.arch), to_detectron2(s.tensors), image)
        if s.layout == "detectron2"
        else features(ReferenceResNet(s.arch), s.tensors, image)
        for s in sources
    ]
    stages = compare(*computed)
    tensors = {
        name: {"same_bits": same_bits(value, b.tensors[name]),
               "relative_difference": relative_difference(value, b.tensors[name])}
        for name, value in a.tensors.items()
    }  # fmt: skip
    agreement = "not stated"
    if len(stated) == 2:
        pairs = zip(*((*pixels.mean, *pixels.std) for pixels in stated), strict=True)
        agreement = "same" if all(abs(x - y) < 1e-6 for x, y in pairs) else "different"

    # Why they are not the same. Batch counters do not decide, since evaluation does not use them.
    reasons = []
    off = [name for name, row in tensors.items() if row["relative_difference"] > tolerance]
    if off:
        reasons.append(f"{len(off)} of {len(tensors)} tensors differ, first {off[0]}")
    off = [stage for stage, value in stages.items() if value > tolerance]
    if off:
        reasons.append(f"the features differ from {off[0]} on ({', '.join(off)})")
    if agreement == "different":
        reasons.append("the files state different pixel statistics")
    report |= {"tensors": tensors, "stages": stages}
    return finite(report | {"preprocessing": agreement, "reasons": reasons, "same": not reasons})


def text(report: dict[str, Any]) -> str:
    """The report for a person; every tensor stands in the JSON only."""
    lines = []
    for name in "ab":
        if name in report:
            facts = report[name]
            about = "; ".join([facts["layout"], facts["branch"], *facts["notes"]])
            lines.append(f"{name.upper()}  {facts['file']}  {Arch(**facts['arch'])}; {about}")
    if report["refused"] is None:
        num_same = sum(row["same_bits"] for row in report["tensors"].values())
        lines += [
            f"tensors: {num_same} of {len(report['tensors'])} equal bit by bit",
            f"features on the picture, relative difference: {report['stages']}",
            f"pixel statistics: {report['preprocessing']}",
        ]
    if report["same"]:
        return "\n".join([*lines, "the same network"])
    return "\n".join([*lines, *(f"not the same: {reason}" for reason in report["reasons"])])
