"""A run put together from its config: device, batches, model, optimiser, callbacks, trainer."""

from __future__ import annotations

from functools import partial

import torch

from pretrain import collectives as dist
from pretrain.config import PretrainConfig
from pretrain.data.input_pipeline import InputPipeline
from pretrain.engine import checkpoint, rendezvous, run_folder
from pretrain.engine import device as devices
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.collapse import CollapseAlarm
from pretrain.engine.contrastive_task import ContrastiveTask
from pretrain.engine.guards import HangTimer
from pretrain.engine.log import ProgressLog, check_wandb, open_log
from pretrain.engine.optim import make_optimizer, peak_lr
from pretrain.engine.run_folder import RunFolder
from pretrain.engine.stop import StopOnSignal
from pretrain.engine.trainer import Callback, Trainer
from pretrain.evaluation.online_probe import OnlineProbe
from pretrain.evaluation.pictures import RunPictures
from pretrain.evaluation.probe import KnnCallback, Probe
from pretrain.model.joint_embedding import FAContrastive


def make_trainer(
    config: PretrainConfig, *, resume: bool, allow_changes: bool = False
) -> Trainer[ContrastiveTask]:
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
    task = ContrastiveTask(config, model, optimizer, input_pipeline, folder, device)
    # What goes on beside the steps. The first process alone looks at the probe's sets.
    backbone, is_main = model.online.backbone, dist.rank() == 0
    log = ProgressLog("pretrain", partial(open_log, config, folder))
    checkpoints = Checkpoints(folder, engine, list(model.online.parameters()))
    online_probe = OnlineProbe.open(config.eval, input_pipeline.samples, backbone, device)
    probe = Probe.open(config.eval, config.data, device)
    # A step's row comes before its checkpoint: a killed run writes again only what comes after it.
    # The probe's row of an epoch comes before the last checkpoint, the pictures after it.
    callbacks: list[Callback | None] = [
        online_probe,
        log,
        CollapseAlarm(engine, log, checkpoints),
        StopOnSignal(log, checkpoints),
        KnnCallback(probe, online_probe, backbone, log) if is_main and probe else None,
        checkpoints,
        HangTimer(engine),
        RunPictures(config, folder, backbone, input_pipeline, probe) if is_main else None,
        RunFolder(folder, lock, config, input_pipeline.num_samples) if lock else None,
    ]
    present = [callback for callback in callbacks if callback is not None]
    trainer = Trainer(task, input_pipeline, present, config.optim.epochs, engine, device)
    if resume and (folder / checkpoint.NAME).exists():
        state, note = checkpoint.load_newest(folder)
        changes = trainer.load_state_dict(state, allow_changes=allow_changes)
        log.notes = [*([note] if note else []), *changes]
    return trainer
