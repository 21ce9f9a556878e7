"""Model FLOPs of a step, counted with fvcore, and how fast devices could do them.

What is counted: the multiply-adds of convolutions and matrix products in backbone, projector,
predictor and prototypes, two FLOPs each, as vendors count. Not counted: norms, activations,
pooling, loss, FA and its search, the optimiser, and whatever is computed twice (cached
micro-batches, activation checkpointing, attacks): *model* FLOPs, so that computing more does not
look like use.
"""

from __future__ import annotations

import contextlib
import copy
import re
import time
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.models.backbone import ResNet
from pretrain.models.contrastive import FAContrastive

NUM_VIEWS = 2
TRAINED = 3  # forward once, backward twice: gradients of inputs and of weights
_PRODUCTS = ("conv", "linear", "addmm", "matmul", "bmm", "einsum", "mv", "dot")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy that computes as its classes say: not compiled, nothing checkpointed.

    A compiled forward pass stands in the module itself and would lead back to the original.
    """
    copied = copy.deepcopy(module)
    for part in copied.modules():
        part.__dict__.pop("forward", None)
        if isinstance(part, ResNet):
            part.checkpoints_stages = False
    return copied


def forward_flops(module: nn.Module, *shape: int) -> int:
    """FLOPs of convolutions and matrix products in one forward pass, two per multiply-add.

    Args:
        module: Is copied to the CPU and run there once, in evaluation mode.
        shape: Of its input, the batch included.
    """
    with warnings.catch_warnings():  # fvcore scripts and traces, which newer torch discourages
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        example = plain_copy(module).cpu().float().eval()
        analysis = FlopCountAnalysis(example, torch.zeros(shape))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        counts = analysis.by_operator()  # multiply-adds
    return round(2 * sum(count for name, count in counts.items() if name in _PRODUCTS))


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per picture: forward passes of one view, and what a step makes of them.

    Attributes:
        backbone, projector, predictor, prototypes: One forward pass of one view; 0 where there is
            no such part.
        has_ema: Whether an EMA network makes the targets.
        num_predictions: Predictor passes per view.
    """

    backbone: int
    projector: int
    predictor: int
    prototypes: int
    has_ema: bool
    num_predictions: int = 1

    @property
    def per_picture(self) -> int:
        """Both views: online forward and backward (3x forward), EMA forward (1x)."""
        encoder = self.backbone + self.projector
        online = encoder + self.num_predictions * self.predictor + self.prototypes
        return NUM_VIEWS * (TRAINED * online + (encoder if self.has_ema else 0))


def model_flops(model: FAContrastive, image_size: int) -> ModelFlops:
    """Count a model at this size of the views, pixels."""
    online = model.online
    dim = _output_dim(online.projector)
    is_pre = model.cell.architecture == "pre"
    return ModelFlops(
        backbone=forward_flops(online.backbone, 1, 3, image_size, image_size),
        projector=forward_flops(online.projector, 1, online.backbone.output_dim),
        predictor=0 if online.predictor is None else forward_flops(online.predictor, 1, dim),
        prototypes=0 if online.prototypes is None else forward_flops(online.prototypes, 1, dim),
        has_ema=model.ema is not None,
        num_predictions=model.fa.num_features if is_pre else 1,
    )


def _output_dim(projector: nn.Module) -> int:
    """Width of z."""
    return [m.out_features for m in projector.modules() if isinstance(m, nn.Linear)][-1]


@dataclass(frozen=True)
class Ceiling:
    """The rate that utilisation is a share of.

    Attributes:
        flops_per_second: Dense.
        source: Which data sheet, or how it was measured.
        precision: fp32, tf32, bf16 or fp16.
        is_measured: Whether it was measured here; otherwise it is the vendor's.
    """

    flops_per_second: float
    source: str
    precision: str
    is_measured: bool


@dataclass(frozen=True)
class Accelerator:
    """Dense rates of a device in TFLOPS, matrix products with fp32 accumulation.

    Attributes:
        pattern: Regular expression on the name that CUDA tells; the first that fits counts.
        rates: By precision; fp32 without tensor cores.
        source: Where the figures stand. Where it gives them with sparsity, half of it is here.
    """

    pattern: str
    rates: dict[str, float]
    source: str


def _rates(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}


