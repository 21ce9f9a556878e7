"""Checkpoint -> Detectron2 weights, proved on a picture.

Read, name (`keymap`), check every shape and value, build the reference ResNet and Detectron2's
from the same tensors, compare res2 to res5 on one picture, write, read back the way training does.
Nothing is written unless the comparison held.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection import keymap, safe_pickle
from detection.arch import Arch, infer_arch, read_arch
from detection.errors import UserError
from detection.files import sha256_of
from detection.pixels import Preprocessing, from_checkpoint
from detection.reference_resnet import tensor_shapes

MAX_RELATIVE_DIFFERENCE = 1e-4
_NESTED = ("state_dict", "model", "model_state_dict")
_COPY_AGAIN = "copy the checkpoint again, or take an older one"


@dataclass(frozen=True)
class Source:
    """A checkpoint, read and named: what conversion works on."""

    path: Path
    layout: str
    branch: str
    arch: Arch
    preprocessing: Preprocessing
    tensors: dict[str, Tensor]
    dropped: dict[str, str]


def read_source(
    path: Path,
    *,
    layout: str = "auto",
    branch: str = "online",
    preprocessing: Preprocessing | None = None,
) -> Source:
    """Read a checkpoint and check every tensor of its backbone.

    Args:
        path: Checkpoint file.
        layout: One of keymap.LAYOUTS, or "auto".
        branch: "online" or "ema".
        preprocessing: What the network was trained on; default: what our checkpoint says, and the
            ImageNet statistics for foreign ones.

    Returns:
        float32 tensors under torchvision names, complete and finite.

    Raises:
        UserError: One message for the first fault.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    checkpoint = safe_pickle.load_torch(path)
    try:
        state, layout, claimed = _network(checkpoint, layout, branch)
        mapped = keymap.to_torchvision(state, layout, branch)
        shapes = {name: tuple(np.shape(value)) for name, value in mapped.backbone.items()}
        arch = claimed or infer_arch(shapes)
        tensors = _checked(mapped.backbone, arch)
        if preprocessing is None:
            given = checkpoint.get("preprocessing") if layout == "ours" else None
            preprocessing = from_checkpoint(given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Source(path, layout, branch, arch, preprocessing, tensors, mapped.dropped)


def _network(
    checkpoint: Any, layout: str, branch: str
) -> tuple[Mapping[str, Any], str, Arch | None]:
    """The state_dict inside a checkpoint, its layout, and its architecture if it says so."""
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise UserError(f"holds {type(checkpoint).__name__}, not a state_dict; {_COPY_AGAIN}")
    is_ours = checkpoint.get("format") == keymap.OUR_FORMAT
    if is_ours != (layout == "ours") and (is_ours or layout == "ours") and layout != "auto":
        raise UserError(f"--layout {layout}: format is {checkpoint.get('format')!r}, ours is "
                        f"{keymap.OUR_FORMAT!r}; use --layout auto")  # fmt: skip
    if is_ours:
        state = checkpoint.get("ema" if branch == "ema" else "model")
        if not state:
            raise UserError(
                f"holds no {branch} network: this method keeps none; use --branch online"
            )
        return state, "ours", read_arch(checkpoint.get("arch"))
    state = next((checkpoint[key] for key in _NESTED if isinstance(checkpoint.get(key), Mapping)),
                 checkpoint)  # fmt: skip
    if not all(isinstance(key, str) for key in state):
        raise UserError("its keys are not names of tensors; save the network's state_dict")
    return state, keymap.detect_layout(state) if layout == "auto" else layout, None


def _checked(backbone: Mapping[str, Any], arch: Arch) -> dict[str, Tensor]:
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
    tensors = {}
    for name, shape in wanted.items():
        value = torch.as_tensor(backbone[name])
        if tuple(value.shape) != shape:
            hint = " (a CIFAR stem does not convert)" if name == "conv1.weight" else ""
            raise UserError(f"{name} has shape {tuple(value.shape)}, a {arch} needs {shape}{hint}; "
                            "its `arch` and its weights do not belong together")  # fmt: skip
        if not torch.isfinite(value).all():
            raise UserError(f"{name} holds NaN or infinity: the training diverged; {_COPY_AGAIN}")
        tensors[name] = value.detach().to(torch.float32).contiguous().clone()
    return tensors


def _what_it_looks_like(backbone: Mapping[str, Any], arch: Arch) -> str:
    """A remark when the tensors are another architecture's."""
    try:
        found = infer_arch({name: tuple(np.shape(value)) for name, value in backbone.items()})
    except UserError:
        return ""
    return "" if found == arch else f" (its tensors look like a {found})"


def to_detectron2(source: Source) -> dict[str, Tensor]:
    """The same tensors under Detectron2's names, in a fixed order."""
    table = keymap.name_table(source.arch)
    return {new: source.tensors[old] for old, new in sorted(table.items(), key=lambda x: x[1])}


def _description(source: Source) -> dict[str, Any]:
    """The card's entries about where the weights come from."""
    return {
        "arch": asdict(source.arch),
        "preprocessing": source.preprocessing.for_detectron2(),
        "branch": source.branch,
        "source": {
            "file": source.path.name,
            "sha256": sha256_of(source.path),
            "layout": source.layout,
        },
        "dropped": sorted(source.dropped),
    }


def convert(
    source: Source, out: Path, *, picture: Path | None = None, size: int = 224
) -> dict[str, Any]:
    """Convert, compare, write, read back.

    Args:
        source: From `read_source`.
        out: File ending in .pkl or .pth; the card is written beside it as .json.
        picture: Compare on this picture; default: a generated one.
        size: Side of the square the picture is brought to, in pixels.

    Returns:
        The card.

    Raises:
        UserError: If `out` has another ending, or the features differ by more than
            MAX_RELATIVE_DIFFERENCE; then nothing is written.
    """
    if out.suffix not in (".pkl", ".pth"):
        raise UserError(f"{out}: end the name in .pkl (Detectron2's classic) or .pth")
    from detection import parity, weights  # import Detectron2

    began = time.perf_counter()
    state = to_detectron2(source)
    image = source.preprocessing.normalise(parity.comparison_picture(picture, size))
    stages = parity.compare(source.arch, source.tensors, state, image)
    worst = max(stages.values())
    if not worst <= MAX_RELATIVE_DIFFERENCE:
        shown = ", ".join(f"{stage} {value:.1e}" for stage, value in stages.items())
        raise UserError(
            f"{source.path}: Detectron2's features differ from the reference ({shown}; allowed "
            f"{MAX_RELATIVE_DIFFERENCE:.0e}); nothing was written. The weights were trained with "
            "another architecture or stride convention than the names say"
        )
    weights.write_weights(out, state)
    parity.check_written(source.arch, out, state)
    card = {
        "format": weights.CARD_FORMAT,
        **_description(source),
        "weights_sha256": sha256_of(out),
        "num_tensors": len(state),
        "stages": stages,
        "max_relative_difference": worst,
        "seconds": time.perf_counter() - began,
    }
    weights.write_card(out, card)
    return card
