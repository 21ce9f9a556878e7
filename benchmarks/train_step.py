"""Images per second of a BYOL step: the engine's own, a plain one, and two libraries' recipes.

Four arms start from the same weights and the same synthetic batch on the device; before anything is
timed their losses are compared in fp32. They take turns, round by round, so that whatever else the
machine does hits all alike (benchmarks/step_arms.py says what each does). Then the engine's step is
fed from shards by its own loader.

"images_per_second" are medians over rounds, "ratios" medians of ours / rival in the same round.
"mfu": FLOPs of the plain step over the rate that --peak-tflops states for the device.
"from_shards_share": the rate from shards over the rate on synthetic data, wall-clock time.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from benchmarks.fa_overhead import CUDA_SIZES, Clock, Sizes
from benchmarks.harness import (
    add_sizes,
    encoded_photos,
    make_parser,
    open_as_shards,
    run_and_report,
    synchronize,
    versions,
    write_files,
)
from benchmarks.step_arms import Arm, Ours, check_same_loss, make_arms
from common.config import to_plain
from common.errors import UserError
from pretrain.config import (
    DataConfig,
    EngineConfig,
    EvalConfig,
    FAConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    load_config,
)
from pretrain.engine.device import choose_device
from pretrain.engine.profiling import batches, count_flops, precision_of
from pretrain.engine.trainer import Trainer
from pretrain.run import make_trainer

EXAMPLE = """\
examples:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/train_step.py --json step.json
  .venv/bin/python benchmarks/train_step.py --json step.json --workers 12 \\
      --set engine.precision=bf16
Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
"""


CPU_SIZES = Sizes(batch_size=32)
BATCHES_PER_EPOCH = 8
_NUM_PHOTOS, _NEVER = 16, 1 << 40


def make_shards(folder: Path, batch_size: int) -> Path:
    """Shards of generated photographs, 500 x 375, some batches of them."""
    files = write_files(encoded_photos(_NUM_PHOTOS), folder / "files")
    open_as_shards(files, folder / "shards", BATCHES_PER_EPOCH * batch_size).close()
    return folder / "shards"


def build_run(
    folder: Path, sizes: Sizes, device: str, num_workers: int, settings: Sequence[str] = ()
) -> Trainer:
    """A run of plain BYOL that never saves, probes or draws pictures.

    Args:
        folder: Holds ``shards``; the run gets a folder of its own there.
        sizes: Of the networks and the batch.
        device: ``auto``, ``cpu`` or ``cuda``.
        num_workers: Of the loader.
        settings: ``key=value`` overrides of the config, e.g. ``fa.method=nn``.
    Raises:
        UserError: If a setting is refused.
    """
    kind: Any = device
    number = sum(1 for _ in folder.glob("run-*"))
    config = PretrainConfig(
        out=str(folder / f"run-{number}"),
        arch=sizes.arch(),
        heads=sizes.heads(),
        data=DataConfig(
            shards=str(folder / "shards"), image_size=sizes.image_size,
            batch_size=sizes.batch_size, num_workers=num_workers, shuffle_window=4096,
        ),
        objective=ObjectiveConfig(name="byol"),
        fa=FAConfig(method="none"),
        optim=OptimConfig(epochs=100_000),
        engine=EngineConfig(
            device=kind, checkpoint_every_steps=_NEVER, log_every_steps=50, watchdog_seconds=0,
        ),
        eval=EvalConfig(num_pictures=0),
    )  # fmt: skip
    path = folder / f"run-{number}.yaml"
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    return make_trainer(load_config(path, settings), resume=False)


def random_views(sizes: Sizes, device: torch.device) -> torch.Tensor:
    """[2, n, 3, s, s], normal, seeded: as normalised pictures would be."""
    shape = (2, sizes.batch_size, 3, sizes.image_size, sizes.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def timed_rounds(
    arms: dict[str, Arm], clock: Clock, num_rounds: int, num_steps: int, num_warmup: int
) -> dict[str, list[float]]:
    """Milliseconds per step of each arm in each round; the first turns warm up."""
    measured: dict[str, list[float]] = {name: [] for name in arms}
    with tqdm(total=num_rounds * len(arms), unit="turn", mininterval=10) as bar:
        for arm in arms.values():
            with arm.flags.kept():
                arm.steps(num_warmup)
        for _ in range(num_rounds):
            for name, arm in arms.items():
                bar.set_postfix_str(name)
                with arm.flags.kept():
                    measured[name].append(clock(partial(arm.steps, num_steps)) / num_steps)
                bar.update()
    return measured


def wall_rates(ours: Ours, num_rounds: int, num_steps: int, num_drained: int) -> dict[str, Any]:
    """Images per second in wall-clock time, on synthetic data and from shards, in turns.

    Batches that the workers made while the other one had its turn are used up first.
    """
    device, batch_size = ours.run.device, ours.run.config.data.batch_size
    stream, found = batches(ours.run), {"synthetic": [], "shards": []}

    def rate(steps: Any) -> float:
        synchronize(device)
        start = time.perf_counter()
        steps()
        synchronize(device)
        return num_steps * batch_size / (time.perf_counter() - start)

    with ours.flags.kept():
        for _ in range(num_rounds):
            found["synthetic"].append(rate(lambda: ours.steps(num_steps)))
            ours.steps_on(islice(stream, num_drained))
            found["shards"].append(rate(lambda: ours.steps_on(islice(stream, num_steps))))
    stream.close()
    return found


def gpu_memory_bytes(arms: dict[str, Arm], device: torch.device) -> dict[str, int]:
    """Each arm's own tensors between steps, and what one more step adds at its peak."""
    found = {}
    for name, arm in arms.items():
        optimizer = arm.run.optimizer if isinstance(arm, Ours) else arm.optimizer
        tensors = [t for network in arm.networks() for t in network.state_dict().values()]
        tensors += [p.grad for n in arm.networks() for p in n.parameters() if p.grad is not None]
        tensors += [
            t for state in optimizer.state.values() for t in state.values()
            if isinstance(t, torch.Tensor)
        ]  # fmt: skip
        own = sum(t.numel() * t.element_size() for t in tensors)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with arm.flags.kept():
            arm.steps(1)
        torch.cuda.synchronize(device)
        found[name] = own + torch.cuda.max_memory_allocated(device) - before
    return found


