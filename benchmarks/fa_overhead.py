"""Cost of feature augmentation: the step time of each cell over the same cell without FA.

A cell is base method / architecture / FA method; its baseline is FA method `none` in the same base
method and architecture. Baseline and cells take turns, round by round, so that whatever else the
machine does hits all alike. A small difference of two long times drowns in noise, so FA itself is
timed too: A on both views' features and the entry of the batch into the queue, at the same sizes.

"ratio" is the median over rounds of cell / baseline, "fa_share" FA's own time over the baseline's.
"""

import argparse
import fnmatch
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import torch
from tqdm import tqdm

from benchmarks.harness import add_sizes, make_parser, run_and_report, versions
from common.errors import UserError
from common.resnet import Arch
from pretrain.config import (
    FAConfig,
    HeadConfig,
    ObjectiveConfig,
    ObjectiveName,
    OptimConfig,
)
from pretrain.engine.accumulation import Gradients
from pretrain.engine.device import choose_device, uses_bf16
from pretrain.engine.optim import make_optimizer
from pretrain.features.feature_augmentation import AugmentationContext, FeatureAugmenter
from pretrain.features.row_random import RowRandom, fa_generator
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.method_spec import refuse_without_gradient, resolve

ARCHITECTURES = ("basic", "pre", "post", "parallel")
METHODS: dict[str, dict[str, Any]] = {
    "identity": {},
    **{name: {} for name in ("nn", "mask", "noise", "mixup", "cutmix", "extrapolate")},
    "nn+mixup": {},
    "nn|mask": {},
    "nn-consensus": {"top_k": 8, "nn_choice": "consensus"},
    "nn-truncated": {"nn_distance": "truncated"},
    "nn@4": {"top_k": 4, "num_features": 4},
    "mask@4": {"num_features": 4},
}
GOALS = {"cpu": {1: 0.05, 4: 0.05}, "cuda": {1: 0.01, 4: 0.03}}  # share of a step, by num_features
DEFAULT_CELLS = "byol/parallel/*,infonce/parallel/nn,infonce/parallel/nn@4"
EXAMPLE = """\
A cell is BASE/ARCHITECTURE/METHOD, as byol/parallel/nn; METHOD@4 makes 4 features per sample.
bases: {bases}; architectures: {architectures};
methods: {methods}

example:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fa_overhead.py --json fa.json --cells '*/*/nn'
Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
""".format(
    bases=", ".join(get_args(ObjectiveName)),
    architectures=", ".join(ARCHITECTURES),
    methods=", ".join(METHODS),
)


@dataclass(frozen=True)
class Sizes:
    """What a step works on; the defaults are those of a CPU."""

    depth: int = 18
    width: int = 64
    image_size: int = 64  # pixels
    batch_size: int = 128
    queue_size: int = 16384
    dim: int = 256
    hidden_dim: int = 4096

    def arch(self) -> Arch:
        """The ResNet."""
        last = 4 * self.width if self.depth == 50 else self.width
        return Arch(self.depth, self.width, self.width, last)  # type: ignore[arg-type]

    def heads(self) -> HeadConfig:
        """Projector and predictor."""
        return HeadConfig(
            projector_hidden_dim=self.hidden_dim,
            predictor_hidden_dim=self.hidden_dim,
            output_dim=self.dim,
        )

    def fa(self, architecture: Any, method: str) -> FAConfig:
        """The FA of a cell, from its method's name."""
        name = "none" if method == "none" else method.split("@")[0].split("-")[0]
        return FAConfig(
            method=name, architecture=architecture, queue_size=self.queue_size,
            min_fill=min(1024, self.queue_size), **METHODS.get(method, {}),
        )  # fmt: skip


CUDA_SIZES = Sizes(depth=50, image_size=224, batch_size=256, queue_size=98304)


