"""ResNets: the four numbers of an architecture, names of tensors.

A tensor has the name that torchvision gives it. `to_torchvision` maps every key of seven kinds of
checkpoint to such a name or drops it with a reason. `detectron2_name` and `torchvision_name`
translate one name, and back.
"""

import argparse
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
D2_CARD, TORCHVISION_CARD = "fa-d2-1", "fa-torchvision-1"  # formats of the cards beside weights
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
        if str(value["name"]) != "resnet":
            raise UserError(f"arch.name is {value['name']!r:.80}: only ResNets are read here")
        value = {key: number for key, number in value.items() if key != "name"}
    fields = Arch.__dataclass_fields__
    if not isinstance(value, Mapping) or set(value) != set(fields):
        raise UserError(f"arch {value!r:.200}: expected the keys {', '.join(fields)}")
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


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """What weights do not say of themselves; `common.backbone.reading_of` takes the options."""
    add = parser.add_argument
    add("--branch", choices=BRANCHES, default="online", help="which network (default: online)")
    add("--layout", choices=("auto", *LAYOUTS), default="auto", help="key names (default: auto)")
    add("--preprocessing", metavar="SPEC", help="imagenet (other projects' default), half, or "
        "mean/std in [0, 1] as 0.485,0.456,0.406/0.229,0.224,0.225")  # fmt: skip
    add("--stride-in", choices=("3x3", "1x1"), help="where the bottlenecks of a Detectron2 file "
        "without a card have their stride")  # fmt: skip


_HEAD = "a head or state of pretraining; the detector has its own"
_OTHER_BRANCH = "the other branch (see --branch)"
_CLASSIFIER = "the classifier; the detector has its own"
_DETECTOR = "a part of the detector behind or beside its ResNet"
_COPY = "the same backbone under another name"
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
    ),
}
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_INSIDE_DETECTOR = re.compile(r"^(backbone\.bottom_up\.|backbone\.|roi_heads\.(?=res5\.\d))")
_DETECTOR_PARTS = ("proposal_generator.", "roi_heads.", "backbone.fpn_", "pixel_mean", "pixel_std")
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module)\.")
# A key of a backbone, behind whatever prefix; as torchvision names it, or numbered.
_BLOCK = re.compile(r"((?:.+\.)?)(layer[1-4]|[4-7])\.\d+\.conv1\.weight")
_EMA = re.compile(r"(^|[._])(k|key|momentum|teacher|target|ema|averaged?)([._]|$)")
# Heads that lie beside a backbone without a prefix of its own, as SwAV has them.
_HEADS = re.compile(
    r"(head|heads|neck|projection_head|projector|prototypes|prediction_head|predictor|classifier"
    r"|queue|queue_ptr|n_averaged)(\.|$)"
)


def backbone_prefixes(state: Mapping[str, Any]) -> list[str]:
    """What stands before the names of each ResNet in a state_dict without wrappers.

    "" for bare names, "encoder_q.0." for the first child of MoCo's encoder.
    """
    found = {match[1]: match[2] for key in state if (match := _BLOCK.fullmatch(key))}
    return [
        prefix
        for prefix, child in found.items()
        if child.startswith("layer") or any(key.startswith(f"{prefix}0.") for key in state)
    ]


def is_average(prefix: str) -> bool:
    """Whether a prefix is that of a moving average or a teacher: the branch "ema"."""
    return _EMA.search(prefix) is not None


