"""What the benchmarks share: command line, report, turns of candidates, sizes, pictures.

Candidates take turns, round by round, so that whatever else the machine does hits all alike. What
is counted on a CPU is processor time of a whole process, all
its threads together, so that nobody gains by a thread of its own.
"""

import argparse
import json
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import simplejpeg
import torch
from tqdm import tqdm

from common.errors import command_parser, require, run_command, whole
from common.files import write_json
from common.provenance import versions
from pretrain.collectives import choose_device
from pretrain.data.loader import ViewDataset
from pretrain.data.pack import ShardOptions, SourcePicture, write_shards
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.shards import ShardIndex

HEIGHT, WIDTH, QUALITY = 375, 500, 90
_SPECTRUM = ((4, 45), (8, 35), (16, 25), (32, 18), (64, 12), (128, 9), (250, 6))
VIEWS = AugmentationPolicy.of("asymmetric").views  # BYOL's
SEED = 0
ROOT = Path(__file__).resolve().parents[1]
K = TypeVar("K")
T = TypeVar("T")


# -- command line and report ----------------------------------------------------------------------


def make_parser(
    description: str | None,
    counts: Sequence[tuple[str, int, int, str]],
    *,
    sizes: "Sizes | None" = None,
) -> argparse.ArgumentParser:
    """A parser with ``--json`` and whole numbers.

    Args:
        description: Of the benchmark.
        counts: (name, default, least value, what it is).
        sizes: Adds ``--device`` and an option for each size, None where it is not given: for
            `chosen_sizes`. These are the defaults on a CPU.
    """
    statuses = "Exit status: 0 done, 1 it went wrong, 2 wrong arguments."
    parser = command_parser(f"{description}\n{statuses}")
    add = parser.add_argument
    add("--json", type=Path, metavar="OUT", help="write the figures here too")
    for name, default, least, text in counts:
        text += f"; default: {default}"
        add(f"--{name}", type=whole(least), default=default, metavar="N", help=text)
    if sizes is not None:
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
        for name, value in asdict(CUDA_SIZES).items():
            text = f"{getattr(sizes, name)} on a CPU, {value} on a GPU"
            least = {"batch_size": 2, "image_size": 16, "queue_size": 64}.get(name, 1)
            choices = (18, 34, 50, 101) if name == "depth" else None
            add("--" + name.replace("_", "-"), type=whole(least), metavar="N",
                choices=choices, help=text)  # fmt: skip
    return parser


def run_and_report(
    measure: Callable[[], dict[str, Any]],
    out: Path | None,
    text_of: Callable[[dict[str, Any]], str] = lambda figures: json.dumps(figures, indent=1),
) -> int:
    """Measure, write the figures, print them.

    Args:
        measure: Returns the figures, by name.
        out: The file of ``--json``.
        text_of: What is printed of them.
    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
    """

    def work() -> None:
        has_folder = out is None or out.absolute().parent.is_dir()
        require(has_folder, f"--json {out}: its folder does not exist")
        figures = measure()
        if out is not None:
            write_json(out, figures)
        print(text_of(figures))

    # A RuntimeError is a GPU without memory, for instance.
    return run_command(work, failures=(RuntimeError,), when_interrupted="stopped")


def context(device: torch.device | None = None, sizes: "Sizes | None" = None) -> dict[str, Any]:
    """What else was going on, with which libraries; where a step ran, and on what."""
    found: dict[str, Any] = {"load_average": os.getloadavg()[0], "versions": versions()}
    if device is not None and sizes is not None:
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        found |= {"sizes": asdict(sizes), "num_threads": torch.get_num_threads()}
    return found


