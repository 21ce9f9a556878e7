"""Options of the engine that make a step faster or smaller, set up once before the first step."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from common.errors import UserError, require
from pretrain import collectives as dist
from pretrain.config import EngineConfig
from pretrain.model.backbone import ResNet
from pretrain.model.joint_embedding import FAContrastive, OnlineNetwork


def choose_products(*, tf32: bool, device: torch.device) -> None:
    """Whether fp32 products and convolutions of a GPU may be rounded to TF32's 10 bits.

    It is a setting of the process. Neighbours are searched in exact fp32 in either case.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


def prepare(model: FAContrastive, config: EngineConfig, device: torch.device) -> None:
    """Set up a fresh model, before there is an optimiser; names of weights stay as they are.

    Raises:
        UserError: If the device cannot do what is asked for.
    """
    choose_products(tf32=config.tf32, device=device)
    if config.batch_norm == "synchronised":
        _synchronise_batch_norm(model, device)
    model.online.backbone.checkpoints_stages = config.activation_checkpointing
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        for network in (model.online, model.ema):
            if network is not None:
                _compile(network.backbone)


def _compile(backbone: ResNet) -> None:
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


def _synchronise_batch_norm(model: FAContrastive, device: torch.device) -> None:
    """Statistics of the rows of all processes, in the online and in the EMA network."""
    require(
        device.type == "cuda" or not dist.is_on(),
        "engine.batch_norm=synchronised: torch has it for GPUs only; on a CPU use "
        "engine.batch_norm=per_process, or one process",
    )
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model.online = cast(OnlineNetwork, convert(model.online))
    if model.ema is not None:
        model.ema = cast(OnlineNetwork, convert(model.ema))
