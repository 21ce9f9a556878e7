"""Speed of the loader: decoding alone, our two views, and the same recipe of other libraries.

All figures are source pictures (each gives two views) per second of processor time of one thread,
medians over rounds in which every candidate takes its turn: what else the machine does disturbs
them little. The other libraries live in an environment of their own
(benchmarks/peers/make_env.sh); without --peers only torchvision is compared. --workers adds
rates in wall-clock time.

Examples:
  export OMP_NUM_THREADS=1
  .venv/bin/python benchmarks/loader.py --json loader.json
  .venv/bin/python benchmarks/loader.py --json loader.json --peers /tmp/peers/bin/python --workers 2
"""

import argparse
import io
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image
from PIL import __version__ as pillow_version
from torch.utils.data import DataLoader

from benchmarks import harness
from benchmarks.harness import SEED, VIEWS, two_view_dataset
from benchmarks.peers.transform_recipes import MEAN, STD, PillowViews
from pretrain.data.input_pipeline import augment, normalize
from pretrain.data.loader import Loader, ViewBatch
from pretrain.data.policy import draw_parameters
from pretrain.data.shards import ShardIndex

Work = Callable[[], object]
Rates = dict[str, dict[str, list[float]]]  # of each round, by group and name

SIZES = (224, 64)  # pixels; other libraries than torchvision at the first only
EPOCHS_OF = 8  # our loader's epoch holds each picture so often, as training's are long too
TURN_SECONDS = 0.3  # at least, for fast candidates
CROPS, WHOLE = "two crops, uint8, {} px", "whole recipe, uint8 in the loader, {} px"
FLOAT = "whole recipe, float in batches, {} px"
PILLOW, LIGHTLY = "torchvision v1 on Pillow, {} px", "lightly, {} px"
OWN_BLUR = "torchvision v1 on Pillow, its own blur, {} px"
WALL_SIZE, WALL_BATCH = 224, 64
TORCHVISION = "torchvision v1 on Pillow, DataLoader"


def decoders(jpegs: list[bytes]) -> dict[str, Work]:
    """Decoding alone, by every decoder at hand, from bytes in memory."""
    simple = partial(simplejpeg.decode_jpeg, colorspace="RGB")
    found: dict[str, Callable[[bytes], Any]] = {
        "simplejpeg": simple,
        "simplejpeg, fast DCT": partial(simple, fastdct=True),
        "simplejpeg, fast DCT and upsampling": partial(simple, fastdct=True, fastupsample=True),
        "OpenCV": lambda d: cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR_RGB),
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data))),
    }
    if hasattr(torchvision.io, "decode_jpeg"):  # deprecated since 0.29, to be removed one day
        warnings.filterwarnings("ignore", message="The image decoding and encoding cap")
        found["torchvision"] = lambda data: torchvision.io.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
        )

    def decode_all(decode: Callable[[bytes], Any]) -> None:
        for data in jpegs:
            decode(data)

    return {name: partial(decode_all, decode) for name, decode in found.items()}


def epochs(
    index: ShardIndex, size: int, batch_size: int, *, in_workers: bool, is_whole: bool,
    num_workers: int = 0,
) -> Work:  # fmt: skip
    """Read, decode, crop twice: an epoch for each call; `is_whole`: up to normalised floats."""
    dataset = two_view_dataset(index, size, in_workers=in_workers)
    loader = Loader(dataset, batch_size=batch_size, num_workers=num_workers)
    numbers = itertools.count()

    def epoch() -> None:
        for batch in loader.epoch(next(numbers)):
            if is_whole:
                finish(batch)

    return epoch


def finish(batch: ViewBatch) -> list[torch.Tensor]:
    """What is left to do with a batch of the loader: both views as normalised floats."""
    if batch.is_augmented:
        return [normalize(view, MEAN, STD) for view in batch.views]
    return [
        augment(
            view,
            draw_parameters(
                VIEWS[n], batch.sample_hashes.numpy(), batch.repeats.numpy(), seed=SEED,
                view_index=n,
            ),
            MEAN, STD,
        )
        for n, view in enumerate(batch.views)
    ]  # fmt: skip


def ours(index: ShardIndex, batch_size: int) -> dict[str, Work]:
    """Our loader in its stages and ways, in this process."""
    ways = {CROPS: (False, False), WHOLE: (True, True), FLOAT: (False, True)}
    return {
        name.format(size): epochs(index, size, batch_size, in_workers=worker, is_whole=whole)
        for size, (name, (worker, whole)) in itertools.product((224, 64), ways.items())
    }


