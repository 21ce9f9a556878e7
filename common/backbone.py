"""The ResNet in a checkpoint of any layout: read, named as torchvision does, checked.

Conversion, verification and linear evaluation all read weights through `read_backbone`.

Tensors do not say which pixels a network expects, nor where its bottlenecks have their stride.
That comes from the checkpoint, from the card beside it, from timm's config.json, or from the
caller. If nothing states it, a Detectron2 file is refused; for the other layouts ImageNet's
statistics are assumed, and `notes` says so.
"""

import argparse
import contextlib
import functools
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import checkpoints, resnet
from common.errors import UserError
from common.files import read_json, read_json_or_none, sha256_of
from common.network import ResNet, shapes_alone
from common.resnet import D2_CARD, TORCHVISION_CARD

_HUB_CONFIG = "pretrained_cfg of config.json"  # the key under which its pixel statistics are kept
_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# timm's architectures whose tensors have a plain ResNet's names and shapes, but which compute
# something else: pooling against aliasing has no weights. Other kinds have tensors of their own.
_SAME_TENSORS = re.compile(r"^(se)?resnet(aa|blur)\d+")
_PARTS = ("net", "network", "backbone", "encoder", "ema", "student", "teacher")
_FORM_ERRORS = (AttributeError, KeyError, TypeError, ValueError, ArithmeticError)
_COPY_AGAIN = "copy the checkpoint again, or take an older one"


@dataclass(frozen=True)
class Preprocessing:
    """Mean and standard deviation of red, green, blue for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalise(self, images: Tensor) -> Tensor:
        """(image / 255 - mean) / std per channel: uint8 RGB (N, 3, H, W) -> float32."""
        x = images.float().div_(255)
        mean, std = (x.new_tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return x.sub_(mean).div_(std)


# Statistics of ImageNet, used by torchvision and nearly every self-supervised code.
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NAMED = {"imagenet": IMAGENET, "half": Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def parse_preprocessing(text: str) -> Preprocessing:
    """Read "imagenet", "half", or "R,G,B/R,G,B" (mean/std in [0, 1]).

    Raises:
        UserError: If it is none of these.
    """
    if text in _NAMED:
        return _NAMED[text]
    try:
        mean, std = (tuple(float(part) for part in half.split(",")) for half in text.split("/"))
    except ValueError:
        raise UserError(f"--preprocessing {text!r}: give R,G,B/R,G,B in [0, 1]") from None
    return _checked(mean, std)


def _checked(mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    is_plain = all(0 <= x <= 1 for x in mean) and all(0 < x <= 1 for x in std)
    if len(mean) != 3 or len(std) != 3 or not is_plain:
        raise UserError(
            f"mean {mean} / std {std}: give three numbers each, for pixels in [0, 1], std above 0"
        )
    return Preprocessing((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def reading_of(options: argparse.Namespace) -> dict[str, Any]:
    """What `read_backbone` is told beside the file, from `resnet.add_reading_options`."""
    pixels, stride = options.preprocessing, options.stride_in
    return {
        "layout": options.layout,
        "branch": options.branch,
        "preprocessing": parse_preprocessing(pixels) if pixels else None,
        "stride_in_1x1": stride == "1x1" if stride else None,
    }


# -- the card beside a file -----------------------------------------------------------------------


def read_own_card(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The card beside a weight file, if it is one of ours and describes this very file.

    Returns:
        (card, "") or (None, why there is none; "" if no card lies there).
    """
    place = path.with_suffix(".json")
    card = read_any_card(place)
    if card is None:
        return None, ""
    if card["weights_sha256"] != sha256_of(path):
        return None, f"{place.name} beside it describes another file (sha256 differs)"
    return card, ""


