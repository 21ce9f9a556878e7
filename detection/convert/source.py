"""A checkpoint of any layout, read, named and checked: what conversion and verification work on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import checkpoints
from common.errors import UserError
from common.resnet import Arch, infer_arch, read_arch
from detection.convert import conventions, keymap
from detection.convert import keymap as variants
from detection.convert.conventions import Preprocessing
from detection.convert.parity import tensor_shapes

_BARE = ("torchvision", "timm")
_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COPY_AGAIN = "copy the checkpoint again, or take an older one"


@dataclass(frozen=True)
class Source:
    """A checkpoint's backbone and what is known about it.

    Attributes:
        path: The file.
        layout: One of keymap.LAYOUTS.
        branch: "online" or "ema".
        arch: Depth and widths.
        tensors: torchvision name -> float32, complete and finite.
        dropped: Key -> reason.
        counters: torchvision name -> int64 scalar: `num_batches_tracked` of each norm, where kept.
        cast: Type -> number of tensors that were brought from it to float32.
        preprocessing: What the network expects of its pixels.
        stride_in_1x1: Whether a bottleneck's stride lies in its first convolution.
        origins: Where "preprocessing" and "stride" come from: checkpoint, card, config (timm's
            config.json), option, layout (its only convention), or assumed.
        card: The card beside the file, if it describes it.
        contents: The whole checkpoint, for what it says about its training.
        notes: What a reader should know, in sentences.
    """

    path: Path
    layout: str
    branch: str
    arch: Arch
    tensors: dict[str, Tensor]
    dropped: dict[str, str]
    counters: dict[str, Tensor]
    cast: dict[str, int]
    preprocessing: Preprocessing
    stride_in_1x1: bool
    origins: dict[str, str]
    card: dict[str, Any] | None
    contents: Mapping[str, Any]
    notes: tuple[str, ...]


def read_source(
    path: Path,
    *,
    layout: str = "auto",
    branch: str = "online",
    preprocessing: Preprocessing | None = None,
    stride_in_1x1: bool | None = None,
    assume: bool = False,
) -> Source:
    """Read a checkpoint and check every tensor of its backbone.

    Args:
        path: Checkpoint file.
        layout: One of keymap.LAYOUTS, or "auto".
        branch: "online" or "ema".
        preprocessing: What the network was trained on; default: what the checkpoint or its card
            says, and the ImageNet statistics for foreign ones.
        stride_in_1x1: Where a Detectron2 file without a card has the stride of its bottlenecks.
        assume: Go on with ImageNet's statistics and the stride in the 3x3 convolution where a
            Detectron2 file says neither, and without a card that describes another file; `notes`
            says so. For looking at a file; a conversion must know.

    Returns:
        float32 tensors under torchvision names, complete and finite.

    Raises:
        UserError: One message for the first fault.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    checkpoint = conventions.with_hub_config(path, checkpoints.read(path))
    try:
        state, layout, claimed = _network(checkpoint, layout, branch)
        mapped = keymap.to_torchvision(state, layout, branch)
        _check_size(mapped.backbone, path.stat().st_size)
        arch, tensors, cast = _backbone(mapped.backbone, claimed)
        counters = _counters(mapped.counters, tensors)
        found = conventions.find(
            path, layout, arch, checkpoint, preprocessing=preprocessing,
            stride_in_1x1=stride_in_1x1, assume=assume,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Source(
        path, layout, branch, arch, tensors, mapped.dropped, counters, cast, contents=checkpoint,
        **vars(found),
    )  # fmt: skip


def _network(
    checkpoint: Any, layout: str, branch: str
) -> tuple[Mapping[str, Any], str, Arch | None]:
    """The state_dict inside a checkpoint, its layout, and its architecture if it says so."""
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        kind = "nothing" if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise UserError(f"holds {kind}, not a state_dict; {_COPY_AGAIN}")
    is_ours = checkpoint.get("format") == checkpoints.FORMAT
    if is_ours != (layout == "ours") and (is_ours or layout == "ours") and layout != "auto":
        raise UserError(f"--layout {layout}: format is {checkpoint.get('format')!r}, ours is "
                        f"{checkpoints.FORMAT!r}; use --layout auto")  # fmt: skip
    if is_ours:
        state = checkpoint.get("ema" if branch == "ema" else "model")
        if not state or not isinstance(state, Mapping):
            raise UserError(
                f"holds no {branch} network: this method keeps none; use --branch online"
            )
        return checkpoints.named(state), "ours", read_arch(checkpoint.get("arch"))
    return *_foreign_network(checkpoint, layout, branch), None


def _foreign_network(
    checkpoint: Mapping[str, Any], layout: str, branch: str
) -> tuple[Mapping[str, Any], str]:
    """The same for a checkpoint that is not ours."""
    state = checkpoints.named(checkpoints.nested(checkpoint, checkpoints.WRAPPERS) or checkpoint)
    if layout == "auto":
        _refuse(variants.reason_by_name(state))
        layout = keymap.detect_layout(state)
        is_timm = any(
            key in checkpoint for key in ("state_dict_ema", "saver", conventions.HUB_CONFIG)
        )
        layout = "timm" if layout == "torchvision" and is_timm else layout
    if layout == "detectron2":  # see weights.write_weights
        beside = checkpoint.get(keymap.COUNTER)
        return {
            **state,
            **(checkpoints.named(beside) if isinstance(beside, Mapping) else {}),
        }, layout
    if layout not in _BARE:
        return state, layout
    _refuse(variants.reason_by_architecture(str(checkpoint.get("arch", ""))))
    if branch == "ema":
        average = checkpoints.nested(checkpoint, checkpoints.EMA_WRAPPERS)
        if average is None:
            raise UserError(
                f"--branch ema: this {layout} checkpoint holds one network; leave it out"
            )
        state = checkpoints.named(average)
    return state, layout


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise UserError(f"is no ResNet that converts: {reason}")


def _check_size(given: Mapping[str, Any], num_bytes: int) -> None:
    """Refuse tensors that claim more bytes than the file has, before they are touched."""
    claimed = 0
    for value in given.values():
        if isinstance(value, Tensor):
            claimed += value.numel() * value.dtype.itemsize
        elif isinstance(value, np.ndarray):
            claimed += value.nbytes
    if claimed > num_bytes:
        raise UserError(
            f"its tensors claim {claimed} bytes, the file has {num_bytes}; {_COPY_AGAIN}"
        )


def _backbone(
    given: Mapping[str, Any], claimed: Arch | None
) -> tuple[Arch, dict[str, Tensor], dict[str, int]]:
    """Architecture, float32 tensors, and which types they came from."""
    shapes = {name: tuple(np.shape(value)) for name, value in given.items()}
    _refuse(variants.reason_by_name(given) or variants.reason_by_shape(shapes))
    arch = claimed or infer_arch(shapes)
    if not arch.is_bottleneck and (arch.res2_channels, arch.stem_channels) != (64, 64):
        raise UserError(f"{arch}: Detectron2 builds ResNet-18/34 with 64 channels only")
    return arch, *_checked(given, arch)


def _checked(backbone: Mapping[str, Any], arch: Arch) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Compare names and shapes with the architecture and look for values that are no numbers."""
    wanted = tensor_shapes(arch)
    missing = [name for name in wanted if name not in backbone]
    unknown = [name for name in backbone if name not in wanted]
    if missing or unknown:
        faults = [f"lacks {missing[0]} and {len(missing) - 1} more"] if missing else []
        faults += [f"has {unknown[0]} and {len(unknown) - 1} more beside"] if unknown else []
        raise UserError(
            f"is no {arch}: {'; '.join(faults)}{_what_it_looks_like(backbone, arch)}; {_COPY_AGAIN}"
        )
    tensors, cast = {}, {}
    for name, shape in wanted.items():
        found = tuple(np.shape(backbone[name]))
        if found != shape and isinstance(backbone[name], Tensor | np.ndarray):
            hint = " (a CIFAR stem does not convert)" if name == "conv1.weight" else ""
            raise UserError(f"{name} has shape {found}, a {arch} needs {shape}{hint}; "
                            "its `arch` and its weights do not belong together")  # fmt: skip
        value = _tensor(name, backbone[name])
        if not torch.isfinite(value).all():
            raise UserError(f"{name} holds NaN or infinity: the training diverged; {_COPY_AGAIN}")
        tensors[name] = value.to(torch.float32).contiguous().clone()
        if value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            cast[kind] = cast.get(kind, 0) + 1
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{name} holds values beyond float32; save the weights as float32")
    return tensors, cast


def _tensor(name: str, value: Any) -> Tensor:
    """A weight as a dense tensor of floating-point numbers.

    Raises:
        UserError: If it is something else.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize <= 8:
        native = value.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(value, dtype=native, order="C"))
    if isinstance(value, Tensor) and value.dtype in _WEIGHT_TYPES and not value.is_meta:
        dense = value.detach()
        if dense.layout == torch.strided:
            return dense
    raise UserError(f"{name} is {_kind(value)}, not a dense tensor of floating-point numbers")


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    dtype = getattr(value, "dtype", None)
    return f"{type(value).__name__}{'' if dtype is None else f' of {dtype}'}"


