"""A detector in forms that other programs run: TorchScript, ONNX, plain Detectron2.

Every form is compared with the detector on pictures before a file is written, from the bytes that
are written.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import build_model
from torch import Tensor, nn
from tqdm import tqdm

from common import provenance
from common.backbone import BackboneCheckpoint
from common.errors import UserError
from common.files import read_record_or_none, write_bytes, write_json, write_text
from common.network import ResNet
from detection.convert import comparison_picture
from detection.predict import Detector
from detection.training.config import describe, dump_config

TOLERANCE = 1e-3  # of scores, of boxes in pixels, of features relative to the largest
NUM_PICTURES = 20
CARD = "fa-export-1"
ENDINGS = {"torchscript": (".pt", ".ts"), "onnx": (".onnx",), "detectron2": (".pth",)}
_OPSET = 17
_NAMES = ("boxes", "scores", "labels")

# Detectron2 makes these at run time.
# pyright: reportAttributeAccessIssue=false
Run = Callable[[Tensor], tuple[Tensor, ...]]


class TraceableDetector(nn.Module):
    """One picture to boxes, in tensors alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._detect: Callable[..., Any] = model.inference  # pyright: ignore[reportAssignmentType]
        self.eval()  # itself too: the ONNX exporter gives all modules the mode of the outermost

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            image: float32 (3, h, w), 0..255, in the detector's order of colours.

        Returns:
            Boxes (n, 4) in pixels of this picture, scores (n,), classes (n,) int64.
        """
        (found,) = self._detect([{"image": image}], do_postprocess=False)
        found = found[found.pred_boxes.nonempty()]  # as after Detectron2's own rescaling
        return found.pred_boxes.tensor, found.scores, found.pred_classes


class TraceableBackbone(nn.Module):
    """Pictures to features; the normalisation is in it."""

    def __init__(self, source: BackboneCheckpoint) -> None:
        super().__init__()
        self.network = ResNet(source.arch)
        self.network.load_state_dict(source.tensors, strict=False)  # counters are left out
        pixels = source.preprocessing
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (pixels.mean, pixels.std))
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features.

        Args:
            image: float32 (n, 3, h, w), RGB, 0..1.

        Returns:
            Mean features (n, c), and res5 (n, c, h / 32, w / 32).
        """
        res5 = self.network.stages((image - self.mean) / self.std)["res5"]
        return res5.mean(dim=(2, 3)), res5


def comparison_pictures() -> list[np.ndarray]:
    """Pictures of different sizes, uint8 [h, w, 3]."""
    whole, generator = comparison_picture(640).numpy(), np.random.default_rng(0)
    found = []
    for number in range(NUM_PICTURES):
        height, width = generator.integers(240, 640, 2)
        found.append(np.roll(whole, 61 * number, axis=1)[:height, :width].copy())
    return found


