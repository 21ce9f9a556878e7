"""Names of ResNet tensors: in seven kinds of checkpoint, in torchvision, in Detectron2.

Two steps, both without exceptions: `to_torchvision` maps every key of a checkpoint to a torchvision
name or drops it with a reason (an unknown key is an error); `name_table` lists, tensor by tensor,
which Detectron2 name a torchvision name has, and back.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from common.errors import UserError
from common.resnet import Arch

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


def name_table(arch: Arch) -> dict[str, str]:
    """Which Detectron2 name every torchvision name has.

    Returns:
        {"conv1.weight": "stem.conv1.weight", "layer1.0.downsample.1.bias":
        "res2.0.shortcut.norm.bias", ..}: one entry a tensor of the backbone.
    """
    from detection.convert.parity import tensor_shapes  # imports torch

    return {name: detectron2_name(name) for name in tensor_shapes(arch)}


def detectron2_name(name: str) -> str:
    """One name. Detectron2 keeps each norm inside the convolution before it."""
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
    found = _DETECTRON2.fullmatch(name)
    if found is None:
        return None
    place, conv, norm, field = found.groups()
    kind = conv.replace("conv", "bn") if norm else conv
    if conv == "shortcut":
        kind = "downsample.1" if norm else "downsample.0"
    stage, _, block = place.partition(".")
    old = kind if stage == "stem" else f"layer{int(stage[3:]) - 1}.{block}.{kind}"
    return f"{old}.{field}" if detectron2_name(f"{old}.{field}") == name else None


# What may stand outside the backbone: first part of a key -> why it is dropped. Read off the public
# code of each project; a key that is in no table stops the conversion.
_SOLO_HEADS = (
    "projector", "momentum_projector", "predictor", "momentum_predictor", "classifier",
    "momentum_classifier", "prototypes", "head", "momentum_head", "dino_loss_func", "whitening",
    "spectral", "projector2", "transformer_projector", "transformer_predictor", "pos_enc",
    "reverse_pos_enc",
)  # fmt: skip
_LIGHTLY_HEADS = (
    "projection_head", "prediction_head", "projection_head_momentum", "projection_head_key",
    "student_projection_head", "teacher_projection_head", "student_head", "teacher_head",
    "online_classifier", "linear_layer", "fc", "head", "prototypes", "criterion", "memory_bank",
    "online_linear_probe", "projector", "predictor",
)  # fmt: skip
_STATES = (
    "queue", "queue_y", "queue_index", "queue_ptr", "queue2", "queue2_ptr", "queue3", "n_averaged",
)  # fmt: skip


def _split_prefix(
    key: str, online: tuple[str, ...], ema: tuple[str, ...], branch: str
) -> tuple[str | None, bool]:
    """Cut a branch's prefix off a key.

    Returns:
        (rest, True) for the wanted branch, (rest, False) for the other, (None, False) for neither.
    """
    for prefixes, name in ((ema, "ema"), (online, "online")):
        for prefix in prefixes:
            if key.startswith(prefix):
                return key.removeprefix(prefix), name == branch
    return None, False


def _map_prefixed(
    state: Mapping[str, Any],
    branch: str,
    *,
    online: tuple[str, ...],
    ema: tuple[str, ...],
    heads: tuple[str, ...],
    heads_inside: bool = False,
    rename: Callable[[str], str] = lambda name: name,
) -> Mapped:
    """Map a checkpoint whose backbone lies behind a prefix.

    Args:
        state: Key -> value.
        branch: "online" or "ema".
        online: Prefixes of the trained backbone.
        ema: Prefixes of its moving average.
        heads: First parts of keys that are dropped as heads.
        heads_inside: Whether `fc.*` behind the prefix is a projection head (MoCo).
        rename: Behind the prefix, to a torchvision name.
    """
    backbone: dict[str, Any] = {}
    dropped: dict[str, str] = {}
    counters: dict[str, Any] = {}
    for key, value in state.items():
        rest, wanted = _split_prefix(key, online, ema, branch)
        if rest is None or rest in _STATES:
            first = key.split(".")[0]
            if first not in (*heads, *_STATES):
                raise _unknown(key)
            dropped[key] = _STATE if first in _STATES else _HEAD
        elif not wanted:
            dropped[key] = _OTHER_BRANCH
        elif rest.startswith("fc."):
            dropped[key] = _HEAD if heads_inside else _CLASSIFIER
        else:
            place = counters if rest.endswith(COUNTER) else backbone
            _put(place, rename(rest), key, value)
    if not backbone:
        wanted_prefixes = ema if branch == "ema" else online
        raise UserError(
            f"no key begins with {' or '.join(map(repr, wanted_prefixes))}, where this layout "
            f"keeps the {branch} backbone; try another --layout or --branch"
        )
    return Mapped(backbone, dropped, counters)


def _put(place: dict[str, Any], name: str, key: str, value: Any) -> None:
    """Take a tensor in; a second one of the same name would replace the first unseen."""
    if name in place:
        raise UserError(f"{key!r} is a second {name}; the checkpoint holds two backbones")
    place[name] = value


def _unknown(key: str) -> UserError:
    return UserError(
        f"unknown key {key!r}: neither a backbone tensor nor a known head of this layout; choose "
        "the right --layout, or save the bare backbone's state_dict and use --layout torchvision"
    )


_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def _from_sequential(name: str) -> str:
    """Children of a ResNet in an nn.Sequential, numbered: "4.0.conv1.weight" -> "layer1.0...."."""
    first, _, rest = name.partition(".")
    return f"{_SEQUENTIAL[first]}.{rest}" if first in _SEQUENTIAL else name


def _ours(state: Mapping[str, Any], branch: str) -> Mapped:
    """Ours: `backbone.*` is the backbone, the rest are heads; ema is a part of its own."""
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    if not backbone:
        raise UserError("no key begins with 'backbone.'; the checkpoint is damaged")
    mapped = _map_prefixed(backbone, "online", online=("backbone.",), ema=(), heads=())
    heads = {key: _HEAD for key in state if key not in backbone}
    return mapped._replace(dropped={**mapped.dropped, **heads})


def _bare(state: Mapping[str, Any], branch: str) -> Mapped:
    """Both torchvision and timm: bare names; a moving average is a state_dict of its own."""
    return _map_prefixed(state, "online", online=("",), ema=(), heads=())


def _detectron2(state: Mapping[str, Any], branch: str) -> Mapped:
    """Detectron2: a bare ResNet, or the one inside a detector (C4 keeps res5 in its head)."""
    if branch == "ema":
        raise UserError("--branch ema: a detectron2 checkpoint holds one network; leave it out")
    mapped = Mapped({}, {}, {})
    for key, value in state.items():
        name = torchvision_name(_INSIDE_DETECTOR.sub("", key))
        if name is not None:
            place = mapped.counters if name.endswith(COUNTER) else mapped.backbone
            _put(place, name, key, value)
        elif key.startswith(("stem.fc.", "linear.", "backbone.linear.")):
            mapped.dropped[key] = _CLASSIFIER
        elif key.startswith("roi_heads.res5.norm."):
            mapped.dropped[key] = _EXTRA_NORM
        elif key.startswith(_DETECTOR_PARTS):
            mapped.dropped[key] = _DETECTOR
        else:
            raise _unknown(key)
    return mapped


_INSIDE_DETECTOR = re.compile(r"^(backbone\.bottom_up\.|backbone\.|roi_heads\.(?=res5\.\d))")
_DETECTOR_PARTS = ("proposal_generator.", "roi_heads.", "backbone.fpn_", "pixel_mean", "pixel_std")


def _moco(state: Mapping[str, Any], branch: str) -> Mapped:
    """MoCo v1/v2 (encoder_q, encoder_k) and v3 (base_encoder, momentum_encoder)."""
    return _map_prefixed(
        state,
        branch,
        online=("encoder_q.", "base_encoder."),
        ema=("encoder_k.", "momentum_encoder."),
        heads=("predictor",),
        heads_inside=True,
    )


def _solo_learn(state: Mapping[str, Any], branch: str) -> Mapped:
    """solo-learn: `backbone.`, in old versions `encoder.`; the moving average is `momentum_*`."""
    return _map_prefixed(
        state,
        branch,
        online=("backbone.", "encoder."),
        ema=("momentum_backbone.", "momentum_encoder."),
        heads=_SOLO_HEADS,
    )


def _lightly(state: Mapping[str, Any], branch: str) -> Mapped:
    """lightly: a named ResNet, or its children in an nn.Sequential, under several names."""
    return _map_prefixed(
        state,
        branch,
        online=("backbone.", "student_backbone.", "query_backbone."),
        ema=("backbone_momentum.", "teacher_backbone.", "key_backbone.", "momentum_backbone."),
        heads=_LIGHTLY_HEADS,
        rename=_from_sequential,
    )


_READERS = {
    "ours": _ours,
    "torchvision": _bare,
    "timm": _bare,
    "moco": _moco,
    "solo-learn": _solo_learn,
    "lightly": _lightly,
    "detectron2": _detectron2,
}
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.")


def to_torchvision(state: Mapping[str, Any], layout: str, branch: str) -> Mapped:
    """Name a checkpoint's backbone tensors as torchvision does.

    Args:
        state: The network's state_dict; wrappers of DistributedDataParallel and torch.compile
            (`module.`, `_orig_mod.`) are cut out of the names first.
        layout: One of LAYOUTS.
        branch: "online" or "ema".

    Returns:
        Every key either under its torchvision name or dropped with a reason. Of torchvision and
        timm, `state` is the branch already: they keep the moving average beside.

    Raises:
        UserError: For a key that is neither, for two of one name, or if the branch is not there.
    """
    return _READERS[layout](without_wrappers(state), branch)


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
    """Tell which foreign layout a state_dict has, by its names.

    timm names its plain ResNets as torchvision does: these are "torchvision" here.

    Raises:
        UserError: If none fits.
    """
    firsts = {key.split(".")[0] for key in without_wrappers(state)}
    if any(torchvision_name(_INSIDE_DETECTOR.sub("", key)) for key in without_wrappers(state)):
        return "detectron2"
    if firsts & {"encoder_q", "base_encoder"}:
        return "moco"
    if "conv1" in firsts:
        return "torchvision"
    if any(key.startswith(("backbone.0.", "backbone.4.")) for key in without_wrappers(state)):
        return "lightly"
    if firsts & {"student_backbone", "teacher_backbone", "backbone_momentum", "query_backbone",
                 "projection_head", "prediction_head"}:  # fmt: skip
        return "lightly"
    if firsts & {"backbone", "encoder"}:
        return "solo-learn"
    shown = ", ".join(sorted(firsts)[:8]) or "nothing"
    raise UserError(f"no known layout: the keys begin with {shown}; choose one with --layout")