def measure(
    jpegs: list[bytes], folder: Path, python: str | None, num_rounds: int, batch_size: int
) -> tuple[Rates, dict[str, str], dict[str, str]]:
    """All candidates in turns.

    Returns:
        Rates of decoders, ours, peers; versions of the peers' libraries; why libraries are left
        out.
    """
    files = harness.write_files(jpegs, folder / "files")
    index = harness.open_as_shards(files, folder / "shards", EPOCHS_OF * len(files))
    works = {("decoders", name): (work, len(jpegs)) for name, work in decoders(jpegs).items()}
    works |= {
        ("ours", name): (work, index.num_samples) for name, work in ours(index, batch_size).items()
    }
    turns = {key: harness.picture_rate(*work, TURN_SECONDS) for key, work in works.items()}
    with harness.start_peers(python, folder / "files") as peers:
        for library, peer in peers.items():
            for size in SIZES if library == "torchvision" else SIZES[:1]:
                for recipe in peer.recipes:
                    turns["peers", f"{recipe}, {size} px"] = peer.candidate(recipe, size)
        measured = harness.take_turns(turns, num_rounds)
        versions = {library: peer.version for library, peer in peers.items() if not peer.missing}
        left_out = {library: peer.missing for library, peer in peers.items() if peer.missing}
    index.close()
    groups: Rates = {"decoders": {}, "ours": {}, "peers": {}}
    for (group, name), values in measured.items():
        groups[group][name] = values
    return groups, versions, left_out


def result(measured: Rates) -> dict[str, Any]:
    """The figures for JSON; shares and ratios of medians of the same run."""
    median = {group: harness.medians(found) for group, found in measured.items()}
    own, peers, ceiling = median["ours"], median["peers"], max(median["decoders"].values())

    def ratio(recipe: str, size: int) -> float | None:
        rival = peers.get(recipe.format(size))
        return None if rival is None else own[WHOLE.format(size)] / rival

    return {
        "ceiling": ceiling,
        "loader_share": own[CROPS.format(224)] / ceiling,
        "loader_share_64": own[CROPS.format(64)] / ceiling,
        "cpu_vs_pil": ratio(PILLOW, 224),
        "cpu_vs_pil_64": ratio(PILLOW, 64),
        "cpu_vs_pil_own_blur": ratio(OWN_BLUR, 224),
        "cpu_vs_lightly": ratio(LIGHTLY, 224),
        **median,
        "spread": {group: harness.ranges(found) for group, found in measured.items()},
    }


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
    index = harness.open_as_shards(files, folder, num_pictures)
    theirs = DataLoader(  # a folder of pictures as torchvision's users read it
        PillowViews([str(path) for path in files], WALL_SIZE, num_pictures),
        batch_size=WALL_BATCH, shuffle=True, drop_last=True, num_workers=num_workers,
        persistent_workers=True, worker_init_fn=_one_thread,
    )  # fmt: skip
    works: dict[str, Work] = {
        f"ours, {name}": epochs(
            index, WALL_SIZE, WALL_BATCH, in_workers=is_uint8, is_whole=True,
            num_workers=num_workers,
        )
        for name, is_uint8 in (("uint8 in the workers", True), ("float in batches", False))
    }  # fmt: skip
    works[TORCHVISION] = lambda: [None for _batch in theirs]
    num_whole = num_pictures // WALL_BATCH * WALL_BATCH

    def rate(work: Work) -> float:
        start = time.perf_counter()
        work()
        return num_whole / (time.perf_counter() - start)

    turns = {name: partial(rate, work) for name, work in works.items()}
    rates = harness.take_turns(turns, num_rounds)
    index.close()
    return {
        "num_workers": num_workers,
        "num_pictures": num_whole,
        "images_per_second": harness.medians(rates),
    }


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; the figures for JSON."""
    jpegs = harness.chosen_photos(options.pictures, options.num_photos)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured, versions, left_out = measure(
            jpegs, folder, options.peers, options.num_rounds, options.batch_size
        )
        if options.peers is None:
            left_out["lightly, NVIDIA DALI, FFCV"] = "no --peers was given"
        figures = result(measured) | {
            "num_rounds": options.num_rounds,
            "num_photos": len(jpegs),
            "batch_size": options.batch_size,
            "pictures": "generated" if options.pictures is None else "folder",
            "mean_kilobytes": sum(map(len, jpegs)) / len(jpegs) / 1e3,
            **harness.context(),
            "left_out": left_out,
        }
        figures["versions"] |= {"opencv": cv2.__version__, "pillow": pillow_version} | versions
        if options.workers:
            files = sorted((folder / "files").iterdir())
            figures["workers"] = worker_rates(
                files, folder / "epoch", options.workers, options.epoch_pictures,
                options.num_rounds,
            )  # fmt: skip
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (
        ("num-photos", 64, 1, "photographs"),
        ("batch-size", 64, 16, "of our loader"),
        ("num-rounds", 5, 1, "turns of each candidate"),
        ("workers", 0, 0, "also rates through N worker processes, in wall-clock time"),
        ("epoch-pictures", 1024, WALL_BATCH, "pictures per epoch with --workers"),
    )
    parser = harness.make_parser(__doc__, counts)
    harness.add_pictures(parser)
    environment = "interpreter of the other libraries' environment (peers/make_env.sh)"
    parser.add_argument("--peers", metavar="PYTHON", help=environment)
    options = parser.parse_args(arguments)
    if options.batch_size % 16:
        parser.error("--batch-size must be a multiple of 16")
    if options.num_photos < options.batch_size or options.num_photos % options.batch_size:
        parser.error(f"--num-photos must be a multiple of the batch size, {options.batch_size}")
    harness.one_thread()
    return harness.run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