def export_detector(
    detector: Detector, out: Path, to: str, images: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write a detector, and a card beside it (OUT.json).

    Args:
        detector: On the CPU.
        out: File; see ENDINGS.
        to: "torchscript", "onnx" or "detectron2" (OUT.pth and OUT.yaml, without our code).
        images: To compare on, uint8 [h, w, 3], RGB.

    Returns:
        The card.

    Raises:
        UserError: If a package is missing, the form cannot express the detector, no picture has a
            box, or a box differs by more than TOLERANCE; then nothing is written.
    """
    check_out(out, to)
    examples = [detector.example(image)["image"].float() for image in images]
    reference = TraceableDetector(detector.model)
    config = None
    if to == "detectron2":
        cfg, state = plain_detectron2(detector)
        plain = build_model(cfg)
        plain.load_state_dict(state)
        config = dump_config(cfg)[0]
        content = {"model": state, "detector": describe(cfg, detector.classes)}
        data = _saved(lambda file: torch.save(content, file))
        run: Run = TraceableDetector(plain)
    else:
        axes = {"image": {1: "height", 2: "width"}, **{name: {0: "n"} for name in _NAMES}}
        data, run = _traced(reference, examples[0], to, axes)
    num_boxes, worst = 0, 0.0
    with torch.no_grad():
        for example in tqdm(examples, "comparing", unit=" pictures", disable=None):
            found = reference(example)
            num_boxes += len(found[0])
            worst = max(worst, difference(found, run(example), detector.lowest_score))
    if num_boxes == 0:
        raise UserError(
            f"the detector finds nothing on the {len(images)} pictures, so that nothing can be "
            "compared; give some with its objects by --pictures; nothing was written"
        )
    cfg = detector.cfg
    sizes = {"min": cfg.INPUT.MIN_SIZE_TEST, "max": cfg.INPUT.MAX_SIZE_TEST}
    return _write(
        out, to, data, worst, len(images), config,
        classes=list(detector.classes),
        input={"image": "float32 (3, h, w), 0..255", "order": cfg.INPUT.FORMAT, "resize": sizes},
        output={"boxes": "(n, 4) x0, y0, x1, y1 in pixels of the input", "scores": "(n,)",
                "labels": "(n,) places of the classes"},
        num_boxes=num_boxes,
    )  # fmt: skip


def export_backbone(source: BackboneCheckpoint, out: Path, to: str) -> dict[str, Any]:
    """Write a backbone as TorchScript or ONNX, and a card beside it; see `export_detector`."""
    check_out(out, to)
    network = TraceableBackbone(source)
    examples = [
        torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in comparison_pictures()
    ]
    places = {0: "n", 2: "height", 3: "width"}
    axes = {"image": places, "features": {0: "n"}, "res5": places}
    data, run = _traced(network, examples[0], to, axes)
    worst = 0.0
    with torch.no_grad():
        pairs = torch.cat([examples[0], examples[0].flip(3)])
        for example in tqdm((*examples, pairs), "comparing", unit=" pictures", disable=None):
            for own, other in zip(network(example), run(example), strict=True):
                worst = max(worst, float((own - other).abs().max() / own.abs().max()))
    return _write(
        out, to, data, worst, len(examples) + 1,
        input={"image": "float32 (n, 3, h, w), RGB, 0..1; it is normalised inside"},
        output={"features": "(n, c), the mean of res5", "res5": "(n, c, h / 32, w / 32)"},
    )  # fmt: skip


def _traced(
    network: nn.Module, example: Tensor, to: str, axes: dict[str, dict[int, str]]
) -> tuple[bytes, Run]:
    """A network's bytes in a form, and what these bytes compute."""
    with torch.no_grad(), patch_builtin_len(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about branches, which the comparison judges
        if to == "torchscript":
            traced = torch.jit.trace(network, (example,), check_trace=False)
            data = _saved(lambda file: torch.jit.save(traced, file))
            return data, torch.jit.load(io.BytesIO(data))
        missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
        if missing:
            raise UserError(
                f"--to onnx: needs {' and '.join(missing)}; install it with "
                f"`.venv/bin/python -m pip install {' '.join(missing)}`"
            )
        first, *others = axes
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            torch.onnx.export(
                network, (example,), file, input_names=[first], output_names=others,
                dynamic_axes=axes, opset_version=_OPSET, dynamo=False,
            )  # fmt: skip
            data = file.read_bytes()
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {first: image.numpy()})))

    return data, run


