"""Rates in wall-clock time: through worker processes, and into training on a GPU."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.candidates import SEED, finish, two_view_dataset
from benchmarks.fa_overhead import CUDA_SIZES, Group, Sizes
from benchmarks.peers.torchvision_recipes import PillowViews
from benchmarks.pictures import open_as_shards
from pretrain.config import DataConfig
from pretrain.data.stream import Loader
from pretrain.engine.feed import Feed

SIZE, BATCH = 224, 64
TORCHVISION = "torchvision v1 on Pillow, DataLoader"
_GPU_STEPS = 40  # timed steps per turn, after _GPU_WARM_UP
_GPU_WARM_UP = 10


def worker_rates(
    files: Sequence[Path], folder: Path, num_workers: int, num_pictures: int, num_rounds: int
) -> dict[str, Any]:
    """Pictures per second through `num_workers` processes to float views in this process.

    Each loader keeps its workers; they take turns, an epoch each, after one that warms up.

    Args:
        files: JPEGs; they come again until an epoch is full.
        folder: Where our shards are made.
        num_workers: Processes of each loader.
        num_pictures: Length of an epoch.
        num_rounds: Timed epochs of each.
    """
    index = open_as_shards(files, folder, num_pictures)
    theirs = torchvision_loader(files, num_workers, num_pictures, BATCH, SIZE)
    epochs: dict[str, Callable[[int], object]] = {
        "ours, uint8 in the workers": _our_epochs(index, num_workers, in_workers=True),
        "ours, float in batches": _our_epochs(index, num_workers, in_workers=False),
        TORCHVISION: lambda _: [None for _batch in theirs],
    }
    steps = num_pictures // BATCH * BATCH
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for epoch in range(num_rounds + 1):
        for name, run in epochs.items():
            start = time.perf_counter()
            run(epoch)
            if epoch:
                seconds[name].append(time.perf_counter() - start)
    index.close()
    return {
        "num_workers": num_workers,
        "num_pictures": steps,
        "images_per_second": {
            name: steps / statistics.median(taken) for name, taken in seconds.items()
        },
    }


def _our_epochs(index: Any, num_workers: int, *, in_workers: bool) -> Callable[[int], None]:
    dataset = two_view_dataset(index, SIZE, in_workers=in_workers)
    loader = Loader(dataset, batch_size=BATCH, num_workers=num_workers)

    def run(epoch: int) -> None:
        for batch in loader.epoch(epoch):
            finish(batch)

    return run


def torchvision_loader(
    files: Sequence[Path], num_workers: int, num_pictures: int, batch_size: int, size: int
) -> DataLoader:
    """A folder of pictures as torchvision's users read it, with the Pillow recipe."""
    return DataLoader(
        PillowViews([str(path) for path in files], size, num_pictures),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def gpu_rates(
    files: Sequence[Path],
    folder: Path,
    num_workers: int,
    num_rounds: int,
    device: torch.device | None = None,
    sizes: Sizes = CUDA_SIZES,
) -> dict[str, Any]:
    """Our loader beside torchvision's on a GPU, alone and training a ResNet-50.

    Ours: workers crop, pinned memory, photometric changes in batches on the device. torchvision:
    the Pillow recipe in the workers, pinned memory. Training is BYOL without FA; "synthetic" trains
    on views that lie on the device.

    Args:
        files: JPEGs; they come again until an epoch is full.
        folder: Where our shards are made.
        num_workers: Processes of each loader.
        num_rounds: Turns of each.
        device: The GPU by default.
        sizes: Network, batch and size of the views.
    Returns:
        images_per_second {name: rate}, from_shards_share (training from shards / synthetic).
    """
    device, batch_size = device or torch.device("cuda"), sizes.batch_size
    num_pictures = batch_size * (_GPU_STEPS + _GPU_WARM_UP)
    open_as_shards(files, folder / "shards", num_pictures).close()
    data = DataConfig(
        shards=str(folder / "shards"), image_size=sizes.image_size, batch_size=batch_size,
        num_workers=num_workers, photometric="device",
    )  # fmt: skip
    feed = Feed(data, seed=SEED, device=device, channels_last=True, folder=folder)
    theirs = torchvision_loader(files, num_workers, num_pictures, batch_size, sizes.image_size)
    group = Group("byol", "parallel", [], sizes, device)
    group.use("none")
    synthetic = group.views

    def from_feed(epoch: int) -> Iterator[torch.Tensor]:
        return (fed.views for fed in feed.epoch(epoch))

    def from_torchvision(_: int) -> Iterator[torch.Tensor]:
        return (torch.stack([v.to(device, non_blocking=True) for v in views]) for views in theirs)

    def train(views: torch.Tensor) -> None:
        group.views = views
        group.step()

    turns: dict[str, tuple[Callable[[int], Iterator[torch.Tensor]], Callable]] = {
        "ours, loading alone": (from_feed, lambda _: None),
        TORCHVISION: (from_torchvision, lambda _: None),
        "ResNet-50 on synthetic views": (lambda _: itertools.repeat(synthetic), train),
        "ResNet-50 from our shards": (from_feed, train),
    }
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for epoch in range(num_rounds):
        for name, (views, work) in turns.items():
            taken[name].append(_seconds(views(epoch), work, device))
    rate = {n: batch_size * _GPU_STEPS / statistics.median(times) for n, times in taken.items()}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_workers": num_workers,
        "images_per_second": rate,
        "from_shards_share": rate["ResNet-50 from our shards"]
        / rate["ResNet-50 on synthetic views"],
    }


def _seconds(
    views: Iterator[torch.Tensor], work: Callable[[torch.Tensor], None], device: torch.device
) -> float:
    """Wall-clock time of the timed steps, after some that fill the queues."""
    for batch in itertools.islice(views, _GPU_WARM_UP):
        work(batch)
    _wait_for(device)
    start = time.perf_counter()
    for batch in itertools.islice(views, _GPU_STEPS):
        work(batch)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
