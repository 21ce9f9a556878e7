"""A schedule made for some GPUs, scaled linearly to those at hand, and shown.

A config that names its number of GPUs (SOLVER.REFERENCE_WORLD_SIZE) is a protocol: its values
belong together. With a batch b times as large, the learning rate is multiplied by b, and what is
counted in iterations divided by b, so that as many pictures are seen (Goyal et al., 2017).
Detectron2 does the same for the number of GPUs; here a batch that is given counts too, the number
of iterations for precise batch norm follows, and what is done is shown.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from fractions import Fraction

from detectron2.config import CfgNode

from common.errors import UserError

_IN_ITERATIONS = ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD")
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
    for key in _IN_ITERATIONS:
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
    reference = protocol.SOLVER.REFERENCE_WORLD_SIZE
    columns = [_column(protocol, reference), _column(cfg, num_gpus)]
    head = ["", f"protocol, {_gpus(reference)}", f"here, {_gpus(num_gpus)}"]
    rows = [head, *([name, *(column[name] for column in columns)] for name in columns[0])]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _gpus(count: int) -> str:
    return f"{count} GPU" + ("s" if count != 1 else "")


def _column(cfg: CfgNode, num_gpus: int) -> dict[str, str]:
    """Name -> value as text."""
    solver = cfg.SOLVER
    together = num_gpus if cfg.MODEL.RESNETS.NORM not in _SYNCHRONISED_NORMS else 1
    precise = cfg.TEST.PRECISE_BN
    return {
        "pictures per batch": f"{solver.IMS_PER_BATCH}",
        "pictures per batch-norm statistic": f"{solver.IMS_PER_BATCH / together:g}",
        "learning rate": f"{solver.BASE_LR:g}",
        "warm-up iterations": f"{solver.WARMUP_ITERS}",
        "learning rate drops at": ", ".join(map(str, solver.STEPS)) or "-",
        "iterations": f"{solver.MAX_ITER}",
        "pictures in all": f"{solver.MAX_ITER * solver.IMS_PER_BATCH}",
        "pictures for precise batch norm": f"{precise.NUM_ITER * solver.IMS_PER_BATCH}"
        if precise.ENABLED
        else "-",
    }