ACCELERATORS = (
    Accelerator(r"B200\b", _rates(2250, 1125, 75), "NVIDIA HGX B200 data sheet, one of 8 GPUs"),
    Accelerator(r"H200 NVL", _rates(835.5, 417.5, 60), "NVIDIA H200 data sheet, NVL"),
    Accelerator(r"H200\b", _rates(989.5, 494.5, 67), "NVIDIA H200 data sheet, SXM"),
    Accelerator(r"H100 NVL", _rates(835.5, 417.5, 60), "NVIDIA H100 data sheet, NVL"),
    Accelerator(r"H100 PCIe", _rates(756, 378, 51), "NVIDIA H100 data sheet, PCIe"),
    Accelerator(r"H100\b", _rates(989.5, 494.5, 67), "NVIDIA H100 data sheet, SXM"),
    Accelerator(r"A100\b", _rates(312, 156, 19.5), "NVIDIA A100 data sheet"),
    Accelerator(r"A40\b", _rates(149.7, 74.8, 37.4), "NVIDIA A40 data sheet"),
    Accelerator(r"A30\b", _rates(165, 82, 10.3), "NVIDIA A30 data sheet"),
    Accelerator(r"A10\b", _rates(125, 62.5, 31.2), "NVIDIA A10 data sheet"),
    Accelerator(r"L40S\b", _rates(362.05, 183, 91.6), "NVIDIA L40S data sheet"),
    Accelerator(r"L40\b", _rates(181.05, 90.5, 90.5), "NVIDIA L40 data sheet"),
    Accelerator(r"L4\b", _rates(121, 60, 30.3), "NVIDIA L4 data sheet"),
    Accelerator(
        r"RTX 4090\b(?! D| Laptop)", _rates(165.2, 82.6, 82.6),
        "NVIDIA Ada GPU architecture paper, fp16 with fp32 accumulation",
    ),
    Accelerator(
        r"RTX 3090\b(?! Ti)", _rates(71, 35.6, 35.6),
        "NVIDIA Ampere GA102 architecture paper, fp16 with fp32 accumulation",
    ),
    Accelerator(
        r"V100-SXM", {"fp16": 125, "fp32": 15.7}, "NVIDIA V100 data sheet, SXM2; no bf16, no tf32"
    ),
    Accelerator(
        r"V100-PCIE", {"fp16": 112, "fp32": 14}, "NVIDIA V100 data sheet, PCIe; no bf16, no tf32"
    ),
    Accelerator(r"\bT4\b", {"fp16": 65, "fp32": 8.1}, "NVIDIA T4 data sheet; no bf16, no tf32"),
)  # fmt: skip


def known_ceiling(device_name: str, precision: str) -> Ceiling | None:
    """The vendor's rate; None for a device or precision that the table does not have.

    A slice of a GPU (MIG) is not in it: its share differs from profile to profile.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for known in ACCELERATORS:
        if re.search(known.pattern, device_name):
            rate = known.rates.get(precision)
            return None if rate is None else Ceiling(rate * 1e12, known.source, precision, False)
    return None


def measured_ceiling(
    device: torch.device, precision: str, *, size: int = 0, seconds: float = 0.5
) -> Ceiling:
    """The rate of a large square matrix product: the best of its repeats, with torch's threads.

    One thread of a CPU is timed by its processor time, which other work disturbs little.

    Args:
        device: Where.
        precision: fp32, tf32 (of a GPU), bf16 or fp16.
        size: Rows and columns; 0: 8192 on a GPU, 2048 on a CPU.
        seconds: How long to repeat it, at least three times.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        times = _times_of(a, b, seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    rate = 2 * size**3 / min(times)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    source = f"measured: {size} x {size} matrix product{threads}"
    return Ceiling(rate, source, precision, True)


def _times_of(a: torch.Tensor, b: torch.Tensor, seconds: float) -> list[float]:
    is_alone = a.device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if is_alone else time.perf_counter
    out, times = a @ b, []
    end = now() + seconds
    while len(times) < 3 or now() < end:
        _wait(a.device)
        start = now()
        torch.mm(a, b, out=out)
        _wait(a.device)
        times.append(now() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device, precision: str) -> Ceiling:
    """The vendor's rate of a known GPU, otherwise what is measured here and now."""
    known = None
    if device.type == "cuda":
        known = known_ceiling(torch.cuda.get_device_name(device), precision)
    return known or measured_ceiling(device, precision)


def precision_of(autocast: contextlib.AbstractContextManager, device: torch.device) -> str:
    """In what convolutions run inside this context: fp32, tf32, bf16 or fp16."""
    with autocast:
        if torch.is_autocast_enabled(device.type):
            return _NAMES[torch.get_autocast_dtype(device.type)]
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        major, _ = torch.cuda.get_device_capability(device)
        return "tf32" if major >= 8 else "fp32"
    return "fp32"
