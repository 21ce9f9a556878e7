"""Cost of feature augmentation: the step time of each method over the same method without FA.

A method is OBJECTIVE/ARCHITECTURE/FA, as byol/parallel/nn; its baseline is FA `none` with the same
objective and architecture. Baseline and methods take turns, round by round. A small difference of
two long times drowns in noise, so FA itself is timed too: A on both views' features and the entry
of the batch into the queue, at the same sizes.

"ratio" is the median over rounds of method / baseline, "fa_share" FA's own time over the
baseline's. FA@4 makes 4 features per sample.

Example:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fa_overhead.py --json fa.json --cells '*/*/nn'
"""

import argparse
import fnmatch
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Clock, Sizes
from common.errors import UserError, require
from pretrain.collectives import autocast_type
from pretrain.config import FAConfig, OptimConfig, refuse_without_gradient, resolve
from pretrain.engine.accumulation import Gradients
from pretrain.engine.optim import make_optimizer
from pretrain.engine.profiling import fill_queues
from pretrain.features.augmentations.base import RowRandom, fa_generator
from pretrain.features.augmentations.nn import NearestNeighbour
from pretrain.features.feature_augmentation import FeatureAugmenter
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.base import Objective

ARCHITECTURES = ("basic", "pre", "post", "parallel")
METHODS: dict[str, dict[str, Any]] = {
    "identity": {},
    **{name: {} for name in ("nn", "mask", "noise", "mixup", "cutmix", "extrapolate")},
    "nn+mixup": {},
    "nn|mask": {},
    "nn-consensus": {"nn": NearestNeighbour(top_k=8, choice="consensus")},
    "nn-truncated": {"nn": NearestNeighbour(distance="truncated")},
    "nn@4": {"nn": NearestNeighbour(top_k=4), "num_features": 4},
    "mask@4": {"num_features": 4},
}
GOALS = {"cpu": {1: 0.05, 4: 0.05}, "cuda": {1: 0.01, 4: 0.03}}  # share of a step, by num_features
DEFAULT_CELLS = "byol/parallel/*,infonce/parallel/nn,infonce/parallel/nn@4"


def fa_config(architecture: Any, method: str, queue_size: int) -> FAConfig:
    """The FA of a method, from its name."""
    name = "none" if method == "none" else method.split("@")[0].split("-")[0]
    return FAConfig(
        method=name, architecture=architecture, queue_size=queue_size,
        min_fill=min(1024, queue_size), **METHODS.get(method, {}),
    )  # fmt: skip


class Group:
    """The methods of one objective and architecture: one network, an augmenter for each."""

    def __init__(
        self, base: Any, architecture: str, methods: Sequence[str], sizes: Sizes,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.name, self.sizes, self.device = f"{base}/{architecture}", sizes, device
        self.objective = Objective.registry[base]()
        self.fa = {
            method: fa_config(architecture, method, sizes.queue_size)
            for method in ("none", *methods)
        }
        self.augmenters = {
            method: FeatureAugmenter(fa, sizes.dim).to(device) for method, fa in self.fa.items()
        }
        self.model = FAContrastive(sizes.arch(), sizes.heads(), self.objective, self.fa["none"])
        self.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_bf16 = autocast_type("auto", device) is not None
        self.precision = "bf16" if is_bf16 else "fp32"
        self.gradients = Gradients(
            self.model, self.model.online, OptimConfig(),
            lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16),
        )  # fmt: skip
        self.optimizer = make_optimizer(self.model.online, OptimConfig(), 1e-3)
        n, side = sizes.batch_size, sizes.image_size
        self.views = torch.randn(2, n, side, side, 3, device=device).permute(0, 1, 4, 2, 3)
        self.features = torch.randn(2, n, sizes.dim, device=device)
        self.notes = torch.arange(n, device=device)
        self.num_steps = 0
        # Full queues: FA costs what it costs in a long run.
        entries = torch.randn(2, sizes.queue_size, sizes.dim, device=device)
        fill_queues(self.model)
        for augmenter in self.augmenters.values():
            if augmenter.queue is not None:
                augmenter.queue.put(entries[0])

    def use(self, method: str) -> None:
        """Make the network that of this method."""
        self.model.fa, self.model.augmenter = self.fa[method], self.augmenters[method]
        self.model.spec = resolve(self.objective, self.fa[method])
        assert self.model.augmenter.is_ready(), method

    def step(self) -> None:
        """One optimiser step as the training loop does it, without data and logs."""
        self.num_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.gradients.compute(self.views, self._generator, 0.5)
        self.optimizer.step()
        self.model.after_optimizer_step(0.99, outputs, self.notes, self.notes)

    @torch.no_grad()
    def augment(self) -> None:
        """FA alone, as often as a step does it: both views, and the batch enters the queue."""
        self.num_steps += 1
        random = RowRandom.whole(self._generator(), self.sizes.batch_size)
        augmenter = self.model.augmenter
        augmenter(self.features[0], self.features[1], random, 1.0)
        augmenter(self.features[1], self.features[0], random, 1.0)
        if augmenter.queue is not None:
            augmenter.queue.put(self.features[0], self.notes, self.notes)

    def _generator(self) -> torch.Generator:
        return fa_generator(0, self.num_steps, self.device)


