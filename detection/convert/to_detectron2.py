"""Weights from one layout to another, proved on a picture: to Detectron2, or back to torchvision.

Read, name and check (`source`), build the reference ResNet and Detectron2's from the same tensors,
compare res2 to res5 on one picture, write, read back, compare every tensor bit by bit. Nothing is
written unless the comparison held.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.backbone import BackboneCheckpoint, read_backbone, read_own_card
from common.errors import UserError
from common.files import write_atomically
from common.layouts import COUNTER, detectron2_name
from detection.convert import card as cards
from detection.convert import parity
from detection.training import weights

MAX_RELATIVE_DIFFERENCE = 1e-5
_ENDINGS = {
    "detectron2": {".pkl": "Detectron2's classic", ".pth": "tensors only"},
    "torchvision": {".pth": "a state_dict", ".pt": "the same"},
}


def to_detectron2(source: BackboneCheckpoint) -> dict[str, Tensor]:
    """The same tensors under Detectron2's names, in a fixed order; without batch counters."""
    renamed = {detectron2_name(name): value for name, value in source.tensors.items()}
    return dict(sorted(renamed.items()))


def to_torchvision(source: BackboneCheckpoint) -> dict[str, Tensor]:
    """A state_dict with torchvision's names in torchvision's order, batch counters in place."""
    state = {}
    for name, value in source.tensors.items():
        state[name] = value
        counter = f"{name.removesuffix('running_var')}{COUNTER}"
        if name.endswith("running_var") and counter in source.counters:
            state[counter] = source.counters[counter]
    return state


def convert(
    source: BackboneCheckpoint,
    out: Path,
    *,
    to: str = "detectron2",
    picture: Path | None = None,
    size: int = 224,
) -> dict[str, Any]:
    """Convert, compare, write, read back, write the cards.

    Args:
        source: From `read_backbone`.
        out: File ending in .pkl or .pth (to Detectron2), .pth or .pt (to torchvision); the cards
            are written beside it as .json and .md.
        to: "detectron2" or "torchvision".
        picture: Compare on this picture; default: a generated one.
        size: Side of the square the picture is brought to, in pixels.

    Returns:
        The card.

    Raises:
        UserError: If `out` has another ending or would overwrite what it must not, the network is
            none that both libraries build, or the features differ by more than
            MAX_RELATIVE_DIFFERENCE; then nothing is written.
    """
    _check_out(source, out, to)
    if source.stride_in_1x1:
        raise UserError(
            f"{source.path}: its bottlenecks have their stride in the 1x1 convolution; torchvision "
            "and all layouts here have it in the 3x3 one, and no renaming moves it"
        )
    began = time.perf_counter()
    image = source.preprocessing.normalise(parity.comparison_picture(picture, size))
    state = to_detectron2(source)
    stages = parity.compare(
        parity.reference_features(source.arch, source.tensors, image),
        parity.detectron2_features(source.arch, state, image),
    )
    if not max(stages.values()) <= MAX_RELATIVE_DIFFERENCE:
        listed = ", ".join(f"{stage} {value:.1e}" for stage, value in stages.items())
        raise UserError(
            f"{source.path}: Detectron2's features differ from the reference ({listed}; allowed "
            f"{MAX_RELATIVE_DIFFERENCE:.0e}); nothing was written. The weights were trained with "
            "another architecture or stride convention than the names say"
        )
    try:
        if to == "detectron2":
            counters = {
                detectron2_name(name): int(value) for name, value in source.counters.items()
            }
            weights.write_weights(out, state, counters)
            parity.check_written(source.arch, out, state)
        else:
            write_atomically(out, lambda file: torch.save(to_torchvision(source), file))
        # Read as a file of another project is read; every bit must be there.
        written = read_backbone(out, layout=to, assume=True)
        changed = [name for name, value in source.tensors.items()
                   if not same_bits(value, written.tensors[name])]  # fmt: skip
        changed += [name for name, value in source.counters.items()
                    if not torch.equal(value, written.counters.get(name, value + 1))]  # fmt: skip
        if changed or written.arch != source.arch:
            raise UserError(f"{out}: {[*changed, 'arch'][0]} changed on the way through the file")
    except UserError:
        out.unlink(missing_ok=True)
        raise
    card = cards.build(source, out, to, stages, time.perf_counter() - began)
    cards.write(out, card)
    return card


def _check_out(source: BackboneCheckpoint, out: Path, to: str) -> None:
    """Refuse a name that says something else, and one that would destroy something."""
    endings = _ENDINGS[to]
    if out.suffix not in endings:
        listed = " or ".join(f"{ending} ({what})" for ending, what in endings.items())
        raise UserError(f"{out}: end the name in {listed}")
    if out.resolve() == source.path.resolve():
        raise UserError(f"{out}: is the checkpoint itself; choose another name")
    for suffix in {".pkl", ".pth", ".pt"} - {out.suffix}:
        sibling = out.with_suffix(suffix)
        if sibling.is_file() and read_own_card(sibling)[0] is not None:
            raise UserError(
                f"{out}: its card would replace {out.with_suffix('.json').name}, which describes "
                f"{sibling.name}; choose another name"
            )
    cards.check_places(out)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two float32 tensors agree bit by bit; -0.0 and 0.0 do not."""
    return first.shape == second.shape and torch.equal(
        first.view(torch.int32), second.view(torch.int32)
    )
