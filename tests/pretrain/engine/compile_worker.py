"""One process of two: gradients through a compiled backbone under DDP, beside those without.

usage: compile_worker.py OUT BACKEND MICRO_BATCH_SIZE   (torchrun's variables in the environment)
"""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from pretrain import collectives as dist
from pretrain.config import (
    EngineConfig,
    FAConfig,
    HeadConfig,
    OptimConfig,
    PretrainConfig,
)
from pretrain.engine.accumulation import Gradients
from pretrain.features.augmentations.base import fa_generator
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.run import make_model

NUM_ROWS = 32  # of each process: BN of a few rows would make much of rounding


def gradients_of(micro_batch_size, is_compiled):
    """All gradients of the second step from the same weights, in one row; the loss."""
    torch.manual_seed(0)
    config = PretrainConfig(
        arch=ResNetBackbone(depth=18, width_per_group=8, stem_channels=8, res2_channels=8),
        heads=HeadConfig(projector_hidden_dim=16, predictor_hidden_dim=16, output_dim=8),
        fa=FAConfig(method="none"),
        engine=EngineConfig(compile=is_compiled),
    )
    model, _ = make_model(config, torch.device("cpu"))
    forward = DistributedDataParallel(model.online, broadcast_buffers=False)
    optim = OptimConfig(micro_batch_size=micro_batch_size)
    gradients = Gradients(model, forward, optim, contextlib.nullcontext)
    generator, loss = torch.Generator().manual_seed(1), 0.0
    for step in range(2):
        views = torch.randn(2, 2 * NUM_ROWS, 3, 32, 32, generator=generator)
        model.online.zero_grad(set_to_none=True)
        (first, *_) = gradients.compute(
            views[:, dist.local_rows(NUM_ROWS)],
            partial(fa_generator, 0, step, torch.device("cpu")),
            1.0,
        )
        loss = float(first.loss.detach())
    found = [p.grad.flatten() for p in model.online.parameters() if p.grad is not None]
    return torch.cat(found), loss


def main(out, backend, micro_batch_size):
    torch.set_num_threads(1)
    dist.start("cpu")
    torch.compile = partial(torch.compile, backend=backend)
    plain, loss = gradients_of(int(micro_batch_size), False)
    compiled, again = gradients_of(int(micro_batch_size), True)
    if dist.rank() == 0:
        distance = float((compiled - plain).norm() / plain.norm())
        row = {"loss": loss, "compiled_loss": again, "distance": distance}
        Path(out).write_text(json.dumps(row))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