class Clock:
    """Milliseconds per call: CUDA events, processor time of one thread, or wall-clock time."""

    def __init__(self, device: torch.device, num_calls: int) -> None:
        self.device, self.num_calls = device, num_calls
        self.name = "cuda events" if device.type == "cuda" else "wall"
        if device.type == "cpu" and torch.get_num_threads() == 1:
            self.name = "processor"

    def __call__(self, work: Callable[[], None]) -> float:
        """Run it ``num_calls`` times without waiting in between."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                before.record()
                self._run(work)
                after.record()
                torch.cuda.synchronize()
                return before.elapsed_time(after) / self.num_calls
        now = time.process_time if self.name == "processor" else time.perf_counter
        start = now()
        self._run(work)
        return 1e3 * (now() - start) / self.num_calls

    def _run(self, work: Callable[[], None]) -> None:
        for _ in range(self.num_calls):
            work()


class Group:
    """The cells of one base method and architecture: one network, an augmenter for each."""

    def __init__(
        self, base: Any, architecture: str, methods: list[str], sizes: Sizes, device: torch.device
    ) -> None:
        self.name, self.sizes, self.device = f"{base}/{architecture}", sizes, device
        self.objective = ObjectiveConfig(name=base, num_negatives=sizes.queue_size)
        self.fa = {method: sizes.fa(architecture, method) for method in ["none", *methods]}
        self.augmenters = {
            method: FeatureAugmenter(fa, sizes.dim).to(device) for method, fa in self.fa.items()
        }
        self.model = FAContrastive(sizes.arch(), sizes.heads(), self.objective, self.fa["none"])
        self.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        is_bf16 = uses_bf16("auto", device)
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
        self._fill_queues()

    def _fill_queues(self) -> None:
        entries = torch.randn(2, self.sizes.queue_size, self.sizes.dim, device=self.device)
        self.model.objective.put(entries)
        for augmenter in self.augmenters.values():
            if augmenter.queue is not None:
                augmenter.queue.put(entries[0])

    def use(self, method: str) -> None:
        """Make the network that of the cell with this method."""
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
        draw, augmenter = AugmentationContext(random, 1.0), self.model.augmenter
        augmenter(self.features[0], self.features[1], draw)
        augmenter(self.features[1], self.features[0], draw)
        if augmenter.queue is not None:
            augmenter.queue.put(self.features[0], self.notes, self.notes)

    def _generator(self) -> torch.Generator:
        return fa_generator(0, self.num_steps, self.device)


@dataclass
class Times:
    """Milliseconds of a cell, one entry for each round."""

    step: list[float] = field(default_factory=list)
    fa: list[float] = field(default_factory=list)


def measure(group: Group, clock: Clock, num_rounds: int, fa_repeats: int, bar: tqdm) -> dict:
    """Times of the baseline and each cell of a group; a first round warms up."""
    times = {method: Times() for method in group.fa}
    for number in range(num_rounds + 1):
        for method, cell in times.items():
            bar.set_postfix_str(f"{group.name}/{method}")
            group.use(method)
            step = clock(group.step)
            fa = [clock(group.augment) for _ in range(fa_repeats)] if method != "none" else []
            if number:
                cell.step.append(step)
                cell.fa += fa
            bar.update()
    return times


def figures_of(times: dict[str, Times]) -> dict[str, dict[str, Any]]:
    """What is reported of each cell of a group, from the times of its baseline and its own."""
    baseline = times["none"].step
    middle = statistics.median(baseline)
    figures = {}
    for method, cell in times.items():
        if method == "none":
            continue
        ratios = [own / none for own, none in zip(cell.step, baseline, strict=True)]
        fa_ms = statistics.median(cell.fa)
        figures[method] = {
            "ms": statistics.median(cell.step),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "baseline_ms": middle,
            "fa_ms": fa_ms,
            "fa_share": fa_ms / middle,
            "num_features": METHODS[method].get("num_features", 1),
        }
    return figures


def chosen_cells(patterns: str) -> tuple[dict[tuple[str, str], list[str]], dict[str, str]]:
    """Cells that a comma-separated list of patterns names, by group; and those that cannot train.

    Raises:
        UserError: If a pattern names no cell that exists, or none of them can train.
    """
    names = [
        f"{base}/{architecture}/{method}"
        for base in get_args(ObjectiveName)
        for architecture in ARCHITECTURES
        for method in METHODS
    ]
    wanted: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(
                f"--cells: {pattern!r} names no cell; a cell is BASE/ARCHITECTURE/METHOD, as "
                "byol/parallel/nn (--help lists them)"
            )
        wanted.update(found)
    groups: dict[tuple[str, str], list[str]] = {}
    refused = {}
    tiny = Sizes(width=4, queue_size=64, dim=8, hidden_dim=8)
    for name in (name for name in names if name in wanted):
        base, architecture, method = name.split("/")
        objective: Any = ObjectiveConfig(name=base)  # type: ignore[arg-type]
        try:
            refuse_without_gradient(objective, tiny.fa(architecture, method))
        except UserError as error:
            refused[name] = str(error)
        else:
            groups.setdefault((base, architecture), []).append(method)
    if not groups:
        raise UserError(f"--cells: none of these can train: {next(iter(refused.values()))}")
    return groups, refused


def run(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Measure the chosen cells; the figures for JSON."""
    groups, refused = chosen_cells(options.cells)
    num_calls = options.calls or (10 if device.type == "cuda" else 1)
    clock = Clock(device, num_calls)
    cells, baselines, precision, load = {}, {}, "", os.getloadavg()[0]
    total = sum(len(methods) + 1 for methods in groups.values()) * (options.repeats + 1)
    with tqdm(total=total, unit="cell", mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        for (base, architecture), methods in groups.items():
            group = Group(base, architecture, methods, sizes, device)
            found = figures_of(measure(group, clock, options.repeats, options.fa_repeats, bar))
            cells |= {f"{group.name}/{method}": figures for method, figures in found.items()}
            baselines[group.name] = next(iter(found.values()))["baseline_ms"]
            precision = group.precision
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "baseline_ms": min(baselines.values()),
        "cells": cells,
        "baselines": baselines,
        "refused": refused,
        "goals": {str(num): goal for num, goal in GOALS[device.type].items()},
        "sizes": asdict(sizes),
        "precision": precision,
        "clock": clock.name,
        "num_rounds": options.repeats,
        "fa_repeats": options.fa_repeats,
        "calls_per_timing": num_calls,
        "num_threads": torch.get_num_threads(),
        "load_average": [load, os.getloadavg()[0]],
        "versions": versions(),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLE, (
        ("repeats", 5, "rounds"),
        ("fa-repeats", 20, "of FA alone, per round"),
        ("calls", 0, "steps in one timing; 0: 1 on a CPU, 10 on a GPU"),
    ))  # fmt: skip
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--cells", default=DEFAULT_CELLS, metavar="PATTERNS",
        help="comma-separated, with * and ? (default: %(default)s)")  # fmt: skip
    add_sizes(parser, asdict(Sizes()), asdict(CUDA_SIZES))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(argv)

    def measured() -> dict[str, Any]:
        device = choose_device(options.device)
        default = CUDA_SIZES if device.type == "cuda" else Sizes()
        given = {name: getattr(options, name) for name in asdict(default)}
        sizes = replace(default, **{k: v for k, v in given.items() if v is not None})
        if min(options.repeats, options.fa_repeats, *asdict(sizes).values()) < 1:
            raise UserError("--repeats, --fa-repeats and all sizes must be at least 1")
        if options.calls < 0 or sizes.batch_size < 2 or sizes.queue_size < 64:
            raise UserError("--calls must be 0 or more, --batch-size >= 2, --queue-size >= 64")
        return run(options, sizes, device)

    return run_and_report(measured, options.json)


if __name__ == "__main__":
    sys.exit(main())
