"""Why a network that looks like a ResNet is none that converts: reasons, read off names and shapes.

The rules were checked against timm's 81 ResNet definitions (docs/conversion.md).
"""

import re
from collections.abc import Iterable, Mapping

# What a key of the network betrays -> the reason. The first that fits is told.
_BY_NAME = (
    (
        r"(^|\.)(res)?_?conv1_(w|bn_s)$|_branch2a_",
        "Caffe2's names: its batch norms are folded into a scale, so their statistics are gone, "
        "and its stride lies in the 1x1 convolutions",
    ),
    (
        r"(^|\.)(patch_embed|cls_token|pos_embed)",
        "a vision transformer; Detectron2's backbone here is a ResNet",
    ),
    (
        r"(^|\.)(stem\.conv(\d\.conv)?\.weight$|stages\.\d)",
        "another family (timm's ResNetV2, RegNet or CLIP's ResNet): other blocks than a ResNet's",
    ),
    (
        r"(^|\.)conv1\.0\.weight$",
        "a deep stem of three 3x3 convolutions (timm's resnet..d, ..c, ..s, ..t); Detectron2's "
        "ResNet here has one 7x7",
    ),
    (
        r"layer\d\.\d+\.se\.|layer\d\.\d+\.se_module\.",
        "squeeze-and-excitation or channel attention in its blocks",
    ),
    (
        r"layer\d\.\d+\.conv[12]\.(conv|conv_kernel|paths\.\d)\.",
        "selective kernels or split attention in its blocks",
    ),
    (r"layer\d\.\d+\.downsample\.2\.", "average pooling in its shortcuts (ResNet-D)"),
    (r"layer\d\.\d+\.convs\.\d", "convolutions split by scale in its blocks (Res2Net)"),
)

# timm's architectures whose tensors have a plain ResNet's names and shapes, but which compute
# something else: pooling against aliasing has no weights.
_SAME_TENSORS = re.compile(r"^(se)?resnet(aa|blur)\d+")


def reason_by_name(names: Iterable[str]) -> str | None:
    """What kind of network these keys are of, if it is one that does not convert."""
    listed = list(names)
    for pattern, reason in _BY_NAME:
        found = next((name for name in listed if re.search(pattern, name)), None)
        if found is not None:
            return f"{found}: {reason}"
    return None


def reason_by_shape(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The same from the shapes of a torchvision-named backbone."""
    stem, inner = shapes.get("conv1.weight"), shapes.get("layer1.0.conv2.weight")
    if stem is not None and len(stem) == 4 and stem[1] != 3:
        return f"conv1.weight: {stem[1]} input channels; Detectron2 feeds three"
    is_grouped = inner is not None and len(inner) == 4 and 0 < inner[1] < inner[0]
    if inner is not None and is_grouped and "layer1.0.conv3.weight" in shapes:
        return (
            f"layer1.0.conv2.weight: {inner[0]} channels in {inner[0] // inner[1]} groups "
            "(ResNeXt); only ResNets without groups convert"
        )
    if "bn1.weight" in shapes and "bn1.running_mean" not in shapes:
        return "bn1: no running statistics (group norm, or norms that were folded away)"
    return None


def reason_by_architecture(name: str) -> str | None:
    """The same from the architecture's name, where a checkpoint says it."""
    if not _SAME_TENSORS.match(name):
        return None
    return (
        f"arch {name!r}: its tensors have a plain ResNet's names and shapes, but it pools against "
        "aliasing, which Detectron2's ResNet does not: the features would differ"
    )
