"""Twenty optimiser steps of small cells in float64: what test_losses.py and its ranks run.

Weights, views and labels come from numpy's generators, whose numbers are the same on every
processor. The code casts features to fp32 where autocast must not reach (`Tensor.float`); in
float64 that cast is left out here, so that rounding stays near 1e-16.
"""

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.config import read_settings
from pretrain import collectives as dist
from pretrain.config import AdversarialConfig, DataConfig, FAConfig, HeadConfig, OptimConfig
from pretrain.engine.accumulation import Gradients
from pretrain.engine.optim import lr_factor, make_optimizer, peak_lr, set_lr
from pretrain.features.augmentations.base import fa_generator
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.base import Objective
from tests.golden.gate import digest

NUM_STEPS, NUM_STEPS_OF_RANKS, BATCH, SEED = 20, 10, 16, 11
GAMMA = 0.2  # of residual blocks: rounding grows less from step to step
THIN_R50 = ResNetBackbone(depth=50, width_per_group=4, stem_channels=4, res2_channels=16)
THIN_R18 = ResNetBackbone(depth=18, width_per_group=4, stem_channels=4, res2_channels=4)
SMALL_HEADS = {"projector_hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 12}
SMALL_QUEUES = {"num_negatives": 72, "num_prototypes": 10}


@dataclass(frozen=True)
class Cell:
    """Slices of the config, as keywords."""

    objective: dict[str, Any]
    fa: dict[str, Any]
    optim: dict[str, Any]
    heads: dict[str, Any] = field(default_factory=dict)
    arch: ResNetBackbone = THIN_R18
    adversarial: dict[str, Any] = field(default_factory=dict)


LARS = {
    "name": "lars", "base_lr": 0.1, "lars_eta": 0.02, "weight_decay": 1e-4, "epochs": 10,
    "warmup_epochs": 2.0,
}  # fmt: skip
SGD = {"name": "sgd", "base_lr": 0.02, "weight_decay": 1e-4, "epochs": 10, "warmup_epochs": 0.0}
ADAMW = {"name": "adamw", "base_lr": 0.02, "weight_decay": 0.05, "epochs": 10, "warmup_epochs": 1.0}
NN = {"method": "nn", "queue_size": 40, "min_fill": 24}
MASKS = {"method": "mask", "mask": {"ratio": 0.3}, "num_features": 4, "feature_loss": "free"}
PLAIN = {"micro_batch_size": 8, "accumulation": "plain"}
CACHED = PLAIN | {"accumulation": "cached"}
CELLS = {
    "simclr-basic-nn-lars": Cell(
        {"name": "simclr", "temperature": 0.3}, NN, LARS | {"lars_clip": True}
    ),
    "simclr-basic-mixup-cached": Cell(
        {"name": "simclr"},
        {"method": "mixup", "mixup": {"alpha": 0.5}, "partner": "batch", "stop_gradient": False},
        LARS | CACHED,
    ),
    "infonce-parallel-nn-lars": Cell(
        {"name": "infonce", "temperature": 0.1},
        NN | {"nn": {"top_k": 3}},
        LARS,
        {"projector_layers": 3, "projector_last_bn": True},
        THIN_R50,
    ),
    "infonce-pre-chain-adamw": Cell(
        {"name": "infonce"},
        NN | {"method": "nn+noise", "architecture": "pre", "stop_gradient": False,
              "strength_start": 0.2, "strength_curve": "cosine"},
        ADAMW,
    ),
    "moco-basic-mask-sgd": Cell(
        {"name": "moco", "ema_tau": 0.9, "ema_tau_end": 0.99}, MASKS,
        SGD | {"exclude_bias_and_norm": False}, {"projector_hidden_bn": False},
    ),
    "moco-parallel-chain-plain": Cell(
        {"name": "moco", "ema_tau": 0.95},
        NN | {"method": "nn+mask", "nn": {"choice": "consensus", "top_k": 4},
              "architecture": "parallel"},
        SGD | PLAIN,
    ),
    "byol-parallel-mask-lars": Cell(
        {"name": "byol", "ema_tau": 0.9}, MASKS, LARS | {"head_weight_decay": 1e-2}, {}, THIN_R50
    ),
    "byol-pre-nn-plain": Cell(
        {"name": "byol", "ema_tau": 0.95},
        NN | {"architecture": "pre", "stop_gradient": False, "nn": {"distance": "truncated"},
              "views": "second"},
        LARS | PLAIN,
        adversarial={"epsilon": 2.0},
    ),
    "simsiam-parallel-mixup-sgd": Cell(
        {"name": "simsiam"},
        {"method": "mixup", "partner": "queue", "queue_size": 40, "min_fill": 24},
        SGD | {"predictor_constant_lr": True},
        {"projector_last_bn": True, "projector_last_bn_affine": False},
    ),
    "simsiam-post-alternatives-cached": Cell(
        {"name": "simsiam"},
        {"method": "cutmix|extrapolate", "architecture": "post", "stop_gradient": False,
         "strength": 0.8},
        SGD | CACHED,
    ),
    "swav-basic-none-lars": Cell(
        {"name": "swav", "frozen_prototype_steps": 5}, {"method": "none"}, LARS
    ),
    "swav-basic-nn-cached": Cell(
        {"name": "swav", "frozen_prototype_steps": 0, "sinkhorn_iterations": 2},
        NN | {"queue_dtype": "fp16", "nn": {"top_k": 2}, "num_features": 2},
        SGD | CACHED,
    ),
}  # fmt: skip
TWO_RANKS = ("simclr-basic-mixup-cached", "moco-parallel-chain-plain", "swav-basic-none-lars")


@contextlib.contextmanager
def float64_is_kept() -> Iterator[None]:
    """New tensors are float64, and `Tensor.float` returns float64 tensors as they are."""
    as_fp32, default = torch.Tensor.float, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else as_fp32(self)
    try:
        yield
    finally:
        torch.Tensor.float = as_fp32
        torch.set_default_dtype(default)


@torch.no_grad()
def fill_weights(module: nn.Module) -> None:
    """Random weights and affine parameters of BN that depend on names and shapes alone."""
    for name, weights in module.named_parameters():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = torch.from_numpy(random.standard_normal(weights.shape))
        if weights.ndim > 1:
            weights.copy_(values * (2 / values[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            weights.mul_(1 + 0.1 * values)
        else:
            weights.copy_(0.1 * values)


def views_of(step: int, size: int = 32) -> Tensor:
    """Two views [2, BATCH, 3, size, size] of each sample: what they share, and noise."""
    random = np.random.default_rng([SEED, step])
    shared = random.standard_normal((1, BATCH, 3, size, size))
    return torch.from_numpy(shared + 0.3 * random.standard_normal((2, BATCH, 3, size, size)))


def run(cell: Cell, num_steps: int = NUM_STEPS) -> tuple[dict[str, Any], str]:
    """Train a cell: its figures and the digest of its losses and final weights."""
    objective_class = Objective.registry[cell.objective["name"]]
    names = {field.name for field in fields(objective_class)}
    small = {name: size for name, size in SMALL_QUEUES.items() if name in names}
    objective, optim = objective_class(**(small | cell.objective)), OptimConfig(**cell.optim)
    adversarial = AdversarialConfig(**cell.adversarial)
    fa = read_settings(FAConfig, None, [f"{key}={value}" for key, value in cell.fa.items()])
    heads = HeadConfig(**(SMALL_HEADS | cell.heads))
    model = FAContrastive(cell.arch, heads, objective, fa, GAMMA).double()
    fill_weights(model.online)
    if model.ema is not None:
        fill_weights(model.ema)
    optimizer = make_optimizer(model.online, optim, peak_lr(optim, BATCH))
    forward: nn.Module = model.online
    if dist.is_on():
        forward = DistributedDataParallel(model.online, broadcast_buffers=False)
    gradients = Gradients(model, forward, optim, contextlib.nullcontext)
    local = dist.local_rows(BATCH // dist.world_size())
    labels = torch.arange(BATCH)[local]
    losses, rates, taus, active = [], [], [], []
    for step in range(num_steps):
        factor = lr_factor(optim, step, num_steps)
        rates.append(set_lr(optimizer, peak_lr(optim, BATCH), factor))
        optimizer.zero_grad(set_to_none=True)
        generator = partial(fa_generator, SEED, step, torch.device("cpu"))
        progress = step / num_steps
        views = gradients.attacked(
            views_of(step)[:, local], generator, progress, adversarial, DataConfig()
        )
        outputs = gradients.compute(views, generator, progress)
        model.before_update(step)
        optimizer.step()
        taus.append(objective.tau(step, num_steps))
        model.after_optimizer_step(taus[-1], outputs, labels + step * BATCH, labels)
        losses.append(dist.mean(outputs[0].loss))
        active.append(outputs[0].is_augmented)
    figures = {
        "losses": [float(loss) for loss in losses],
        "rates": rates,
        "taus": taus if model.ema is not None else [],
        "first_augmented_step": active.index(True),
        "norms": {
            "online": _norm(model.online.parameters()),
            "ema": 0.0 if model.ema is None else _norm(model.ema.parameters()),
            "buffers": _norm(model.buffers()),
        },
    }
    tensors = [*losses, *model.online.state_dict().values()]
    return figures, digest(*(x.detach().numpy().tobytes() for x in tensors))


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(x.detach().double().square().sum() for x in tensors) ** 0.5)


def run_ranks(out: Path) -> None:
    """What each of the two Gloo ranks of test_losses.py does."""
    dist.start("cpu")
    with float64_is_kept():
        results = {name: run(CELLS[name], NUM_STEPS_OF_RANKS) for name in TWO_RANKS}
    if dist.rank() == 0:
        out.write_text(json.dumps(results))
    dist.stop()