def _counters(given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms' batch counters as int64 scalars, in the order of the tensors.

    Raises:
        UserError: For a counter without a norm, or one that is no whole number.
    """
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith("running_var")]
    order = [f"{norm}{keymap.COUNTER}" for norm in norms]
    stray = next((name for name in given if name not in order), None)
    if stray is not None:
        raise UserError(f"{stray}: a batch counter of no norm; {_COPY_AGAIN}")
    counters = {}
    for name in (name for name in order if name in given):
        value = given[name]
        plain = value.item() if isinstance(value, Tensor | np.ndarray) and _size(value) == 1 \
            else value  # fmt: skip
        if not isinstance(plain, int | np.integer) or not 0 <= plain < 2**63:
            raise UserError(f"{name} is {_kind(value)} {plain!r:.40}, not a count of batches")
        counters[name] = torch.tensor(int(plain))
    return counters


def _size(value: Tensor | np.ndarray) -> int:
    return value.numel() if isinstance(value, Tensor) else value.size


def _what_it_looks_like(backbone: Mapping[str, Any], arch: Arch) -> str:
    """A remark when the tensors are another architecture's."""
    try:
        found = infer_arch({name: tuple(np.shape(value)) for name, value in backbone.items()})
    except UserError:
        return ""
    return "" if found == arch else f" (its tensors look like a {found})"
