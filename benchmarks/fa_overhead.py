"""Cost of feature augmentation: the step time of each method over the same method without FA.

A method is OBJECTIVE/ARCHITECTURE/FA, as byol/parallel/nn; its baseline is FA `none` with the same
objective and architecture. The two take turns, round by round, in the engine's own loop on a batch
that lies on the device. A small difference of two long times drowns in noise, so FA itself is timed
too: A on both views' features and the entry of the batch into the queue, at the same sizes.

"ratio" is the median over rounds of method / baseline, "fa_share" FA's own time over the
baseline's. FA@4 makes 4 features per sample.

Example:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fa_overhead.py --json fa.json --cells '*/*/nn'
"""

import argparse
import fnmatch
import statistics
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Clock, Sizes
from benchmarks.train_step import Ours, build_run, random_views
from common.errors import UserError, require
from pretrain.engine.profiling import fill_queues
from pretrain.features.augmentations.base import RowRandom, fa_generator
from pretrain.objectives.base import Objective

ARCHITECTURES = ("basic", "pre", "post", "parallel")
NAMES = ("identity", "nn", "mask", "noise", "mixup", "cutmix", "extrapolate", "nn+mixup", "nn|mask")
METHODS = {
    **{name: [f"fa.method={name}"] for name in NAMES},
    "nn-consensus": ["fa.method=nn", "fa.nn.top_k=8", "fa.nn.choice=consensus"],
    "nn-truncated": ["fa.method=nn", "fa.nn.distance=truncated"],
    "nn@4": ["fa.method=nn", "fa.nn.top_k=4", "fa.num_features=4"],
    "mask@4": ["fa.method=mask", "fa.num_features=4"],
}
CLUSTERED = "deepclusterv2"  # its samples must be at least as many as its prototypes
NUM_PROTOTYPES = 3000
DEFAULT_CELLS = "byol/parallel/*,infonce/parallel/nn,infonce/parallel/nn@4"


def measure(cell: str, folder: Path, sizes: Sizes, clock: Clock, options: Any) -> dict[str, Any]:
    """What is reported of a method, from its times and those of its baseline.

    Raises:
        UserError: If the method cannot train.
    """
    base, architecture, method = cell.split("/")
    settings = [
        f"objective.name={base}", f"fa.architecture={architecture}",
        f"fa.queue_size={sizes.queue_size}", f"fa.min_fill={min(1024, sizes.queue_size)}",
    ]  # fmt: skip
    if base == CLUSTERED:
        settings.append(f"objective.num_prototypes={min(NUM_PROTOTYPES, sizes.queue_size)}")
    arms = {}
    for name, own in (("baseline", []), ("method", METHODS[method])):
        run = build_run(folder, sizes, options.device, 0, [*settings, *own])
        fill_queues(run.task.model)  # FA costs what it costs in a long run
        arms[name] = Ours(run, random_views(sizes, run.device))
    augmenter, device = arms["method"].run.task.model.augmenter, arms["method"].run.device
    features = torch.randn(2, sizes.batch_size, sizes.dim, device=device)
    notes = torch.arange(sizes.batch_size, device=device)

    @torch.no_grad()
    def augment() -> None:
        """FA alone, as often as a step does it: both views, and the batch enters the queue."""
        random = RowRandom.whole(fa_generator(0, 0, device), sizes.batch_size)
        augmenter(features[0], features[1], random, 1.0)
        augmenter(features[1], features[0], random, 1.0)
        if augmenter.queue is not None:
            augmenter.queue.put(features[0], notes, notes)

    turns = {name: partial(clock, partial(arm.steps, 1)) for name, arm in arms.items()}
    times = harness.take_turns(turns, options.repeats)
    num_augmented = options.fa_repeats * options.repeats
    fa_ms = statistics.median(clock(augment) for _ in range(num_augmented))
    ratios = harness.ratios(times["method"], times["baseline"])
    baseline_ms = statistics.median(times["baseline"])
    return {
        "ms": statistics.median(times["method"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "baseline_ms": baseline_ms,
        "fa_ms": fa_ms,
        "fa_share": fa_ms / baseline_ms,
        "num_features": arms["method"].run.task.config.fa.num_features,
    }


def chosen_cells(patterns: str) -> list[str]:
    """The cells that comma-separated patterns name, each once.

    Raises:
        UserError: If a pattern names none.
    """
    cells = ["/".join(x) for x in product(Objective.registry.names(), ARCHITECTURES, METHODS)]
    named = {x: fnmatch.filter(cells, x) for x in map(str.strip, patterns.split(","))}
    empty = [repr(pattern) for pattern, found in named.items() if not found]
    require(
        not empty,
        f"--cells: {', '.join(empty)} names none; a cell is OBJECTIVE/ARCHITECTURE/FA, as "
        "byol/parallel/nn (--help lists them)",
    )
    chosen = set().union(*named.values())
    return [cell for cell in cells if cell in chosen]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen methods; the figures for JSON.

    Raises:
        UserError: If a pattern names nothing, or all of them nothing that can train.
    """
    device, sizes = harness.chosen_sizes(options, Sizes())
    clock = Clock(device, 10 if device.type == "cuda" else 1)
    chosen = chosen_cells(options.cells)
    cells, refused = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        is_clustered = any(cell.startswith(CLUSTERED) for cell in chosen)
        num_prototypes = min(NUM_PROTOTYPES, sizes.queue_size) if is_clustered else 0
        num_samples = max(sizes.batch_size, num_prototypes)
        harness.open_as_shards(harness.encoded_photos(1), folder, num_samples).close()
        for cell in chosen:
            try:
                cells[cell] = measure(cell, folder, sizes, clock, options)
            except UserError as error:
                refused[cell] = str(error)
    require(
        bool(cells),
        f"--cells {options.cells}: names nothing that can train. {'; '.join(refused.values())}",
    )
    return {
        **harness.context(device, sizes),
        "baseline_ms": min(figures["baseline_ms"] for figures in cells.values()),
        "cells": cells,
        "refused": refused,
        "clock": clock.name,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (("repeats", 5, 1, "rounds"), ("fa-repeats", 20, 1, "of FA alone, per round"))
    parser = harness.make_parser(__doc__, counts, sizes=Sizes())
    parser.add_argument(
        "--cells", default=DEFAULT_CELLS, metavar="PATTERNS",
        help="comma-separated OBJECTIVE/ARCHITECTURE/FA with * and ? (default: %(default)s); "
        f"objectives: {', '.join(Objective.registry.names())}; "
        f"architectures: {', '.join(ARCHITECTURES)}; FA: {', '.join(METHODS)}",
    )  # fmt: skip
    options = parser.parse_args(argv)
    return harness.run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
