"""A run put together from its config: device, batches, model, optimiser, callbacks, trainer."""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.errors import UserError, require
from common.files import is_whole
from common.threads import choose_threads
from pretrain import collectives as dist
from pretrain.config import PretrainConfig
from pretrain.data.input_pipeline import BAD_SAMPLES, InputPipeline
from pretrain.engine import checkpoint, run_folder
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.contrastive_task import ContrastiveTask
from pretrain.engine.guards import CollapseAlarm, HangTimer, StopOnSignal
from pretrain.engine.optim import make_optimizer, peak_lr, state_bytes
from pretrain.engine.run_folder import ProgressLog, RunFolder, check_wandb, open_log
from pretrain.engine.trainer import Callback, Trainer
from pretrain.evaluation.pictures import RunPictures
from pretrain.evaluation.probe import KnnCallback, OnlineProbe, Probe
from pretrain.model.joint_embedding import FAContrastive, OnlineNetwork
from pretrain.precision import autocast_type

_NUM_TIMED = 8  # pictures


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
    device = dist.choose_device(engine.device)
    dist.start(device.type)
    folder, lock = run_folder.prepare(config, resume=resume)
    # A run that is continued goes on with as many threads, so that it rounds alike.
    num_threads = choose_threads(engine.num_threads, run_folder.earlier_threads(folder))
    if num_threads:
        torch.set_num_threads(num_threads)
    input_pipeline = InputPipeline(
        config.data,
        seed=config.seed,
        device=device,
        channels_last=engine.channels_last,
        folder=folder,
    )
    torch.manual_seed(config.seed)
    model, optimizer = make_model(config, device, input_pipeline.num_samples)
    task = ContrastiveTask(config, model, optimizer, input_pipeline, folder, device)
    # What goes on beside the steps. The first process alone looks at the probe's sets.
    backbone, is_main = model.online.backbone, dist.rank() == 0
    log = ProgressLog("pretrain", partial(open_log, config, folder))
    checkpoints = Checkpoints(folder, engine, optimizer)
    online_probe = OnlineProbe.open(config.eval, input_pipeline.samples, backbone, device)
    probe = Probe.open(config.eval, config.data, device)
    # A step's row comes before its checkpoint: a killed run writes again only what comes after it.
    # The probe's row of an epoch comes before the last checkpoint, the pictures after it.
    callbacks: list[Callback | None] = [
        online_probe,
        log,
        CollapseAlarm(engine, log, checkpoints),
        StopOnSignal(log, checkpoints),
        KnnCallback(probe, backbone, log) if is_main and probe else None,
        checkpoints,
        HangTimer(engine),
        RunPictures(config, folder, backbone, input_pipeline, probe) if is_main else None,
        RunFolder(folder, lock, config, input_pipeline.num_samples) if is_main else None,
    ]
    present = [callback for callback in callbacks if callback is not None]
    trainer = Trainer(task, input_pipeline, present, config.optim.epochs, engine, device)
    log.notes += input_pipeline.notes
    if resume and checkpoint.is_in(folder):
        state, note = checkpoint.load_newest(folder)
        changes = trainer.load_state_dict(state, allow_changes=allow_changes)
        log.notes += [*([note] if note else []), *changes]
        logged_every = state["config"]["engine"]["log_every_steps"]
        log.logged_step = state["step"] // logged_every * logged_every
        if trainer.position.num_bad_samples and not is_whole(folder / BAD_SAMPLES):
            log.notes.append(f"{BAD_SAMPLES} is lost: samples that were replaced count anew")
    return trainer


