"""What `python -m pretrain CONFIG --check` does: everything is made but nothing is trained."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from pretrain.config import PretrainConfig
from pretrain.data.shards import open_labelled, open_samples
from pretrain.engine import device as devices
from pretrain.engine.log import check_wandb
from pretrain.engine.optim import make_optimizer, peak_lr
from pretrain.model.joint_embedding import FAContrastive

_NUM_TIMED = 8  # pictures


def check(config: PretrainConfig, *, has_data: bool) -> dict[str, Any]:
    """Return what a run would make and need.

    Args:
        config: The whole config.
        has_data: Whether shards and probe are there already and are opened.
    Returns:
        `arch`, `pixel_mean` and `pixel_std` (0..255), `input_format` and `stride_in_1x1` of the
        backbone, `branches` of the checkpoint,
        `batch_size`, `epochs`, `num_samples` (None: not known), `seconds_per_sample` (of one
        sample in one epoch; from one small batch, so it says little more than the order of
        magnitude), `disk_bytes`.
    Raises:
        UserError: For anything that cannot work.
    """
    data, engine = config.data, config.engine
    check_wandb(config.tracking)
    num_samples = data.samples_per_epoch or None
    if has_data:
        samples = None if data.streaming or data.shards is None else open_samples(data.shards)
        num_samples = num_samples if samples is None else samples.num_samples
        if config.eval.probe_train and config.eval.probe_val:
            open_labelled({"eval.probe_train": config.eval.probe_train,
                           "eval.probe_val": config.eval.probe_val})  # fmt: skip

    # The model as it is trained, and one batch through its backbone.
    device = devices.choose_device(engine.device)
    # Processor time of one thread, so that other programs beside this one do not count.
    num_threads = engine.num_threads or torch.get_num_threads()
    torch.set_num_threads(1)
    model = FAContrastive(
        config.arch, config.heads, config.objective, config.fa, config.init.residual_gamma
    ).to(device)
    rate = peak_lr(config.optim, data.batch_size)
    is_fused = devices.uses_fused(engine.fused_optimizer, device)
    make_optimizer(model.online, config.optim, rate, is_fused=is_fused)
    dtype = devices.autocast_type(engine.precision, device)
    images = torch.randn(_NUM_TIMED, 3, data.image_size, data.image_size, device=device)
    started = 0.0
    for _ in range(2):  # the first warms up
        started = time.process_time()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model.online.backbone(images).float().square().mean()
        loss.backward()
        loss.item()
    seconds = (time.process_time() - started) / (num_threads if device.type == "cpu" else 1)

    # A checkpoint holds the model, its EMA, the momentum, and the queues.
    num_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    num_bytes += sum(4 * p.numel() for p in model.online.parameters())
    return {
        "arch": {k: v for k, v in dataclasses.asdict(config.arch).items() if k != "name"},
        "pixel_mean": [255 * value for value in data.pixel_mean],
        "pixel_std": [255 * value for value in data.pixel_std],
        "input_format": "RGB",
        "stride_in_1x1": False,  # torchvision's blocks
        "branches": ["online", "ema"] if config.objective.has_ema else ["online"],
        "batch_size": data.batch_size,
        "epochs": config.optim.epochs,
        "num_samples": num_samples,
        "seconds_per_sample": 2 * seconds / _NUM_TIMED,  # two views
        "disk_bytes": num_bytes * (2 + engine.keep_checkpoints),
    }