def read_any_card(place: Path) -> dict[str, Any] | None:
    """A JSON file if it is a card of ours, whatever it describes."""
    card = read_json_or_none(place)
    if not isinstance(card, dict) or card.get("format") not in (D2_CARD, TORCHVISION_CARD):
        return None
    has_tables = all(isinstance(card.get(key), dict) for key in ("preprocessing", "source"))
    return card if has_tables and {"arch", "branch", "weights_sha256"} <= card.keys() else None


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackboneCheckpoint:
    """A checkpoint's backbone and what is known about it.

    Attributes:
        path: The file.
        layout: One of resnet.LAYOUTS.
        branch: "online" or "ema".
        arch: Depth and widths.
        tensors: torchvision name -> float32, complete and finite.
        dropped: Key -> reason.
        counters: torchvision name -> int64 scalar: `num_batches_tracked` of each norm, where kept.
        cast: Type -> number of tensors that were converted from it to float32.
        preprocessing: What the network expects of its pixels.
        origins: Where "preprocessing" and "stride" come from: checkpoint, card, config (timm's
            config.json), option, layout (its only convention), or assumed.
        card: The card beside the file, if it describes it.
        contents: The whole checkpoint, for what it says about its training.
        notes: What a reader should know, in sentences.
    """

    path: Path
    layout: str
    branch: str
    arch: resnet.Arch
    tensors: dict[str, Tensor]
    dropped: dict[str, str]
    counters: dict[str, Tensor]
    cast: dict[str, int]
    preprocessing: Preprocessing
    origins: dict[str, str]
    card: dict[str, Any] | None
    contents: Mapping[str, Any]
    notes: tuple[str, ...]


def read_backbone(
    path: Path,
    *,
    layout: str = "auto",
    branch: str = "online",
    preprocessing: Preprocessing | None = None,
    stride_in_1x1: bool | None = None,
    assume: bool = False,
) -> BackboneCheckpoint:
    """Read a checkpoint and check every tensor of its backbone.

    Args:
        path: Checkpoint file.
        layout: One of resnet.LAYOUTS, or "auto".
        branch: "online" or "ema".
        preprocessing: What the network was trained on; default: what the checkpoint or its card
            says, and ImageNet's statistics for other projects' checkpoints.
        stride_in_1x1: Where a Detectron2 file without a card has the stride of its bottlenecks:
            such a network is refused, since its tensors fit, but the features differ.
        assume: Go on with ImageNet's statistics and the stride in the 3x3 convolution if a
            Detectron2 file says neither, and if the card describes another file; `notes` says so.
            For looking at a file; a conversion must know.

    Returns:
        float32 tensors under torchvision names, complete and finite.

    Raises:
        UserError: One message for the first fault.
    """
    path = Path(path)
    contents = _with_hub_config(path, checkpoints.read(path))
    try:
        state, layout, arch, place = _network(contents, layout, branch)
        mapped = resnet.to_torchvision(state, layout, branch, place)
        # Tensors that claim more bytes than the file has are refused before they are touched.
        claimed = sum(
            value.numel() * value.dtype.itemsize if isinstance(value, Tensor) else value.nbytes
            for value in mapped.backbone.values()
            if isinstance(value, Tensor | np.ndarray)
        )
        if claimed > path.stat().st_size:
            raise UserError(f"its tensors claim {claimed} bytes, more than the file has")
        shapes = {name: _shape(value) for name, value in mapped.backbone.items()}
        arch = arch or resnet.infer_arch(shapes)
        tensors, cast = _tensors(mapped.backbone, shapes, arch)
        counters = _counters(mapped.counters, tensors)
        card, fault = read_own_card(path)
        if fault and not assume and preprocessing is None:
            raise UserError(f"{fault}; convert again, or remove the card and give --preprocessing")

        # Pixels: what the caller says, else what the file or its card says.
        pixels, origin = _stated_pixels(layout, contents, card)
        if preprocessing is not None:
            pixels, origin = preprocessing, "option"

        # Stride: only Detectron2 builds bottlenecks with it in either place.
        stride, stride_origin = False, "layout"
        if card is not None and layout == "detectron2":
            stride, stride_origin = card["preprocessing"].get("stride_in_1x1", False), "card"
        elif layout == "detectron2" and arch.is_bottleneck:
            stride = bool(stride_in_1x1)
            stride_origin = "assumed" if stride_in_1x1 is None else "option"
        if stride is not False and arch.is_bottleneck:
            raise UserError("stride in the 1x1 convolution, which no renaming moves to the 3x3 one")

        origins = {"preprocessing": origin, "stride": stride_origin}
        assumed = [name for name, known_from in origins.items() if known_from == "assumed"]
        if layout == "detectron2" and assumed and card is None and not assume:
            raise UserError(
                f"has no card beside it ({path.with_suffix('.json').name}) to say which pixels and "
                "strides it expects; give --preprocessing and --stride-in 3x3"
            )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    notes = [f"{name} is assumed: nothing states it" for name in assumed]
    return BackboneCheckpoint(
        path=path,
        layout=layout,
        branch=branch,
        arch=arch,
        tensors=tensors,
        dropped=mapped.dropped,
        counters=counters,
        cast=cast,
        preprocessing=pixels,
        origins=origins,
        card=card,
        contents=contents,
        notes=(fault, *notes) if fault else tuple(notes),
    )