def make_model(
    config: PretrainConfig, device: torch.device, num_samples: int | None = None
) -> tuple[FAContrastive, torch.optim.Optimizer]:
    """The model on its device, with random weights, and the optimiser of its online network.

    Raises:
        UserError: If the device cannot do what is asked for, or there are too few samples.
    """
    engine, gamma = config.engine, config.init.residual_gamma
    batch, least = config.data.batch_size, 2 * dist.world_size()
    require(
        engine.batch_norm == "synchronised" or batch >= least,
        f"data.batch_size {batch}: BN needs two pictures or more in each of {dist.world_size()} "
        f"processes; choose {least} or more, or engine.batch_norm=synchronised on GPUs",
    )
    model = FAContrastive(
        config.arch, config.heads, config.objective, config.fa, gamma, num_samples
    )
    if device.type == "cuda":
        # A setting of the process: fp32 products and convolutions may be rounded to TF32's 10 bits.
        # Neighbours are searched in exact fp32 in either case.
        torch.set_float32_matmul_precision("high" if engine.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = engine.tf32
    if engine.batch_norm == "synchronised":
        require(
            device.type == "cuda" or not dist.is_on(),
            "engine.batch_norm=synchronised: torch has it for GPUs only; on a CPU use "
            "engine.batch_norm=per_process, or one process",
        )
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        model.online = cast(OnlineNetwork, convert(model.online))
        if model.ema is not None:
            model.ema = cast(OnlineNetwork, convert(model.ema))
    if engine.activation_checkpointing:
        model.online.backbone.checkpoints_stages = True  # type: ignore[assignment]
    model.to(device)
    if engine.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if engine.compile:
        for network in (model.online, model.ema):
            if network is not None:
                _compile(network.backbone)
    rate = peak_lr(config.optim, batch)
    is_fused = device.type == "cuda"  # with other rounding, so that a CPU does without
    return model, make_optimizer(model.online, config.optim, rate, is_fused=is_fused)


def _compile(backbone: nn.Module) -> None:
    """Compile the forward pass in training; that of an evaluation stays as it is.

    The module itself is not wrapped: names of weights, hooks and DDP know nothing of it.
    """
    from torch._dynamo.exc import TorchDynamoException  # seconds, where nothing is compiled

    plain = backbone.forward
    compiled = torch.compile(plain, dynamic=False)

    def forward(images: Tensor, as_map: bool = False) -> Tensor:
        if not backbone.training:
            return plain(images, as_map)
        try:
            return compiled(images, as_map)
        except TorchDynamoException as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"engine.compile=true: torch.compile failed ({lines[0][:200]}); it needs a C++ "
                "compiler, and Triton on a GPU. Use engine.compile=false"
            ) from error

    backbone.forward = forward  # type: ignore[method-assign]


def check(config: PretrainConfig, *, has_data: bool) -> dict[str, Any]:
    """Return what a run would make and need; everything is made but nothing is trained.

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
    device, num_samples = dist.choose_device(engine.device), data.samples_per_epoch or None
    samples = None
    if has_data:
        folder, channels_last = Path(config.out or "."), engine.channels_last
        batches = InputPipeline(
            data, seed=config.seed, device=device, channels_last=channels_last, folder=folder
        )
        samples, num_samples = batches.samples, batches.num_samples
        Probe.open(config.eval, data, device)

    # The model as it is trained, and one batch through its backbone. Processor time of one thread,
    # so that other programs beside this one do not count.
    plain = dataclasses.replace(config, engine=dataclasses.replace(engine, compile=False))
    model, optimizer = make_model(plain, device, num_samples)
    dtype = autocast_type(engine.precision, device)
    images = torch.randn(_NUM_TIMED, 3, data.image_size, data.image_size, device=device)
    started, before = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(2):  # the first warms up
        started = time.process_time()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model.online.backbone(images).float().square().mean()
        loss.backward()
        loss.item()
    seconds = time.process_time() - started
    torch.set_num_threads(before)  # for the checks that follow in this process
    if device.type == "cpu":
        seconds /= engine.num_threads or before
    if has_data:
        OnlineProbe.open(config.eval, samples, model.online.backbone, device)

    # Two large views, and small ones by their area.
    small = data.augmentation.small_crops
    num_passes = 2 + small.num * (small.image_size / data.image_size) ** 2

    # A checkpoint holds the model, its EMA, the queues, and the momenta.
    num_bytes = checkpoint.num_bytes(model.state_dict()) + state_bytes(optimizer)
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
        "seconds_per_sample": num_passes * seconds / _NUM_TIMED,
        "disk_bytes": num_bytes * (2 + engine.keep_checkpoints),
    }