def result(
    measured: dict[str, list[float]], wall: dict[str, list[float]], sizes: Sizes,
    per_picture: int, peak_tflops: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The figures that are reported, from milliseconds and rates of each round."""
    rates = {n: [1e3 * sizes.batch_size / ms for ms in found] for n, found in measured.items()}
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        name: [own / other for own, other in zip(rates["ours"], rates[name], strict=True)]
        for name in rates
        if name != "ours"
    }
    shares = [a / b for a, b in zip(wall["shards"], wall["synthetic"], strict=True)]
    return {
        "images_per_second": median,
        "mfu": peak_tflops and median["ours"] * per_picture / (1e12 * peak_tflops),
        "from_shards_share": statistics.median(shares),
        "ratios": {f"ours/{name}": statistics.median(values) for name, values in ratios.items()},
        "ratio_range": {f"ours/{n}": [min(v), max(v)] for n, v in ratios.items()},
        "range": {name: [min(values), max(values)] for name, values in rates.items()},
        "wall_images_per_second": {name: statistics.median(v) for name, v in wall.items()},
        "share_range": [min(shares), max(shares)],
        "flops_per_picture": per_picture,
        "peak_tflops": peak_tflops,
    }


def precisions(arms: dict[str, Arm], device: torch.device) -> dict[str, str]:
    """What each arm computes in."""
    found = {}
    for name, arm in arms.items():
        context = arm.run.gradients.autocast() if isinstance(arm, Ours) else arm.autocast()
        with arm.flags.kept():
            found[name] = precision_of(context, device)
    return found


def compare(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The contract's figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder, sizes.batch_size)
        run = build_run(folder, sizes, device.type, options.workers, options.settings)
        arms = make_arms(run, random_views(sizes, device))
        losses = check_same_loss(arms)
        per_picture = count_flops(lambda: arms["eager"].steps(1)) // sizes.batch_size
        clock = Clock(device, 1)
        measured = timed_rounds(arms, clock, options.rounds, options.calls, options.warmup)
        used = precisions(arms, device)
        memory = gpu_memory_bytes(arms, device) if device.type == "cuda" else None
        ours = arms.pop("ours")
        assert isinstance(ours, Ours)
        arms.clear()
        drained = 2 * options.workers + 2
        wall = wall_rates(ours, options.rounds, options.wall_steps, drained)
        run.close()
    return {
        **result(measured, wall, sizes, per_picture, options.peak_tflops),
        "loss_in_fp32": losses,
        "precision": used,
        "gpu_memory_bytes": memory,
        "clock": clock.name,
        "num_rounds": options.rounds,
        "steps_per_turn": options.calls,
        "num_workers": options.workers,
        "settings": options.settings,
    }


def context(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "sizes": asdict(sizes),
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLE, (
        ("rounds", 5, "rounds in which every arm takes its turn"),
        ("warmup", 2, "steps of each arm before the first round (GPU 10)"),
        ("calls", 0, "steps of one turn; 0: 1 on a CPU, 10 on a GPU"),
        ("wall-steps", 0, "steps of one turn from shards; 0: 6 on a CPU, 40 on a GPU"),
        ("workers", 0, "of the loader; 0: one less than cores, at least 1"),
    ))  # fmt: skip
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="of the engine's config, e.g. engine.compile=true; again for more")  # fmt: skip
    add("--peak-tflops", type=float, metavar="X",
        help="dense rate of the device, from its data sheet: the MFU is printed too")  # fmt: skip
    add_sizes(parser, asdict(CPU_SIZES), asdict(CUDA_SIZES))
    return parser


def checked(options: argparse.Namespace) -> tuple[Sizes, torch.device]:
    """The sizes and the device; defaults that depend on the device are filled in.

    Raises:
        UserError: An impossible value.
    """
    device = choose_device(options.device)
    is_gpu = device.type == "cuda"
    given = {name: getattr(options, name) for name in asdict(CUDA_SIZES)}
    sizes = replace(
        CUDA_SIZES if is_gpu else CPU_SIZES, **{k: v for k, v in given.items() if v is not None}
    )
    counts = (options.calls, options.wall_steps, options.workers, options.warmup)
    if options.rounds < 1 or min(counts) < 0 or min(asdict(sizes).values()) < 1:
        raise UserError("--rounds and all sizes must be at least 1, the other numbers 0 or more")
    if sizes.batch_size < 2 or sizes.image_size < 16 or sizes.queue_size < 64:
        raise UserError("--batch-size must be >= 2, --image-size >= 16, --queue-size >= 64")
    if options.peak_tflops is not None and not 0 < options.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops {options.peak_tflops}: must be more than 0")
    options.calls = options.calls or (10 if is_gpu else 1)
    options.warmup = max(options.warmup, 10 if is_gpu else 1)
    options.wall_steps = options.wall_steps or (40 if is_gpu else 6)
    options.workers = options.workers or max(1, (os.cpu_count() or 2) - 1)
    return sizes, device


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; the figures for JSON."""
    sizes, device = checked(options)
    return context(sizes, device) | compare(options, sizes, device)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(argv)
    return run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
