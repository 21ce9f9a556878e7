"""Names of ResNet tensors: in seven kinds of checkpoint, in torchvision, in Detectron2.

`to_torchvision` maps every key of a checkpoint to a torchvision name or drops it with a reason; an
unknown key is an error. `detectron2_name` and `torchvision_name` translate one name, and back.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from common.errors import UserError

# Pattern of a tensor's name -> why such a network does not convert. The first match is reported.
_BY_NAME = (
    (
        r"(^|\.)(res)?_?conv1_(w|bn_s)$|_branch2a_",
        "Caffe2's names: its batch norms are folded into a scale, so their statistics are gone, "
        "and its stride lies in the 1x1 convolutions",
    ),
    (
        r"(^|\.)(patch_embed|cls_token|pos_embed)",
        "a vision transformer; only ResNets are read",
    ),
    (
        r"(^|\.)(stem\.conv(\d\.conv)?\.weight$|stages\.\d)",
        "another family (timm's ResNetV2, RegNet or CLIP's ResNet): other blocks than a ResNet's",
    ),
    (
        r"(^|\.)conv1\.0\.weight$",
        "a deep stem of three 3x3 convolutions (timm's resnet..d, ..c, ..s, ..t); a "
        "plain ResNet has one 7x7",
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


def refuse_other_networks(shapes: Mapping[str, tuple[int, ...]], *, architecture: str = "") -> None:
    """Refuse a network that is no plain ResNet, and name its kind.

    Args:
        shapes: Of its tensors, under the names of any layout.
        architecture: Its name, where a checkpoint says it.

    Raises:
        UserError: If it is no plain ResNet.
    """
    reasons = [
        f"{name}: {reason}"
        for pattern, reason in _BY_NAME
        for name in shapes
        if re.search(pattern, name)
    ]
    stem, inner = shapes.get("conv1.weight", ()), shapes.get("layer1.0.conv2.weight", ())
    if len(stem) == 4 and stem[1] != 3:
        reasons.append(f"conv1.weight: {stem[1]} input channels; pictures have three")
    if "layer1.0.conv3.weight" in shapes and len(inner) == 4 and 0 < inner[1] < inner[0]:
        reasons.append(
            f"layer1.0.conv2.weight: {inner[0]} channels in {inner[0] // inner[1]} groups "
            "(ResNeXt); only ResNets without groups are read"
        )
    if "bn1.weight" in shapes and "bn1.running_mean" not in shapes:
        reasons.append("bn1: no running statistics (group norm, or norms that were folded away)")
    if _SAME_TENSORS.match(architecture):
        reasons.append(
            f"arch {architecture!r}: its tensors have a plain ResNet's names and shapes, but it "
            "pools against aliasing, which a plain ResNet does not: the features would differ"
        )
    if reasons:
        raise UserError(f"is no plain ResNet: {reasons[0]}")


LAYOUTS = ("ours", "torchvision", "timm", "moco", "solo-learn", "lightly", "detectron2")
BRANCHES = ("online", "ema")

_HEAD = "a head of pretraining; the detector has its own"
_OTHER_BRANCH = "the other branch (see --branch)"
_CLASSIFIER = "the classifier; the detector has its own"
_STATE = "state of pretraining, no weights"
_DETECTOR = "a part of the detector behind or beside its ResNet"
_EXTRA_NORM = "the extra norm behind a C4 head's res5; a ResNet has none"
COUNTER = "num_batches_tracked"


class Mapped(NamedTuple):
    """What became of a checkpoint's keys."""

    backbone: dict[str, Any]  # torchvision name -> value
    dropped: dict[str, str]  # key -> reason
    counters: dict[str, Any]  # torchvision name of a batch counter -> value

    def add(self, name: str, key: str, value: Any) -> None:
        """Take a tensor in.

        Raises:
            UserError: If there is one of that name, which would be replaced silently.
        """
        place = self.counters if name.endswith(COUNTER) else self.backbone
        if name in place:
            raise UserError(f"{key!r} is a second {name}; the checkpoint holds two backbones")
        place[name] = value


