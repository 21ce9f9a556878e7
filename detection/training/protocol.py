"""Schedules: a protocol scaled to the GPUs at hand, and parts that fit each other.

A config that names its number of GPUs (SOLVER.REFERENCE_WORLD_SIZE) is a protocol: its values
belong together and are scaled linearly to the GPUs at hand. With a batch b times as large, the
learning rate is multiplied by b, and what is counted in iterations divided by b, so that the number
of pictures stays the same (Goyal et al., 2017). Detectron2 does the same for the number of GPUs;
here an overridden batch counts too, and the number of iterations for precise batch norm follows.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from collections.abc import Collection
from fractions import Fraction

from detectron2.config import CfgNode

from common.errors import UserError

_SYNCHRONISED_NORMS = ("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def scale_schedule(cfg: CfgNode, num_gpus: int, images_per_batch: int | None = None) -> Fraction:
    """Scale a protocol in place; a config that names no number of GPUs is left alone.

    Args:
        cfg: Its SOLVER.IMS_PER_BATCH pictures are meant for SOLVER.REFERENCE_WORLD_SIZE GPUs (0:
            not a protocol). That key becomes `num_gpus`: Detectron2 will not scale once more.
        num_gpus: GPUs at hand, or 1 for a CPU.
        images_per_batch: Pictures a batch over all GPUs; default: as many a GPU as in the protocol.

    Returns:
        New pictures per batch, as a multiple of the protocol's.

    Raises:
        UserError: If the pictures do not divide.
    """
    solver, test = cfg.SOLVER, cfg.TEST
    if solver.REFERENCE_WORLD_SIZE <= 0:
        return Fraction(1)
    if images_per_batch is None:
        per_gpu = Fraction(solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE)
        if per_gpu.denominator != 1:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} does not divide by "
                f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE}; change one of them"
            )
        images_per_batch = int(per_gpu) * num_gpus
    if images_per_batch < 1:
        raise UserError(f"SOLVER.IMS_PER_BATCH {images_per_batch}: give at least 1")
    factor = Fraction(images_per_batch, solver.IMS_PER_BATCH)

    def scaled(count: int) -> int:
        return round(count / factor)

    solver.REFERENCE_WORLD_SIZE = num_gpus
    solver.IMS_PER_BATCH = images_per_batch
    solver.BASE_LR = solver.BASE_LR * float(factor)
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = max(1, scaled(solver[key])) if solver[key] else 0
    solver.STEPS = tuple(scaled(step) for step in solver.STEPS)
    test.EVAL_PERIOD = scaled(test.EVAL_PERIOD)
    test.PRECISE_BN.NUM_ITER = max(1, scaled(test.PRECISE_BN.NUM_ITER))
    return factor


def schedule_table(protocol: CfgNode, cfg: CfgNode, num_gpus: int) -> str:
    """The schedule of a protocol beside the one that is run, for people.

    Args:
        protocol: As its file has it.
        cfg: What is run.
        num_gpus: GPUs at hand, or 1 for a CPU.
    """
    columns = []
    runs = (("protocol", protocol, protocol.SOLVER.REFERENCE_WORLD_SIZE), ("here", cfg, num_gpus))
    for title, config, count in runs:
        solver, precise = config.SOLVER, config.TEST.PRECISE_BN
        is_synchronised = config.MODEL.RESNETS.NORM in _SYNCHRONISED_NORMS
        per_statistic = solver.IMS_PER_BATCH / (1 if is_synchronised else count)
        num_precise = precise.NUM_ITER * solver.IMS_PER_BATCH
        columns.append({
            "": f"{title}, {count} GPU{'s' if count != 1 else ''}",
            "pictures per batch": f"{solver.IMS_PER_BATCH}",
            "pictures per batch-norm statistic": f"{per_statistic:g}",
            "learning rate": f"{solver.BASE_LR:g}",
            "warm-up iterations": f"{solver.WARMUP_ITERS}",
            "learning rate drops at": ", ".join(map(str, solver.STEPS)) or "-",
            "iterations": f"{solver.MAX_ITER}",
            "pictures in all": f"{solver.MAX_ITER * solver.IMS_PER_BATCH}",
            "pictures for precise batch norm": f"{num_precise}" if precise.ENABLED else "-",
        })  # fmt: skip
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def check_schedule(cfg: CfgNode, before: CfgNode, overridden: Collection[str]) -> None:
    """Keep a schedule whole, and refuse one that the iterations do not hold.

    Args:
        cfg: Its SOLVER is changed: STEPS and WARMUP_ITERS are scaled with an overridden MAX_ITER,
            unless they are overridden too.
        before: SOLVER without the overrides.
        overridden: Their keys.
    """
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if solver[key] < 1:
            raise UserError(f"SOLVER.{key} {solver[key]}: give at least 1")
    old, last = before.MAX_ITER, solver.MAX_ITER
    if old != last and "SOLVER.STEPS" not in overridden:
        steps = {int(step * last / old) for step in before.STEPS}
        # A few iterations hold no schedule: drops that would fall together or on 0 become one.
        solver.STEPS = tuple(sorted(step for step in steps if 0 < step < last))
    if old != last and "SOLVER.WARMUP_ITERS" not in overridden:
        solver.WARMUP_ITERS = int(before.WARMUP_ITERS * last / old)
    is_stepwise = solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    if is_stepwise and any(step >= last for step in solver.STEPS):
        raise UserError(
            f"SOLVER.STEPS {tuple(solver.STEPS)} reaches beyond SOLVER.MAX_ITER {last}: Detectron2 "
            "would leave those drops out; give steps below MAX_ITER, or MAX_ITER alone and they "
            "are scaled"
        )
    if last <= solver.WARMUP_ITERS and last > 1:
        raise UserError(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} leaves nothing of SOLVER.MAX_ITER {last}; "
            "shorten it, or give MAX_ITER alone and it is scaled"
        )
