"""One process of the two-process tests; test_ddp.py calls `run_cell` in a world of one, too."""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel

from pretrain import collectives as dist
from pretrain.config import HeadConfig, OptimConfig
from pretrain.engine.accumulation import Gradients
from pretrain.features.augmentations.base import fa_generator
from pretrain.features.mixing import Mixing
from pretrain.model.joint_embedding import FAContrastive
from tests.pretrain.conftest import make_fa, make_objective
from tests.pretrain.model.two_layers import TwoLayers

NUM_STEPS, BATCH = 3, 8


def make_model(objective, fa):
    torch.manual_seed(0)
    mixing = Mixing(**fa.pop("mixing", {}))
    model = FAContrastive(
        TwoLayers(),
        HeadConfig(projector_hidden_dim=16, predictor_hidden_dim=16, output_dim=8),
        make_objective(objective, num_negatives=20, num_prototypes=6, mixing=mixing),
        make_fa(**({"queue_size": 20, "min_fill": 8} | fa)),
        num_samples=16,
    ).eval()
    if model.ema is not None:  # something for the EMA to do
        with torch.no_grad():
            for parameter in model.ema.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_cell(objective, fa, optim, num_small=0):
    """Three steps of the same weights, BN in eval mode: losses, the last gradients, the queues.

    Weights stand still, so that rounding does not add up; only EMA and queues move. Micro-batches
    are for the group: one process takes the joined batch in one pass.
    """
    model = make_model(objective, fa)
    forward = model.online
    if dist.is_on():
        forward = DistributedDataParallel(model.online, broadcast_buffers=False)
    config = OptimConfig(**optim) if dist.is_on() else OptimConfig()
    gradients = Gradients(model, forward, config, contextlib.nullcontext)
    losses, active, size = [], [], 64 if objective == "masked_prediction" else 32
    generator = torch.Generator().manual_seed(1)
    for step in range(NUM_STEPS):
        views = torch.randn(2, BATCH, 3, size, size, generator=generator)
        small = torch.randn(num_small, BATCH, 3, 16, 16, generator=generator)
        rows = dist.local_rows(BATCH // dist.world_size())
        part = [view[rows] for view in (*views, *small)] if num_small else views[:, rows]
        model.online.zero_grad(set_to_none=True)
        # Each step is an epoch; two of its samples were not in the last one, both on rank 1.
        ids = (torch.arange(BATCH) + 2 * step)[dist.local_rows(BATCH // dist.world_size())]
        if step:
            model.start_epoch(torch.Generator().manual_seed(step))
        outputs = gradients.compute(
            part, lambda step=step: fa_generator(5, step, torch.device("cpu")), 1.0, ids
        )
        model.after_optimizer_step(0.9, outputs, ids)
        losses.append(float(dist.mean(outputs[0].loss)))
        active.append(outputs[0].is_augmented)
    return {
        "losses": losses,
        "active": active,
        "num_outputs": len(outputs),
        "gradients": {k: v.grad for k, v in model.online.named_parameters()},
        "ema": {} if model.ema is None else model.ema.state_dict(),
        "queue": {} if model.queue is None else model.queue.state_dict(),
        "negatives": {} if model.memory is None else model.memory.state_dict(),
    }


def run_cells(out, cells):
    dist.start("cpu")
    results = {name: run_cell(*cell) for name, cell in cells.items()}
    torch.save(results, f"{out}-{dist.rank()}.pth")
    dist.stop()