def _saved(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def difference(own: Sequence[Tensor], other: Sequence[Tensor], lowest_score: float) -> float:
    """The largest difference between two sets of boxes, scores and classes of one picture.

    A box is compared with the nearest one of its class. One that has no partner counts as infinity,
    unless its score is within TOLERANCE of the threshold, where it may be left out.
    """
    rows = [torch.cat([boxes, scores[:, None]], dim=1) for boxes, scores, _ in (own, other)]
    worst, free = 0.0, set(range(len(rows[1])))
    near_threshold = lowest_score + TOLERANCE
    for row, label in zip(rows[0], own[2].tolist(), strict=True):
        distances = {
            place: float((row - rows[1][place]).abs().max())
            for place in free
            if other[2][place] == label
        }
        best = min(distances, key=lambda place: distances[place], default=None)
        if best is None or (distances[best] > TOLERANCE and row[4] < near_threshold):
            worst = worst if row[4] < near_threshold else float("inf")
            continue
        free.remove(best)
        worst = max(worst, distances[best])
    return worst if all(rows[1][place, 4] < near_threshold for place in free) else float("inf")


def check_out(out: Path, to: str) -> None:
    """Refuse a name that says another form, and one whose card would replace another file's.

    Raises:
        UserError: Naming the endings, or the file.
    """
    if out.suffix not in ENDINGS[to]:
        raise UserError(f"{out}: for --to {to} end the name in {' or '.join(ENDINGS[to])}")
    card = read_record_or_none(out.with_suffix(".json")) or {}
    is_own = card.get("format") == CARD and card.get("file") == out.name  # it is made anew
    for file in map(out.with_suffix, [".json"] + [".yaml"] * (to == "detectron2")):
        if file.exists() and not is_own:
            raise UserError(f"{out}: {file.name} exists and is not of it; choose another name")


def _write(
    out: Path, to: str, data: bytes, worst: float, num_pictures: int, config: str | None = None,
    **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write a form, its config and its card, unless it computes something else."""
    if not worst <= TOLERANCE:
        raise UserError(
            f"{out}: this form's results differ by {worst:.1e} (allowed {TOLERANCE:.0e}); nothing "
            "was written; use another form"
        )
    write_bytes(out, data)
    if config is not None:
        write_text(out.with_suffix(".yaml"), config)
    card = {"format": CARD, "file": out.name, "to": to, **facts}
    card |= {"largest_difference": worst, "num_pictures": num_pictures}
    card["versions"] = provenance.versions()
    write_json(out.with_suffix(".json"), card)
    return card


# -- plain Detectron2 ------------------------------------------------------------------------------


def plain_detectron2(detector: Detector) -> tuple[CfgNode, dict[str, Tensor]]:
    """Config and tensors of a detector that Detectron2 builds without our code.

    The norm behind res5 scales and shifts each channel, the mean over the ROI comes next, then two
    linear layers: the norm is folded into these, which changes nothing but rounding.

    Raises:
        UserError: If the C4 head has basic blocks (ResNet-18/34), which Detectron2's has not, or a
            norm behind res5 that is no batch norm.
    """
    cfg, state = detector.cfg.clone(), dict(detector.model.state_dict())
    cfg.defrost()
    if cfg.MODEL.ROI_HEADS.NAME != "Res5ROIHeadsExtraNorm":
        return cfg, state
    depth = cfg.MODEL.RESNETS.DEPTH
    if depth < 50:
        raise UserError(
            f"a C4 detector of ResNet-{depth} has a head of basic blocks, which Detectron2 does "
            "not build: import detection.training.heads in your program, or train a pyramid (*_FPN)"
        )
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    prefix = "roi_heads.res5.norm."
    norm = {name.removeprefix(prefix): state.pop(name) for name in list(state)
            if name.startswith(prefix)}  # fmt: skip
    if not norm:
        return cfg, state
    if "running_var" not in norm:
        raise UserError(f"MODEL.RESNETS.NORM {cfg.MODEL.RESNETS.NORM}: cannot be folded; give BN")
    eps = detector.model.roi_heads.res5.norm.eps
    scale = norm["weight"] / (norm["running_var"] + eps).sqrt()
    shift = norm["bias"] - norm["running_mean"] * scale
    for layer in ("cls_score", "bbox_pred"):
        weight, bias = (f"roi_heads.box_predictor.{layer}.{name}" for name in ("weight", "bias"))
        state[bias] = state[bias] + state[weight] @ shift
        state[weight] = state[weight] * scale
    return cfg, state