def detectron2_name(name: str) -> str:
    """The name that Detectron2 gives a tensor; it keeps each norm inside the convolution before it.

    "conv1.weight" -> "stem.conv1.weight", "layer1.0.downsample.1.bias" ->
    "res2.0.shortcut.norm.bias".
    """
    module, _, field = name.rpartition(".")
    parts = module.split(".")
    if parts[0].startswith("layer"):
        place = f"res{int(parts[0].removeprefix('layer')) + 1}.{parts[1]}"
        kind = ".".join(parts[2:])
    else:
        place, kind = "stem", module
    conv = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}.get(kind)
    if conv is None:
        conv = f"conv{kind.removeprefix('bn')}.norm" if kind.startswith("bn") else kind
    return f"{place}.{conv}.{field}"


_DETECTRON2 = re.compile(r"(stem|res[2-5]\.\d+)\.(conv[123]|shortcut)(\.norm)?\.(\w+)")


def torchvision_name(name: str) -> str | None:
    """The way back: "res2.0.shortcut.norm.bias" -> "layer1.0.downsample.1.bias"; None: no ResNet's.

    Only what `detectron2_name` gives back letter by letter counts.
    """
    match = _DETECTRON2.fullmatch(name)
    if match is None:
        return None
    place, conv, norm, field = match.groups()
    kind = conv.replace("conv", "bn") if norm else conv
    if conv == "shortcut":
        kind = "downsample.1" if norm else "downsample.0"
    stage, _, block = place.partition(".")
    old = kind if stage == "stem" else f"layer{int(stage[3:]) - 1}.{block}.{kind}"
    return f"{old}.{field}" if detectron2_name(f"{old}.{field}") == name else None


class _Layout(NamedTuple):
    """Where a project keeps the backbone, and what may stand beside it.

    Read off the public code of each project; a key that is in no table stops the conversion.
    """

    online: tuple[str, ...] = ("",)  # prefixes of the trained backbone
    ema: tuple[str, ...] = ()  # prefixes of its moving average
    heads: tuple[str, ...] | None = ()  # first parts of keys that are dropped; None: any other key
    fc: str = _CLASSIFIER  # what `fc.*` behind the prefix is
    numbered: bool = False  # whether the children may be numbered, as in an nn.Sequential


_LAYOUTS = {
    "ours": _Layout(online=("backbone.",), heads=None),  # ema is a part of its own
    # Bare names; a moving average is a state_dict of its own.
    "torchvision": _Layout(),
    "timm": _Layout(),
    # MoCo v1/v2 (encoder_q, encoder_k) and v3 (base_encoder, momentum_encoder).
    "moco": _Layout(
        online=("encoder_q.", "base_encoder."),
        ema=("encoder_k.", "momentum_encoder."),
        heads=("predictor",),
        fc=_HEAD,
    ),
    "solo-learn": _Layout(
        online=("backbone.", "encoder."),  # old versions say encoder
        ema=("momentum_backbone.", "momentum_encoder."),
        heads=(
            *("projector", "momentum_projector", "predictor", "momentum_predictor", "classifier"),
            *("momentum_classifier", "prototypes", "head", "momentum_head", "dino_loss_func"),
            *("whitening", "spectral", "projector2", "transformer_projector"),
            *("transformer_predictor", "pos_enc", "reverse_pos_enc"),
        ),
    ),
    "lightly": _Layout(
        online=("backbone.", "student_backbone.", "query_backbone."),
        ema=("backbone_momentum.", "teacher_backbone.", "key_backbone.", "momentum_backbone."),
        heads=(
            *("projection_head", "prediction_head", "projection_head_momentum"),
            *("projection_head_key", "student_projection_head", "teacher_projection_head"),
            *("student_head", "teacher_head", "online_classifier", "linear_layer", "fc", "head"),
            *("prototypes", "criterion", "memory_bank", "online_linear_probe", "projector"),
            "predictor",
        ),
        numbered=True,
    ),
}
_STATES = (
    *("queue", "queue_y", "queue_index", "queue_ptr", "queue2", "queue2_ptr", "queue3"),
    "n_averaged",
)
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_INSIDE_DETECTOR = re.compile(r"^(backbone\.bottom_up\.|backbone\.|roi_heads\.(?=res5\.\d))")
_DETECTOR_PARTS = ("proposal_generator.", "roi_heads.", "backbone.fpn_", "pixel_mean", "pixel_std")
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.")


