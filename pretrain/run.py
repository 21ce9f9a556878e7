"""A run put together from its config: device, batches, model, optimiser, callbacks, trainer."""

from __future__ import annotations

import torch

from pretrain import collectives as dist
from pretrain.config import PretrainConfig
from pretrain.data.input_pipeline import InputPipeline
from pretrain.engine import checkpoint, rendezvous, run_folder
from pretrain.engine import device as devices
from pretrain.engine.log import check_wandb
from pretrain.engine.optim import make_optimizer, peak_lr
from pretrain.engine.trainer import Callback, Trainer
from pretrain.evaluation.online_probe import OnlineProbe
from pretrain.evaluation.pictures import RunPictures
from pretrain.evaluation.probe import KnnCallback, Probe
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.method_spec import refuse_without_gradient


def make_trainer(config: PretrainConfig, *, resume: bool, allow_changes: bool = False) -> Trainer:
    """A run that stands before its first step, or where its checkpoint left it.

    Args:
        config: The whole config; each part receives its own slice.
        resume: Continue from ``out/checkpoint.pth`` if there is one.
        allow_changes: Continue even with another config or other shards, where the weights fit.

    Raises:
        UserError: Anything in config, shards or checkpoint that cannot work, before any step.
    """
    engine = config.engine
    check_wandb(config.tracking)
    device = devices.choose_device(engine.device)
    rendezvous.start(device.type)
    if engine.num_threads:
        torch.set_num_threads(engine.num_threads)
    folder = run_folder.prepare(config, resume=resume)
    lock = run_folder.hold(folder) if dist.rank() == 0 else None
    input_pipeline = InputPipeline(
        config.data,
        seed=config.seed,
        device=device,
        channels_last=engine.channels_last,
        folder=folder,
    )
    # The model and its optimiser.
    refuse_without_gradient(config.objective, config.fa)
    torch.manual_seed(config.seed)
    model = FAContrastive(
        config.arch, config.heads, config.objective, config.fa, config.init.residual_gamma
    )
    devices.prepare(model, engine, device)
    optimizer = make_optimizer(
        model.online,
        config.optim,
        peak_lr(config.optim, config.data.batch_size),
        is_fused=devices.uses_fused(engine.fused_optimizer, device),
    )
    # What goes on beside the steps. The first process alone looks at the probe's sets.
    callbacks: list[Callback] = []
    online_probe = OnlineProbe.open(
        config.eval, input_pipeline.samples, model.online.backbone, device
    )
    if online_probe is not None:
        callbacks.append(online_probe)
    probe = Probe.open(config.eval, config.data, device)
    if dist.rank() == 0:
        if probe is not None:
            callbacks.append(KnnCallback(probe, online_probe))
        callbacks.append(RunPictures(probe))
    trainer = Trainer(config, folder, lock, device, input_pipeline, model, optimizer, callbacks)
    if resume and (folder / checkpoint.NAME).exists():
        trainer.restore(allow_changes=allow_changes)
    return trainer