def measure(
    group: Group, clock: Clock, num_rounds: int, fa_repeats: int
) -> dict[str, dict[str, Any]]:
    """What is reported of each method of a group, from its times and those of its baseline."""

    def turn(method: str) -> tuple[float, list[float]]:
        group.use(method)
        num_repeats = fa_repeats if method != "none" else 0
        return clock(group.step), [clock(group.augment) for _ in range(num_repeats)]

    turns = {method: partial(turn, method) for method in group.fa}
    measured = harness.take_turns(turns, num_rounds)
    baseline = [step for step, _ in measured.pop("none")]
    baseline_ms, figures = statistics.median(baseline), {}
    for method, rounds in measured.items():
        steps = [step for step, _ in rounds]
        ratios = harness.ratios(steps, baseline)
        fa_ms = statistics.median(time for _, times in rounds for time in times)
        figures[method] = {
            "ms": statistics.median(steps),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "baseline_ms": baseline_ms,
            "fa_ms": fa_ms,
            "fa_share": fa_ms / baseline_ms,
            "num_features": METHODS[method].get("num_features", 1),
        }
    return figures


def chosen_methods(patterns: str) -> tuple[dict[tuple[str, str], list[str]], dict[str, str]]:
    """What a comma-separated list of patterns names, by group; and what cannot train, with why.

    Raises:
        UserError: If a pattern names nothing that exists, or nothing that can train.
    """
    parts = [part.strip() for part in patterns.split(",")]
    names = ["/".join(p) for p in product(Objective.registry.names(), ARCHITECTURES, METHODS)]
    for part in parts:
        require(
            bool(fnmatch.filter(names, part)),
            f"--cells: {part!r} names no cell; a cell is OBJECTIVE/ARCHITECTURE/FA, as "
            "byol/parallel/nn (--help lists them)",
        )
    groups: dict[tuple[str, str], list[str]] = {}
    refused: dict[str, str] = {}
    for name in (name for name in names if any(fnmatch.fnmatch(name, part) for part in parts)):
        base, architecture, method = name.split("/")
        objective = Objective.registry[base]()
        try:
            refuse_without_gradient(objective, fa_config(architecture, method, 64))
            groups.setdefault((base, architecture), []).append(method)
        except UserError as error:
            refused[name] = str(error)
    require(bool(groups), f"--cells: none of these can train: {next(iter(refused.values()), '')}")
    return groups, refused


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen methods; the figures for JSON."""
    device, sizes = harness.chosen_sizes(options, Sizes())
    groups, refused = chosen_methods(options.cells)
    clock = Clock(device, options.calls or (10 if device.type == "cuda" else 1))
    cells, baselines, precision, load = {}, {}, "", os.getloadavg()[0]
    for (base, architecture), methods in groups.items():
        group = Group(base, architecture, methods, sizes, device)
        found = measure(group, clock, options.repeats, options.fa_repeats)
        cells |= {f"{group.name}/{method}": figures for method, figures in found.items()}
        baselines[group.name] = next(iter(found.values()))["baseline_ms"]
        precision = group.precision
    return {
        **harness.context(device, sizes),
        "baseline_ms": min(baselines.values()),
        "cells": cells,
        "baselines": baselines,
        "refused": refused,
        "goals": {str(num): goal for num, goal in GOALS[device.type].items()},
        "precision": precision,
        "clock": clock.name,
        "num_rounds": options.repeats,
        "fa_repeats": options.fa_repeats,
        "calls_per_timing": clock.num_calls,
        "load_average": [load, os.getloadavg()[0]],
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (
        ("repeats", 5, 1, "rounds"),
        ("fa-repeats", 20, 1, "of FA alone, per round"),
        ("calls", 0, 0, "steps in one timing; 0: 1 on a CPU, 10 on a GPU"),
    )
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