def _with_hub_config(path: Path, checkpoint: Any) -> Any:
    """Add what timm's `config.json` beside published weights says: architecture and pixels."""
    if path.suffix not in (".safetensors", ".bin") or not isinstance(checkpoint, Mapping):
        return checkpoint
    try:
        config = read_json(path.with_name("config.json"))
        name, stated = config["architecture"], config["pretrained_cfg"]
        pixels = {key: stated[key] for key in ("mean", "std")}
    except (UserError, KeyError, TypeError):
        return checkpoint
    return {"state_dict": checkpoint, "arch": str(name), _HUB_CONFIG: pixels}


def _network(
    checkpoint: Any, layout: str, branch: str
) -> tuple[Mapping[str, Any], str, resnet.Arch | None, str]:
    """The state_dict inside a checkpoint, its layout, its architecture if it says so, its place."""
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        kind = "nothing" if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise UserError(f"holds {kind}, not a state_dict; {_COPY_AGAIN}")
    is_ours = checkpoints.is_ours(checkpoint)
    if layout != "auto" and is_ours != (layout == "ours"):
        stated = checkpoint.get("format")
        stated = repr(stated[:40]) if isinstance(stated, str) else "missing"
        raise UserError(f"--layout {layout}: its format is {stated}, ours is "
                        f"{checkpoints.FORMAT!r}; use --layout auto")  # fmt: skip
    if is_ours:
        part = "ema" if branch == "ema" else "model"
        state = checkpoint.get(part)
        if not state or not isinstance(state, Mapping):
            raise UserError(f"holds no {branch} network; use --branch online")
        return (
            checkpoints.named(state),
            "ours",
            resnet.read_arch(checkpoint.get("arch")),
            f"{part}.",
        )

    # Other projects' files keep networks bare or under keys, and do not say their layout.
    tables = _tables(checkpoint)
    state = checkpoints.nested(checkpoint, checkpoints.WRAPPERS) or checkpoint
    place = next((where for where, table in tables.items() if table is state), "")
    if not tables:
        _refuse_objects(checkpoint)
        checkpoints.named(state)
    elif not _has(state, place, branch):
        there = [where for where, table in tables.items() if _has(table, where, branch)]
        if len(there) > 1:
            raise UserError(f"holds networks under {' and '.join(map(repr, there))}; save the one "
                            "that is meant as a state_dict of its own")  # fmt: skip
        place = (there or list(tables))[0]
        state = tables[place]
    if layout == "auto":
        layout = resnet.detect_layout(state)
        is_timm = any(key in checkpoint for key in ("state_dict_ema", "saver", _HUB_CONFIG))
        layout = "timm" if layout == "torchvision" and is_timm else layout
    if layout == "detectron2":  # the counters lie beside the model, see weights.write_weights
        beside = checkpoint.get(resnet.COUNTER)
        counters = checkpoints.named(beside) if isinstance(beside, Mapping) else {}
        return {**state, **counters}, layout, None, place
    if layout in ("torchvision", "timm"):
        name = str(checkpoint.get("arch", ""))[:80]
        if _SAME_TENSORS.match(name):
            raise UserError(f"arch {name!r} has a plain ResNet's tensors, but other pooling")
        if branch == "ema" and not _has(state, place, branch):
            raise UserError(f"--branch ema: this {layout} checkpoint holds one network")
    return state, layout, None, place


