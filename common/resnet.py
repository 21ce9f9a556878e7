"""ResNets: the four numbers of an architecture, names of tensors.

A tensor has the name that torchvision gives it. `to_torchvision` maps every key of seven kinds of
checkpoint to such a name or drops it with a reason. `detectron2_name` and `torchvision_name`
translate one name, and back.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.errors import UserError

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
MAX_CHANNELS = 16384  # what a damaged `arch` may ask for


@dataclass(frozen=True)
class Arch:
    """Depth and channels: a torchvision ResNet-50 is (50, 64, 64, 256), ResNet-18 (18, 64, 64, 64),
    the thin one (50, 16, 16, 64).

    `width_per_group` is the width inside the first stage's bottleneck, `stem_channels` and
    `res2_channels` are output channels.
    """

    depth: int = 50
    width_per_group: int = 64
    stem_channels: int = 64
    res2_channels: int = 256

    @property
    def is_bottleneck(self) -> bool:
        """Whether its blocks have three convolutions."""
        return self.depth >= 50

    @property
    def blocks_per_stage(self) -> tuple[int, int, int, int]:
        """Blocks of res2 to res5."""
        return BLOCKS_PER_STAGE[self.depth]

    def __str__(self) -> str:
        return (
            f"ResNet-{self.depth} (width {self.width_per_group}, stem {self.stem_channels}, "
            f"res2 {self.res2_channels})"
        )


NAMED = {
    "R18": Arch(18, 64, 64, 64),
    "R34": Arch(34, 64, 64, 64),
    "R50": Arch(50, 64, 64, 256),
    "R101": Arch(101, 64, 64, 256),
    "thin_R50": Arch(50, 16, 16, 64),
}


def read_arch(value: Any) -> Arch:
    """Check the `arch` of a checkpoint or a card; without a name it is a ResNet's.

    Raises:
        UserError: If it is another backbone's, not four whole numbers, or of no known depth.
    """
    if isinstance(value, Mapping) and "name" in value:
        if value["name"] != "resnet":
            raise UserError(f"arch.name is {value['name']!r}: only ResNets are read here")
        value = {key: number for key, number in value.items() if key != "name"}
    fields = Arch.__dataclass_fields__
    if not isinstance(value, Mapping) or set(value) != set(fields):
        raise UserError(f"arch {value!r}: expected the keys {', '.join(fields)}")
    if not all(type(number) is int and 0 < number <= MAX_CHANNELS for number in value.values()):
        raise UserError(f"arch {dict(value)}: give positive whole numbers up to {MAX_CHANNELS}")
    arch = Arch(**value)
    if arch.depth not in BLOCKS_PER_STAGE:
        raise UserError(f"depth {arch.depth}: give {', '.join(map(str, BLOCKS_PER_STAGE))}")
    if arch.is_bottleneck and arch.res2_channels % 4:
        raise UserError(f"res2_channels {arch.res2_channels}: bottlenecks need a multiple of 4")
    return arch


def infer_arch(shapes: Mapping[str, tuple[int, ...]]) -> Arch:
    """The architecture that a torchvision-named backbone's shapes belong to.

    Args:
        shapes: Tensor name -> shape; conv1.weight, layer1.0.conv1.weight ..

    Raises:
        UserError: If the names are no ResNet's or the number of blocks is none that is known.
    """
    stem = shapes.get("conv1.weight")
    first = shapes.get("layer1.0.conv1.weight")
    if stem is None or first is None:
        raise UserError("no conv1.weight and layer1.0.conv1.weight: this is no ResNet's state_dict")
    third = shapes.get("layer1.0.conv3.weight")
    for name, shape in (("conv1", stem), ("layer1.0.conv1", first), ("layer1.0.conv3", third)):
        if shape is not None and len(shape) != 4:
            raise UserError(f"{name}.weight has shape {shape}: no convolution's")
    num_blocks = tuple(
        len({name.split(".")[1] for name in shapes if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    for depth, blocks in BLOCKS_PER_STAGE.items():
        if blocks == num_blocks and (depth >= 50) == (third is not None):
            numbers = (depth, first[0], stem[0], (third or first)[0])
            return read_arch(dict(zip(Arch.__dataclass_fields__, numbers, strict=True)))
    raise UserError(f"{num_blocks} blocks per stage fit none of ResNet-18, 34, 50, 101, 152")


# -- names -----------------------------------------------------------------------------------------

LAYOUTS = ("ours", "torchvision", "timm", "moco", "solo-learn", "lightly", "detectron2")
BRANCHES = ("online", "ema")

_HEAD = "a head or state of pretraining; the detector has its own"
_OTHER_BRANCH = "the other branch (see --branch)"
_CLASSIFIER = "the classifier; the detector has its own"
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


# Parts of names, from torchvision's to Detectron2's, which keeps each norm in its convolution.
_RENAMED = (
    (r"^(conv1|bn1)\b", r"stem.\1"),
    (r"\bdownsample\.0\b", "shortcut"),
    (r"\bdownsample\.1\b", "shortcut.norm"),
    (r"\bbn(\d)\b", r"conv\1.norm"),
)
_DETECTRON2 = re.compile(r"(stem|res[2-5]\.\d+)\.(conv[123]|shortcut)(\.norm)?\.(\w+)")


def detectron2_name(name: str) -> str:
    """The name that Detectron2 gives a tensor.

    "conv1.weight" -> "stem.conv1.weight", "layer1.0.downsample.1.bias" ->
    "res2.0.shortcut.norm.bias".
    """
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)


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
    """Where a project keeps the backbone, read off its public code."""

    online: tuple[str, ...] = ("",)  # prefixes of the trained backbone
    ema: tuple[str, ...] = ()  # prefixes of its moving average
    fc: str = _CLASSIFIER  # what `fc.*` behind the prefix is
    numbered: bool = False  # whether the children may be numbered, as in an nn.Sequential


_LAYOUTS = {
    "ours": _Layout(online=("backbone.",)),  # ema is a part of its own
    # Bare names; a moving average is a state_dict of its own.
    "torchvision": _Layout(),
    "timm": _Layout(),
    # MoCo v1/v2 (encoder_q, encoder_k) and v3 (base_encoder, momentum_encoder).
    "moco": _Layout(
        online=("encoder_q.", "base_encoder."), ema=("encoder_k.", "momentum_encoder."), fc=_HEAD
    ),
    "solo-learn": _Layout(
        online=("backbone.", "encoder."),  # old versions say encoder
        ema=("momentum_backbone.", "momentum_encoder."),
    ),
    "lightly": _Layout(
        online=("backbone.", "student_backbone.", "query_backbone."),
        ema=("backbone_momentum.", "teacher_backbone.", "key_backbone.", "momentum_backbone."),
        numbered=True,
    ),
}
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
        Every key either under its torchvision name or dropped with a reason. Whether the backbone
        is complete and holds nothing else is for the reader to check (`common.backbone`). Of our
        own files, torchvision's and timm's, `state` is the branch already: they keep the moving
        average apart.

    Raises:
        UserError: For two keys of one name, for an unknown part of a Detectron2 file, or if the
            branch is not there.
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
        rest = key.removeprefix(prefix or "")
        if prefix is None or rest == "n_averaged":  # torch's AveragedModel counts its updates
            mapped.dropped[key] = _HEAD
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
        raise UserError(f"no key begins with {own}; try another --layout or --branch")
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
            raise UserError(f"unknown key {key!r}: no part of a ResNet or of a known detector")
    return mapped


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