def to_torchvision(state: Mapping[str, Any], layout: str, branch: str, place: str = "") -> Mapped:
    """Name a checkpoint's backbone tensors as torchvision does.

    Args:
        state: The network's state_dict; wrappers of DistributedDataParallel, FSDP and torch.compile
            (`module.`, `_orig_mod.`) are cut out of the names first, in any nesting.
        layout: One of LAYOUTS. The backbone may lie deeper than the project's own code has it, as
            in "model.encoder_q.0.conv1.weight".
        branch: "online" or "ema".
        place: Where the state lies in its checkpoint, as "teacher.", which may say the branch.

    Returns:
        Every key either under its torchvision name or dropped with a reason. Whether the backbone
        is complete and holds nothing else is for the reader to check (`common.backbone`).

    Raises:
        UserError: For two keys of one name, for an unknown part of a Detectron2 file, if the branch
            is not there, or if it is there twice with other values.
    """
    state = without_wrappers(state)
    if layout == "detectron2":
        if branch == "ema":
            raise UserError("--branch ema: a detectron2 checkpoint holds one network; leave it out")
        return _from_detectron2(state)
    kind, mapped = _LAYOUTS[layout], Mapped({}, {}, {})
    found = backbone_prefixes(state)
    own = [prefix for prefix in found if is_average(place + prefix) == (branch == "ema")]
    in_layout = [prefix for prefix in found if layout in _layouts_of(prefix)]
    # The other branch may have a name that no layout has, as PixPro's "encoder_k" beside "encoder".
    own = [prefix for prefix in own if prefix in in_layout] or (own if in_layout else [])
    if not own:
        usual = (kind.ema if branch == "ema" else ()) or kind.online
        names = " or ".join(repr(prefix) for prefix in usual)
        there = ", ".join(repr(place + prefix) for prefix in found) or "none"
        raise UserError(
            f"no key begins with {names} (backbones found: {there}); try another --layout or "
            "--branch"
        )
    prefix, copies = own[0], own[1:]
    for other in copies:
        if not _is_copy(state, prefix, other):
            raise UserError(
                f"holds two backbones that differ, {place + prefix!r} and {place + other!r}; save "
                "the one that is meant as a state_dict of its own"
            )
    known = {*found, *kind.online, *kind.ema}
    for key, value in state.items():
        begin = max((p for p in known if key.startswith(p)), key=len, default="")
        rest = key.removeprefix(prefix)
        child, _, inner = rest.partition(".")
        if begin in copies:
            mapped.dropped[key] = _COPY
        elif begin != prefix or not key.startswith(prefix):
            is_other = begin and is_average(place + begin) != (branch == "ema")
            mapped.dropped[key] = _OTHER_BRANCH if is_other else _HEAD
        elif child == "fc":
            mapped.dropped[key] = kind.fc
        elif _HEADS.match(rest):
            mapped.dropped[key] = _HEAD
        else:
            mapped.add(
                f"{_SEQUENTIAL[child]}.{inner}" if child in _SEQUENTIAL else rest, key, value
            )
    return mapped


def _layouts_of(prefix: str) -> set[str]:
    """Layouts in which a backbone may have this prefix, or a longer one around theirs."""
    parts = set(prefix.split("."))
    named = {
        name
        for name, kind in _LAYOUTS.items()
        if parts & {own.rstrip(".") for own in (*kind.online, *kind.ema) if own}
    }
    return named or {"torchvision", "timm", "lightly"}


def _is_copy(state: Mapping[str, Any], first: str, second: str) -> bool:
    """Whether two backbones have the same values, as where a module has two names."""
    one, two = (
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in (first, second)
    )
    shared = one.keys() & two.keys()
    return bool(shared) and all(
        one[name] is two[name]
        or (
            getattr(one[name], "shape", 0) == getattr(two[name], "shape", 1)
            and bool((one[name] == two[name]).all())
        )
        for name in shared
    )


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
    """Keys without `module.`, `_orig_mod.` and FSDP's wrapper.

    Raises:
        UserError: If two keys become one.
    """
    plain = {_WRAPPERS.sub("", key): value for key, value in state.items()}
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
    if any(torchvision_name(_INSIDE_DETECTOR.sub("", name)) for name in names):
        return "detectron2"
    firsts = {name.partition(".")[0] for name in names}
    prefixes = backbone_prefixes(names)
    if not prefixes:
        listed = ", ".join(sorted(firsts)[:8]) or "nothing"
        raise UserError(f"no known layout: the keys begin with {listed}; choose one with --layout")
    parts = {part for prefix in prefixes for part in prefix.split(".")}
    if parts & {"encoder_q", "base_encoder"}:
        return "moco"
    if "" in prefixes and "conv1.weight" in names:
        return "torchvision"
    lightly = {"student_backbone", "teacher_backbone", "backbone_momentum", "query_backbone",
               "projection_head", "prediction_head"}  # fmt: skip
    if (firsts | parts) & lightly or any(f"{prefix}0.weight" in names for prefix in prefixes):
        return "lightly"
    return "solo-learn" if "solo-learn" in _layouts_of(prefixes[0]) else "torchvision"
