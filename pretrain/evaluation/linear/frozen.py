"""The network whose features are looked at: our checkpoints, torchvision's layout, or random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common import checkpoints
from common.errors import UserError
from common.files import sha256_of
from common.resnet import Arch, infer_arch
from pretrain.engine import checkpoint
from pretrain.model.backbone import ResNet

Branch = Literal["online", "ema"]
RANDOM = "random:"
NAMED = {
    "R18": Arch(18, 64, 64, 64),
    "R34": Arch(34, 64, 64, 64),
    "R50": Arch(50, 64, 64, 256),
    "R101": Arch(101, 64, 64, 256),
    "thin_R50": Arch(50, 16, 16, 64),
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision uses them
_DEFAULT_SIZE = 224  # pixels
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Frozen:
    """A backbone in eval mode whose parameters take no gradient.

    Attributes:
        backbone: Pictures to pooled features.
        name: What the user called it, without folders.
        kind: "checkpoint", "torchvision" or "random".
        branch: Of a checkpoint of ours.
        weights_hash: Of names and values of its tensors: what features depend on.
        file_sha256: Of the file; None for random weights.
        image_size: Side of the pictures in pretraining, pixels; 224 where that is not known.
        mean: Of the normalisation, RGB, 0..1.
        std: Of the normalisation.
    """

    backbone: ResNet
    name: str
    kind: Literal["checkpoint", "torchvision", "random"]
    branch: Branch | None
    weights_hash: str
    file_sha256: str | None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def description(self) -> dict[str, Any]:
        """For the result: plain types."""
        return {
            "name": self.name,
            "kind": self.kind,
            "branch": self.branch,
            "arch": asdict(self.backbone.arch),
            "weights_hash": self.weights_hash,
            "file_sha256": self.file_sha256,
        }


def load(source: str, *, branch: Branch, seed: int) -> Frozen:
    """The network of a file, or one with random weights.

    Args:
        source: A checkpoint of ours, a file with a torchvision-style state dict, or ``random:``
            with R18, R34, R50, R101, thin_R50 or a checkpoint of ours whose architecture is taken.
        branch: Which network of a checkpoint of ours.
        seed: Of random weights.
    Raises:
        UserError: File missing or damaged, no such branch, or an architecture that is not here.
    """
    if source.startswith(RANDOM):
        return _random(source, seed)
    path = Path(source)
    state = checkpoints.read(path)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: holds no state dict; give a checkpoint")
    if state.get("format") == checkpoints.FORMAT:
        return _ours(checkpoint.load(path), path, branch)
    if branch != "online":
        raise UserError(f"--branch {branch}: {path} is no checkpoint of ours and has one network")
    return _torchvision(state, path)


def _frozen(backbone: ResNet, **options: Any) -> Frozen:
    backbone.eval().requires_grad_(False)
    weights = {k: v for k, v in backbone.state_dict().items() if not k.endswith(_COUNTER)}
    return Frozen(backbone, weights_hash=checkpoints.checksum(weights), **options)


def _random(source: str, seed: int) -> Frozen:
    name = source.removeprefix(RANDOM)
    like: dict[str, Any] = {"image_size": _DEFAULT_SIZE, "mean": _MEAN, "std": _STD}
    if name in NAMED:
        arch = NAMED[name]
    elif Path(name).is_file():
        state = checkpoint.load(Path(name))
        arch, like, name = Arch(**state["arch"]), _look(state), Path(name).name
    else:
        raise UserError(f"{source}: give random: with {', '.join(NAMED)}, or with a checkpoint")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ResNet(arch)
    return _frozen(
        backbone, name=f"{RANDOM}{name}", kind="random", branch=None, file_sha256=None, **like
    )


def _look(state: dict[str, Any]) -> dict[str, Any]:
    """How the network of a checkpoint of ours looks at pictures."""
    preprocessing, data = state["preprocessing"], state["config"]["data"]
    return {
        "image_size": int(data["image_size"]),
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
    }


def _ours(state: dict[str, Any], path: Path, branch: Branch) -> Frozen:
    weights = state["model" if branch == "online" else "ema"]
    if weights is None:
        raise UserError(
            f"--branch ema: {path} has no EMA network (objective {_objective(state)}); use online"
        )
    prefix = "backbone."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    backbone = ResNet(Arch(**state["arch"]))
    _fill(backbone, own, path)
    return _frozen(
        backbone, name=path.name, kind="checkpoint", branch=branch, file_sha256=sha256_of(path),
        **_look(state),
    )  # fmt: skip


def _objective(state: dict[str, Any]) -> str:
    return str(state["config"]["objective"]["name"])


def _torchvision(state: Mapping[str, Any], path: Path) -> Frozen:
    try:
        state = checkpoints.named(checkpoints.nested(state, checkpoints.WRAPPERS) or state)
        weights = {
            key: torch.as_tensor(value)
            for key, value in state.items()
            if isinstance(value, Tensor | np.ndarray) and not key.startswith("fc.")
        }
        arch = infer_arch({name: tuple(value.shape) for name, value in weights.items()})
    except (UserError, TypeError) as error:
        raise UserError(
            f"{path}: {error}. Give a checkpoint of tools/pretrain.sh or a state dict with "
            "torchvision's names"
        ) from None
    backbone = ResNet(arch)
    _fill(backbone, weights, path)
    return _frozen(
        backbone, name=path.name, kind="torchvision", branch=None, file_sha256=sha256_of(path),
        image_size=_DEFAULT_SIZE, mean=_MEAN, std=_STD,
    )  # fmt: skip


def _fill(backbone: ResNet, weights: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor of the backbone, and no other; batch counters may be missing.

    Raises:
        UserError: Naming the first tensors that do not fit.
    """
    own = backbone.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in weights and not k.endswith(_COUNTER)]
    wrong += [f"{k} is not known" for k in weights if k not in own]
    wrong += [
        f"{k} is {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    if wrong:
        raise UserError(
            f"{path}: another architecture than ResNet-{backbone.arch.depth}: {wrong[0]} "
            f"({len(wrong)} tensors do not fit)"
        )
    backbone.load_state_dict({**own, **weights})
