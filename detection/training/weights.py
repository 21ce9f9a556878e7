"""Loading pretrained weights into a detector: every backbone tensor, or an error.

Detectron2's checkpointer warns and goes on when names or shapes do not match; a run would then
compare random with random. Here its own matching is used and its outcome is checked.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn

from common import checkpoints
from common.backbone import read_own_card
from common.errors import UserError, require
from common.files import is_number, write_atomically, write_text
from common.resnet import D2_CARD, read_arch
from detection.training.config import arch_of_config

_CONVERT = "convert the checkpoint with tools/convert_to_d2.py"
_BACKBONE_PREFIXES = ("backbone.stem.", "backbone.res", "backbone.bottom_up.", "roi_heads.res5.")


class _ImagesToBackbone(nn.Module):
    """A detector's way from pictures to feature maps."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.get_submodule("backbone")
        self._preprocess: Callable[[Any], Any] = getattr(detector, "preprocess_image")  # noqa: B009

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Normalise and pad the pictures, then run the backbone."""
        return self.backbone(self._preprocess(batch).tensor)


def calibrate_frozen_norms(
    detector: nn.Module, batches: Iterable[list[dict[str, Any]]], num_batches: int
) -> int:
    """Replace the statistics of every frozen batch norm in the backbone.

    Args:
        detector: A GeneralizedRCNN; changed in place, its training mode is kept.
        batches: Training batches.
        num_batches: How many of them are read.

    Returns:
        Number of norms calibrated (0: nothing is frozen).
    """
    path = _ImagesToBackbone(detector)
    frozen = {
        name: module
        for name, module in path.backbone.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
    }
    if not frozen or num_batches < 1:
        return 0
    was_training = {module: module.training for module in path.modules()}
    path.eval()
    # Each frozen norm gives its place to a batch norm in training mode, is measured, comes back.
    measured = {}
    for name, module in frozen.items():
        scale = module.get_buffer("weight")
        norm = nn.BatchNorm2d(module.num_features, eps=module.eps, device=scale.device)
        norm.weight.data.copy_(scale)
        norm.bias.data.copy_(module.get_buffer("bias"))
        measured[name] = norm.train()
        path.backbone.set_submodule(name, measured[name])
    with torch.no_grad():
        update_bn_stats(path, batches, num_batches)
    for name, module in frozen.items():
        for field in ("running_mean", "running_var"):
            module.get_buffer(field).copy_(measured[name].get_buffer(field))
        path.backbone.set_submodule(name, module)
    for module, training in was_training.items():
        module.training = training
    return len(frozen)


class RunCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with files that are whole or absent, read without running code.

    `description` is written into every file: what `detection.predict.load_detector` needs.
    """

    description: dict[str, Any] | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write NAME.pth and then the pointer to it, each by rename."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        if self.description is not None:
            data["detector"] = self.description
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        write_atomically(Path(self.save_dir) / f"{name}.pth", lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point last_checkpoint at a file."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _torch_load(self, f: str) -> Any:
        content = checkpoints.read(f)
        if not isinstance(content, dict):
            raise UserError(f"{f}: holds a {type(content).__name__}, no weights; {_CONVERT}")
        return content

    def _load_file(self, filename: str) -> Any:
        loaded = super()._load_file(filename)
        checkpoints.check_finite(loaded["model"], filename)
        return loaded


class WeightsCheckpointer(RunCheckpointer):
    """Loads a converted backbone; a tensor that matches none of the detector's is an error."""

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        num_given = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        needed = backbone_tensor_names(self.model)
        missing = sorted(needed & set(incompatible.missing_keys))
        unexpected = sorted(incompatible.unexpected_keys)
        wrong_shape = [
            f"{name} {tuple(shape)} instead of {tuple(own)}"
            for name, shape, own in incompatible.incorrect_shapes
        ]
        if missing or unexpected or wrong_shape:
            loaded = len(needed) - len(missing) - len(wrong_shape)
            raise UserError(
                f"only {loaded} of the detector's {len(needed)} backbone tensors match the "
                f"{num_given} in the file{_listed('missing', missing)}"
                f"{_listed('not in the detector', unexpected)}"
                f"{_listed('wrong shape', wrong_shape)}; use the config of the backbone's depth "
                f"and width, and {_CONVERT}"
            )
        return incompatible


def backbone_tensor_names(model: nn.Module) -> set[str]:
    """Names of the detector's tensors that a pretrained ResNet must fill.

    Left out: counters of batch norms, the FPN's own layers, and the extra norm after res5.
    """
    return {
        name
        for name in model.state_dict()
        if name.startswith(_BACKBONE_PREFIXES)
        and not name.endswith("num_batches_tracked")
        and not name.startswith("roi_heads.res5.norm.")
    }


def load_backbone(model: nn.Module, path: Path) -> int:
    """Load a converted backbone into a detector (or a module with a `backbone`).

    Args:
        model: Detector; its ResNet tensors are overwritten.
        path: `.pkl` or `.pth` as tools/convert_to_d2.py writes it.

    Returns:
        Number of tensors loaded.

    Raises:
        UserError: If the file is unreadable or a single tensor does not match.
    """
    path = Path(path).resolve()
    is_known = path.suffix in (".pkl", ".pth")
    require(is_known, f"{path}: weights end in .pkl or .pth; {_CONVERT}")
    require(path.is_file(), f"{path}: no such weights; {_CONVERT}")
    query = "?matching_heuristics=True" if path.suffix == ".pth" else ""
    try:
        WeightsCheckpointer(model).load(f"{path}{query}", checkpointables=[])
    except UserError as error:
        is_named = str(error).startswith(f"{path}: ")
        raise UserError(f"{'' if is_named else f'{path}: '}{error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not a Detectron2 weight file ({error}); {_CONVERT}") from error
    return len(backbone_tensor_names(model))


def check_card(weights: Path, cfg: CfgNode) -> dict[str, Any]:
    """Compare the card beside the weights (OUT.json) with a detection config.

    Args:
        weights: The weight file.
        cfg: Its INPUT.FORMAT, MODEL.PIXEL_MEAN / PIXEL_STD and MODEL.RESNETS are compared.

    Returns:
        The card.

    Raises:
        UserError: If there is no card, the weights are not the ones it describes, or the config
            would use other pixels or another architecture.
    """
    require(weights.is_file(), f"{weights}: no such weights; {_CONVERT}, or say `random`")
    card, fault = read_own_card(weights)
    if card is None or card["format"] != D2_CARD:
        name = weights.with_suffix(".json").name
        raise UserError(
            f"{weights}: {fault or f'has no preprocessing card {name} beside it'}, so its pixel "
            f"statistics cannot be checked; {_CONVERT}, or trust the config with --no-card"
        )
    pixels = card["preprocessing"]
    missing = {"input_format", "pixel_mean", "pixel_std", "stride_in_1x1"} - pixels.keys()
    if missing:
        raise UserError(f"{weights}: its card lacks {', '.join(sorted(missing))}; {_CONVERT} again")
    arch, own = read_arch(card["arch"]), arch_of_config(cfg)
    faults = [] if arch == own else [f"the weights are a {arch}, the config builds a {own}"]
    if pixels["input_format"] != cfg.INPUT.FORMAT:
        faults.append(f"INPUT.FORMAT must be {pixels['input_format']!r}, not {cfg.INPUT.FORMAT!r}")
    for key, field in (("PIXEL_MEAN", "pixel_mean"), ("PIXEL_STD", "pixel_std")):
        values = [float(value) for value in cfg.MODEL[key]]
        stated = pixels[field]
        if not isinstance(stated, list) or len(stated) != 3 or not all(map(is_number, stated)):
            raise UserError(f"{weights}: its card says no three numbers in {field}; {_CONVERT}")
        if max(abs(a - b) for a, b in zip(values, stated, strict=True)) > 0.01:
            faults.append(f"MODEL.{key} must be {pixels[field]}, not {values}")
    if pixels["stride_in_1x1"] != cfg.MODEL.RESNETS.STRIDE_IN_1X1 and arch.depth >= 50:
        faults.append(
            f"MODEL.RESNETS.STRIDE_IN_1X1 must be {pixels['stride_in_1x1']}: the "
            "shapes fit either way, the features do not"
        )
    require(not faults, f"{weights}: does not fit the config: {'; '.join(faults)}")
    return card


def _listed(title: str, names: list[str]) -> str:
    """Name at most four of them, as in "; missing 3: a, b, c"."""
    if not names:
        return ""
    more = ", .." if len(names) > 4 else ""
    return f"; {title} {len(names)}: {', '.join(names[:4])}{more}"


def write_weights(path: Path, state: dict[str, Tensor], counters: dict[str, int]) -> None:
    """Write tensors under Detectron2's plain names, atomically; same tensors, same bytes.

    The norms' batch counters lie beside the model: a detector's frozen norms have none,
    and a tensor that matches nothing is an error when weights are loaded.

    A `.pkl` carries numpy arrays and requests name matching; Detectron2 takes one without
    `__author__` for a Caffe2 file, and without `matching_heuristics` loads none of its weights.
    A `.pth` carries tensors only; the request goes behind its path (`?matching_heuristics=True`).
    """
    if path.suffix == ".pkl":
        data = {
            "model": {name: value.numpy() for name, value in state.items()},
            "num_batches_tracked": counters,
            "__author__": "feature-augmented pretraining",
            "matching_heuristics": True,
        }
        write_atomically(path, lambda file: pickle.dump(data, file, protocol=4))
    else:
        data = {"model": dict(state), "num_batches_tracked": counters}
        write_atomically(path, lambda file: torch.save(data, file))
