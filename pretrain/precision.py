"""In which precision a run computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from common.lazy import torch


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None: there is none, all is fp32.

    ``auto`` takes bf16 where the hardware computes in it. On a CPU without AVX512-BF16 or AMX it is
    emulated, and slower than fp32.
    """
    if precision == "fp16":
        return torch.float16
    is_bf16 = precision == "bf16"
    if precision == "auto" and device.type == "cuda":
        is_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "auto":
        is_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_bf16 else None


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in fp32: neither autocast nor TF32."""
    before = torch.get_float32_matmul_precision()
    is_rounded = before != "highest"  # setting what is set would make torch.compile start anew
    if is_rounded:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if is_rounded:
            torch.set_float32_matmul_precision(before)
