"""Names of ResNet tensors: in five kinds of checkpoint, in torchvision, in Detectron2.

Two steps, both without exceptions: `to_torchvision` maps every key of a checkpoint to a torchvision
name or drops it with a reason (an unknown key is an error); `name_table` lists, tensor by tensor,
which Detectron2 name a torchvision name has.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detection.arch import Arch
from detection.errors import UserError
from detection.reference_resnet import tensor_shapes

LAYOUTS = ("ours", "torchvision", "moco", "solo-learn", "lightly")
BRANCHES = ("online", "ema")
OUR_FORMAT = "fa-pretrain-1"

_HEAD = "a head of pretraining; the detector has its own"
_OTHER_BRANCH = "the other branch (see --branch)"
_COUNTER = "a batch counter; Detectron2's norms do not use it"
_CLASSIFIER = "the classifier; the detector has its own"
_STATE = "state of pretraining, no weights"


class Mapped(NamedTuple):
    """What became of a checkpoint's keys."""

    backbone: dict[str, Any]  # torchvision name -> value
    dropped: dict[str, str]  # key -> reason


def name_table(arch: Arch) -> dict[str, str]:
    """Which Detectron2 name every torchvision name has.

    Returns:
        {"conv1.weight": "stem.conv1.weight", "layer1.0.downsample.1.bias":
        "res2.0.shortcut.norm.bias", ..}: one entry a tensor of the backbone.
    """
    return {name: _detectron2_name(name) for name in tensor_shapes(arch)}


def _detectron2_name(name: str) -> str:
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
_STATES = ("queue", "queue_y", "queue_index", "queue_ptr", "queue2", "queue2_ptr", "queue3")


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
    for key, value in state.items():
        rest, wanted = _split_prefix(key, online, ema, branch)
        if rest is None:
            first = key.split(".")[0]
            if first not in (*heads, *_STATES):
                raise _unknown(key)
            dropped[key] = _STATE if first in _STATES else _HEAD
        elif not wanted:
            dropped[key] = _OTHER_BRANCH
        elif rest.startswith("fc."):
            dropped[key] = _HEAD if heads_inside else _CLASSIFIER
        elif rest.endswith("num_batches_tracked"):
            dropped[key] = _COUNTER
        else:
            backbone[rename(rest)] = value
    if not backbone:
        wanted_prefixes = ema if branch == "ema" else online
        raise UserError(
            f"no key begins with {' or '.join(map(repr, wanted_prefixes))}, where this layout "
            f"keeps the {branch} backbone; try another --layout or --branch"
        )
    return Mapped(backbone, dropped)


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
    return Mapped(mapped.backbone, {**mapped.dropped, **heads})


def _torchvision(state: Mapping[str, Any], branch: str) -> Mapped:
    """A bare state_dict, names without prefix."""
    _refuse_ema(branch, "torchvision")
    return _map_prefixed(state, branch, online=("",), ema=(), heads=())


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


def _refuse_ema(branch: str, layout: str) -> None:
    if branch == "ema":
        raise UserError(f"--branch ema: a {layout} checkpoint holds one network; leave it out")


_READERS = {
    "ours": _ours,
    "torchvision": _torchvision,
    "moco": _moco,
    "solo-learn": _solo_learn,
    "lightly": _lightly,
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
        Every key either under its torchvision name or dropped with a reason.

    Raises:
        UserError: For a key that is neither, or if the branch is not there.
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

    Raises:
        UserError: If none fits.
    """
    firsts = {key.split(".")[0] for key in without_wrappers(state)}
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