def _tables(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """Every state_dict with a ResNet in it, by the keys that lead there: "student." and so on."""
    found: dict[str, Mapping[str, Any]] = {}
    seen, level = set(), {"": checkpoint}
    while level:
        below: dict[str, Mapping[Any, Any]] = {}
        for place, table in level.items():
            if id(table) in seen:
                continue
            seen.add(id(table))
            with contextlib.suppress(UserError):
                resnet.detect_layout(checkpoints.named(table))
                found[place] = table
            for key, value in table.items():
                is_name = isinstance(key, str) and not key.startswith(
                    ("optim", "loss", resnet.COUNTER)
                )
                if is_name and isinstance(value, Mapping):
                    below[f"{place}{key}."] = value
        level = below
    return found


def _has(state: Mapping[Any, Any], place: str, branch: str) -> bool:
    """Whether a state_dict of another project holds this branch's ResNet."""
    try:
        prefixes = resnet.backbone_prefixes(resnet.without_wrappers(checkpoints.named(state)))
        prefixes = prefixes or ([""] if resnet.detect_layout(state) == "detectron2" else [])
    except UserError:
        return False
    return any(resnet.is_average(place + prefix) == (branch == "ema") for prefix in prefixes)


def _refuse_objects(checkpoint: Mapping[Any, Any]) -> None:
    """Say what to save in place of a whole network."""
    for key, value in checkpoint.items():
        if isinstance(value, checkpoints.Placeholder) and key in (*checkpoints.WRAPPERS, *_PARTS):
            raise UserError(
                f"{key!r} is a whole object, a {value.qualified_name}, which only its own program "
                f"can build; save its weights there: torch.save(model.state_dict(), PATH)"
            )


@functools.lru_cache(maxsize=8)
def tensor_shapes(arch: resnet.Arch) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a ResNet without classifier and without batch counters.

    Names and order are those of torchvision's state_dict.
    """
    with shapes_alone():
        state = ResNet(arch).state_dict()
    shapes = {name: tuple(x.shape) for name, x in state.items()
              if not name.endswith(resnet.COUNTER)}  # fmt: skip
    return types.MappingProxyType(shapes)  # kept, so that nobody may change it


def _tensors(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: resnet.Arch
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Float32 tensors, all that the architecture needs, and which types they came from.

    Raises:
        UserError: For a missing, unknown or misshapen tensor, and for values that are no numbers.
    """
    needed = tensor_shapes(arch)
    missing = [name for name in needed if name not in state]
    unknown = [name for name in state if name not in needed]
    if missing or unknown:
        faults = [f"lacks {missing[0]} and {len(missing) - 1} more"] if missing else []
        faults += [f"has {unknown[0]} and {len(unknown) - 1} more beside"] if unknown else []
        raise UserError(f"is no {arch}: {'; '.join(faults)}; {_COPY_AGAIN}")
    tensors, cast = {}, {}
    for name, shape in needed.items():
        value = state[name]
        if isinstance(value, Tensor | np.ndarray) and shapes[name] != shape:
            raise UserError(f"{name} has shape {shapes[name]}, a {arch} needs {shape}")
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize <= 8:
            native = value.dtype.newbyteorder("=")
            value = torch.from_numpy(np.array(value, dtype=native, order="C"))
        dense = value if isinstance(value, Tensor) and not value.is_meta else None
        if dense is None or dense.layout != torch.strided or dense.dtype not in _WEIGHT_TYPES:
            raise UserError(f"{name} is {_kind(state[name])}, no dense floating-point tensor")
        if not checkpoints.is_finite(dense):
            raise UserError(f"{name} holds NaN or infinity: the training diverged; {_COPY_AGAIN}")
        tensors[name] = dense.detach().to(torch.float32).contiguous().clone()
        if dense.dtype != torch.float32:
            kind = str(dense.dtype).removeprefix("torch.")
            cast[kind] = cast.get(kind, 0) + 1
            if not checkpoints.is_finite(tensors[name]):
                raise UserError(f"{name} holds values beyond float32; save the weights as float32")
    return tensors, cast


def _counters(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms' batch counters as int64 scalars, in the order of the tensors.

    Raises:
        UserError: For a counter without a norm, or one that is no whole number.
    """
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith("running_var")]
    order = [f"{norm}{resnet.COUNTER}" for norm in norms]
    stray = next((name for name in state if name not in order), None)
    if stray is not None:
        raise UserError(f"{stray}: a batch counter of no norm; {_COPY_AGAIN}")
    counters = {}
    for name in (name for name in order if name in state):
        value = state[name]
        is_one = isinstance(value, Tensor | np.ndarray) and _shape(value) in ((), (1,))
        count = value.item() if is_one else value
        is_whole = isinstance(count, int | np.integer) or (
            isinstance(count, float | np.floating) and float(count).is_integer()  # averaged weights
        )
        if not is_whole or not 0 <= count < 2**63:
            raise UserError(f"{name} is {_kind(value)} {count!r:.40}, not a count of batches")
        counters[name] = torch.tensor(int(count))
    return counters


def _stated_pixels(
    layout: str, contents: Mapping[str, Any], card: Mapping[str, Any] | None
) -> tuple[Preprocessing, str]:
    """Pixel statistics and where they come from."""
    if layout == "ours" and contents.get("preprocessing") is not None:
        return _pixels(contents["preprocessing"]), "checkpoint"
    if _HUB_CONFIG in contents:
        return _pixels(contents[_HUB_CONFIG]), "config"
    if card is None:
        return IMAGENET, "assumed"
    earlier = card.get("origins")
    is_assumed = isinstance(earlier, dict) and earlier.get("preprocessing") == "assumed"
    return _pixels(card["preprocessing"], card["format"]), "assumed" if is_assumed else "card"


def _pixels(stated: Any, card_format: str = "") -> Preprocessing:
    """Mean and deviation as a checkpoint or a card states them, checked."""
    names = ("mean", "std", "order")
    if card_format == D2_CARD:
        names = ("pixel_mean", "pixel_std", "input_format")
    try:
        mean, std = (tuple(map(float, stated[key])) for key in names[:2])
        order = str(stated.get(names[2], "RGB")).upper()
    except (*_FORM_ERRORS, RuntimeError) as error:
        raise UserError(f"preprocessing {stated!r:.120}: no mean and std ({error!r})") from error
    if order != "RGB":
        raise UserError(f"preprocessing order {order!r}: only RGB networks are read")
    if card_format == D2_CARD:  # Detectron2 counts pixels from 0 to 255
        mean, std = (tuple(round(x / 255, 8) for x in values) for values in (mean, std))
    return _checked(mean, std)


def _shape(value: Any) -> tuple[int, ...]:
    """Of a tensor or an array; () for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor | np.ndarray) else ()


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    dtype = getattr(value, "dtype", None)
    return f"{type(value).__name__}{'' if dtype is None else f' of {dtype}'}"
