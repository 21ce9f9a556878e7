"""Which device a process takes, and in which precision steps run there."""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor, nn

from common.errors import UserError, require
from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.model.joint_embedding import FAContrastive, OnlineNetwork


def prepare(model: FAContrastive, config: EngineConfig, device: torch.device) -> None:
    """Set up a fresh model, before there is an optimiser; names of weights stay as they are.

    Raises:
        UserError: If the device cannot do what is asked for.
    """
    if device.type == "cuda":
        # A setting of the process: fp32 products and convolutions may be rounded to TF32's 10 bits.
        # Neighbours are searched in exact fp32 in either case.
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32
    if config.batch_norm == "synchronised":
        require(
            device.type == "cuda" or not dist.is_on(),
            "engine.batch_norm=synchronised: torch has it for GPUs only; on a CPU use "
            "engine.batch_norm=per_process, or one process",
        )
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        model.online = cast(OnlineNetwork, convert(model.online))
        if model.ema is not None:
            model.ema = cast(OnlineNetwork, convert(model.ema))
    if config.activation_checkpointing:
        require(
            hasattr(model.online.backbone, "checkpoints_stages"),
            "engine.activation_checkpointing=true: this backbone has no stages; use false",
        )
        model.online.backbone.checkpoints_stages = True  # type: ignore[assignment]
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        for network in (model.online, model.ema):
            if network is not None:
                _compile(network.backbone)


def _compile(backbone: nn.Module) -> None:
    """Compile the forward pass in training; that of an evaluation stays as it is.

    The module itself is not wrapped: names of weights, hooks and DDP know nothing of it.
    """
    from torch._dynamo.exc import TorchDynamoException  # seconds, where nothing is compiled

    plain = backbone.forward
    compiled = torch.compile(plain, dynamic=False)

    def forward(images: Tensor) -> Tensor:
        if not backbone.training:
            return plain(images)
        try:
            return compiled(images)
        except TorchDynamoException as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"engine.compile=true: torch.compile failed ({lines[0][:200]}); it needs a C++ "
                "compiler, and Triton on a GPU. Use engine.compile=false"
            ) from error

    backbone.forward = forward  # type: ignore[method-assign]


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
