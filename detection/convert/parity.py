"""Is Detectron2's ResNet with the converted weights the same function? Compared on one picture."""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from common.pictures import BadPicture, decode
from common.resnet import Arch
from detection.convert.reference_resnet import STAGES, ReferenceResNet
from detection.training.config import set_arch
from detection.training.weights import load_backbone


def build_bare_resnet(arch: Arch, *, stride_in_1x1: bool = False) -> ResNet:
    """Detectron2's ResNet with all four stages as outputs (a C4 detector's own stops at res4)."""
    cfg = get_cfg()
    set_arch(cfg, arch)
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def comparison_picture(path: Path | None, size: int) -> Tensor:
    """The picture that features are compared on.

    Args:
        path: A picture file; None generates one with edges, gradients and texture.
        size: Side in pixels.

    Returns:
        uint8 RGB (size, size, 3).
    """
    if path is not None:
        try:
            picture = decode(Path(path).read_bytes(), where=str(path))
        except FileNotFoundError:
            raise UserError(f"{path}: no such picture") from None
        except (BadPicture, OSError) as error:
            raise UserError(f"{error}; give another picture") from error
        return torch.from_numpy(np.array(Image.fromarray(picture).resize((size, size))))
    generator = np.random.default_rng(20)
    y, x = np.mgrid[0:size, 0:size] / size
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], axis=-1)
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06)[..., None] * np.array([0.7, -0.4, 0.3])
    noise = generator.normal(0, 0.08, (size, size, 3))
    return torch.from_numpy((255 * np.clip(smooth + disc + noise, 0, 1)).astype(np.uint8))


def compare(
    arch: Arch,
    reference_state: dict[str, Tensor],
    detectron2_state: dict[str, Tensor],
    image: Tensor,
    *,
    stride_in_1x1: bool = False,
) -> dict[str, float]:
    """Compare both networks stage by stage, fp32, evaluation mode.

    Args:
        arch: Architecture.
        reference_state: Tensors under torchvision names.
        detectron2_state: The same under Detectron2 names.
        image: Normalised (1, 3, H, W).
        stride_in_1x1: For tests: where Detectron2 puts the stride.

    Returns:
        {"res2": max|a - b| / max|a|, ..}; infinity where a stage is dead or of another shape.
    """
    return compare_features(
        reference_features(arch, reference_state, image),
        detectron2_features(arch, detectron2_state, image, stride_in_1x1=stride_in_1x1),
    )


def reference_features(arch: Arch, state: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """Features res2 to res5 of the reference ResNet with torchvision-named tensors."""
    return _features(ReferenceResNet(arch), state, image)


def detectron2_features(
    arch: Arch, state: dict[str, Tensor], image: Tensor, *, stride_in_1x1: bool = False
) -> dict[str, Tensor]:
    """Features res2 to res5 of Detectron2's own ResNet with its own names."""
    return _features(build_bare_resnet(arch, stride_in_1x1=stride_in_1x1), state, image)


@torch.no_grad()
def _features(network: nn.Module, state: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    result = network.load_state_dict(state, strict=False)
    left = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    assert not left, f"missing {left}"
    assert not result.unexpected_keys, f"unexpected {result.unexpected_keys}"
    return network.eval()(image)


def compare_features(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, float]:
    """Relative difference of each stage; see `compare`."""
    return {stage: _relative_difference(first[stage], second[stage]) for stage in STAGES}


def _relative_difference(expected: Tensor, found: Tensor) -> float:
    scale = expected.abs().max().item()
    if expected.shape != found.shape or not np.isfinite(scale) or scale == 0:
        return float("inf")
    difference = (expected - found).abs().max().item() / scale
    return difference if np.isfinite(difference) else float("inf")


class _Detector(nn.Module):
    """Just enough of a detector for the weights to be loaded as training loads them."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.backbone = build_bare_resnet(arch)


def check_written(arch: Arch, path: Path, state: dict[str, Tensor]) -> None:
    """Load a written file as training does and compare every tensor with what was meant.

    Raises:
        UserError: If a tensor did not land or changed on the way; the file is removed.
    """
    detector = _Detector(arch)
    try:
        load_backbone(detector, path)
        loaded = detector.backbone.state_dict()
        changed = [name for name, value in state.items() if not torch.equal(loaded[name], value)]
        if changed:
            raise UserError(f"{path}: {changed[0]} changed on the way through the file")
    except UserError:
        path.unlink(missing_ok=True)
        raise