def to_torchvision(state: Mapping[str, Any], layout: str, branch: str) -> Mapped:
    """Name a checkpoint's backbone tensors as torchvision does.

    Args:
        state: The network's state_dict; wrappers of DistributedDataParallel and torch.compile
            (`module.`, `_orig_mod.`) are cut out of the names first.
        layout: One of LAYOUTS.
        branch: "online" or "ema".

    Returns:
        Every key either under its torchvision name or dropped with a reason. Of our own files,
        torchvision's and timm's, `state` is the branch already: they keep the moving average apart.

    Raises:
        UserError: For a key that is neither, for two of one name, or if the branch is not there.
    """
    state = without_wrappers(state)
    if layout == "detectron2":
        if branch == "ema":
            raise UserError("--branch ema: a detectron2 checkpoint holds one network; leave it out")
        return _from_detectron2(state)
    kind, mapped = _LAYOUTS[layout], Mapped({}, {}, {})
    prefixes = [(prefix, branch == "ema") for prefix in kind.ema]
    prefixes += [(prefix, branch == "online" or not kind.ema) for prefix in kind.online]
    for key, value in state.items():
        prefix, is_own = next(
            ((prefix, is_own) for prefix, is_own in prefixes if key.startswith(prefix)),
            (None, False),
        )
        rest, first = key.removeprefix(prefix or ""), key.partition(".")[0]
        if prefix is None or rest in _STATES:
            if kind.heads is not None and first not in (*kind.heads, *_STATES):
                raise _unknown(key)
            mapped.dropped[key] = _STATE if first in _STATES else _HEAD
        elif not is_own:
            mapped.dropped[key] = _OTHER_BRANCH
        elif rest.startswith("fc."):
            mapped.dropped[key] = kind.fc
        else:
            child, _, inner = rest.partition(".")
            if kind.numbered and child in _SEQUENTIAL:
                rest = f"{_SEQUENTIAL[child]}.{inner}"
            mapped.add(rest, key, value)
    if not mapped.backbone:
        own = " or ".join(repr(prefix) for prefix, is_own in prefixes if is_own)
        raise UserError(
            f"no key begins with {own}, where this layout keeps the {branch} backbone; try "
            "another --layout or --branch"
        )
    return mapped


def _from_detectron2(state: Mapping[str, Any]) -> Mapped:
    """A bare ResNet, or the one inside a detector (C4 keeps res5 in its head)."""
    mapped = Mapped({}, {}, {})
    for key, value in state.items():
        name = torchvision_name(_INSIDE_DETECTOR.sub("", key))
        if name is not None:
            mapped.add(name, key, value)
        elif key.startswith(("stem.fc.", "linear.", "backbone.linear.")):
            mapped.dropped[key] = _CLASSIFIER
        elif key.startswith("roi_heads.res5.norm."):
            mapped.dropped[key] = _EXTRA_NORM
        elif key.startswith(_DETECTOR_PARTS):
            mapped.dropped[key] = _DETECTOR
        else:
            raise _unknown(key)
    return mapped


def _unknown(key: str) -> UserError:
    return UserError(
        f"unknown key {key!r}: neither a backbone tensor nor a known head of this layout; choose "
        "the right --layout, or save the bare backbone's state_dict and use --layout torchvision"
    )


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys without `module.` and `_orig_mod.`.

    Raises:
        UserError: If two keys become one.
    """
    plain = {_WRAPPERS.sub(r"\1", key): value for key, value in state.items()}
    if len(plain) != len(state):
        raise UserError("two keys differ only by a wrapper's name; the checkpoint is damaged")
    return plain


def detect_layout(state: Mapping[str, Any]) -> str:
    """Find the layout of another project that a state_dict has, by its names.

    timm names its plain ResNets as torchvision does: these are "torchvision" here.

    Raises:
        UserError: If none fits.
    """
    names = without_wrappers(state)
    firsts = {name.partition(".")[0] for name in names}
    if any(torchvision_name(_INSIDE_DETECTOR.sub("", name)) for name in names):
        return "detectron2"
    if firsts & {"encoder_q", "base_encoder"}:
        return "moco"
    if "conv1" in firsts:
        return "torchvision"
    lightly = {"student_backbone", "teacher_backbone", "backbone_momentum", "query_backbone",
               "projection_head", "prediction_head"}  # fmt: skip
    numbered = ("backbone.0.", "backbone.4.")
    if firsts & lightly or any(name.startswith(numbered) for name in names):
        return "lightly"
    if firsts & {"backbone", "encoder"}:
        return "solo-learn"
    listed = ", ".join(sorted(firsts)[:8]) or "nothing"
    raise UserError(f"no known layout: the keys begin with {listed}; choose one with --layout")