def one_thread() -> None:
    """Let OpenCV and torch work in the calling thread alone."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


# -- turns of candidates --------------------------------------------------------------------------


def take_turns(
    candidates: Mapping[K, Callable[[], T]], num_rounds: int, *, num_warmups: int = 1
) -> dict[K, list[T]]:
    """What each candidate gives in each round; `num_warmups` rounds before them do not count."""
    given: dict[K, list[T]] = {name: [] for name in candidates}
    total = (num_rounds + num_warmups) * len(candidates)
    with tqdm(total=total, unit="turn", mininterval=1 if sys.stderr.isatty() else 10) as bar:
        for number in range(-num_warmups, num_rounds):
            for name, turn in candidates.items():
                bar.set_postfix_str(str(name))
                value = turn()
                if number >= 0:
                    given[name].append(value)
                bar.update()
    return given


class Clock:
    """Milliseconds per call: CUDA events, processor time of one thread, or wall-clock time."""

    def __init__(self, device: torch.device, num_calls: int) -> None:
        is_single = torch.get_num_threads() == 1
        names = {"cuda": "cuda events", "cpu": "processor" if is_single else "wall"}
        self.name, self.num_calls = names[device.type], num_calls

    def __call__(self, work: Callable[[], None]) -> float:
        """Run it ``num_calls`` times without waiting in between."""
        num = self.num_calls
        if self.name == "cuda events":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            before.record()
            for _ in range(num):
                work()
            after.record()
            torch.cuda.synchronize()
            return before.elapsed_time(after) / num
        now = time.process_time if self.name == "processor" else time.perf_counter
        return 1e3 * timeit.timeit(work, timer=now, number=num) / num


def medians(rounds: Mapping[K, Sequence[float]]) -> dict[K, float]:
    """The median over the rounds of each candidate."""
    return {name: statistics.median(values) for name, values in rounds.items()}


def ranges(rounds: Mapping[K, Sequence[float]]) -> dict[K, list[float]]:
    """Smallest and largest value over the rounds of each candidate."""
    return {name: [min(values), max(values)] for name, values in rounds.items()}


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Ratios of two candidates, round by round."""
    return [a / b for a, b in zip(of, to, strict=True)]


# -- sizes of networks and batches ----------------------------------------------------------------


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


CUDA_SIZES = Sizes(depth=50, image_size=224, batch_size=256, queue_size=98304)


def chosen_sizes(options: argparse.Namespace, cpu: Sizes) -> tuple[torch.device, Sizes]:
    """The device, and the sizes that were given or are usual there."""
    device = choose_device(options.device)
    given = {name: getattr(options, name) for name in asdict(cpu)}
    given = {name: value for name, value in given.items() if value is not None}
    return device, replace(CUDA_SIZES if device.type == "cuda" else cpu, **given)


# -- pictures and shards --------------------------------------------------------------------------


def encoded_photos(num: int) -> list[bytes]:
    """Generated photographs, 500 x 375 with real ones' falling spectrum, as 52-kB JPEGs."""
    found = []
    for seed in range(num):
        rng = np.random.default_rng(seed)
        image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
        for cells, amplitude in _SPECTRUM:
            noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
            noise = 0.3 * noise + 0.7 * noise.mean(axis=2, keepdims=True)
            image += amplitude * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        image += 3 * rng.standard_normal((HEIGHT, WIDTH, 1)).astype(np.float32)
        found.append(encode(np.clip(image, 0, 255).astype(np.uint8)))
    return found


def encode(image: np.ndarray) -> bytes:
    """JPEG of quality 90 with halved colour planes, as cameras and ImageNet have it."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", "420")


def open_as_shards(
    jpegs: Sequence[bytes], folder: Path, num_samples: int, per_shard: int = 1000
) -> ShardIndex:
    """Shards of pictures; each comes several times, under other names, to reach `num_samples`.

    ``files`` in the folder holds one file for each picture, ``shards`` the shards.
    """
    (folder / "files").mkdir()
    for number, data in enumerate(jpegs):
        (folder / "files" / f"{number:05d}.jpg").write_bytes(data)
    pictures = [
        SourcePicture(str(folder / "files" / f"{i % len(jpegs):05d}.jpg"), f"{i:07d}.jpg")
        for i in range(num_samples)
    ]
    options = ShardOptions(max_samples_per_shard=per_shard)
    write_shards(pictures, folder / "shards", options=options)
    return ShardIndex.open(str(folder / "shards"))


def two_view_dataset(index: ShardIndex, size: int, *, in_workers: bool) -> ViewDataset:
    """BYOL's two views; photometric changes in the loader on uint8, or none yet."""
    return ViewDataset(index, image_size=size, views=VIEWS, seed=SEED, with_colours=in_workers)
