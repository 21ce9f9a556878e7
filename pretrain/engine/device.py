"""Which device a process takes, and in which precision steps run there."""

from __future__ import annotations

import os

import torch

from common.errors import UserError


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Under torchrun each process of a machine takes the GPU of its own number.

    Raises:
        UserError: If ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but torch sees no GPU; use engine.device=auto or cpu")
    is_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", number) if is_cuda else torch.device("cpu")


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None: there is none, all is fp32."""
    if precision == "fp16":
        return torch.float16
    return torch.bfloat16 if uses_bf16(precision, device) else None


def uses_fused(wanted: bool | str, device: torch.device) -> bool:
    """Whether the optimiser is one kernel; ``auto``: on a GPU, so that a CPU's rounding stays."""
    return device.type == "cuda" if wanted == "auto" else bool(wanted)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether steps run under bf16 autocast; ``auto`` does so where the hardware computes in bf16.

    On a CPU without AVX512-BF16 or AMX bf16 is emulated and slower than fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
