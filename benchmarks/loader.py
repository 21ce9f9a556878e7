"""Speed of the loader: decoding alone, our two views, and the same recipe of other libraries.

All figures are source pictures (each gives two views) per second of processor time of one thread,
medians over rounds in which every candidate takes its turn: what else the machine does disturbs
them little. Libraries of the rivals live in an environment of their own
(benchmarks/peers/make_env.sh); without --peers only torchvision is compared. --workers adds
rates in wall-clock time.
"""

import argparse
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
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

from benchmarks.harness import (
    Candidate,
    Peer,
    chosen_photos,
    finish,
    in_process,
    make_parser,
    open_as_shards,
    rates,
    run_and_report,
    start_peers,
    two_view_dataset,
    versions,
    write_files,
)
from benchmarks.peers.torchvision_recipes import PillowViews
from pretrain.data.loader import Loader
from pretrain.data.shards import ShardIndex

Work = Callable[[], object]

EXAMPLE = """\
examples:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/loader.py --json loader.json
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/loader.py --json loader.json \\
      --peers /tmp/peers/bin/python --workers 2
Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
"""
SIZES = (224, 64)  # pixels; other libraries than torchvision at the first only
EPOCHS_OF = 8  # our loader's epoch holds each picture so often, as training's are long too
TURN_SECONDS = 0.3  # at least, for fast candidates
CROPS, WHOLE = "two crops, uint8, {} px", "whole recipe, uint8 in the loader, {} px"
PILLOW, LIGHTLY = "torchvision v1 on Pillow, {} px", "lightly, {} px"
OWN_BLUR = "torchvision v1 on Pillow, its own blur, {} px"
WALL_SIZE, WALL_BATCH = 224, 64
TORCHVISION = "torchvision v1 on Pillow, DataLoader"


def decoders(jpegs: list[bytes]) -> dict[str, Work]:
    """Decoding alone, by every decoder at hand, from bytes in memory."""

    def run(decode: Callable[[bytes], Any]) -> Work:
        def all_of_them() -> None:
            for data in jpegs:
                decode(data)

        return all_of_them

    def fastest(data: bytes) -> Any:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True)

    def with_torchvision(data: bytes) -> Any:
        array = np.frombuffer(bytearray(data), np.uint8)
        return torchvision.io.decode_jpeg(torch.from_numpy(array))

    found = {
        "simplejpeg": run(lambda data: simplejpeg.decode_jpeg(data, "RGB")),
        "simplejpeg, fast DCT": run(lambda data: simplejpeg.decode_jpeg(data, "RGB", fastdct=True)),
        "simplejpeg, fast DCT and upsampling": run(fastest),
        "OpenCV": run(lambda d: cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR_RGB)),
        "Pillow": run(lambda data: np.asarray(Image.open(io.BytesIO(data)))),
    }
    if hasattr(torchvision.io, "decode_jpeg"):  # deprecated since 0.29, to be removed one day
        warnings.filterwarnings("ignore", message="The image decoding and encoding cap")
        found["torchvision"] = run(with_torchvision)
    if importlib.util.find_spec("turbojpeg") is not None:  # PyTurboJPEG, if somebody installed it
        import turbojpeg  # pyright: ignore[reportMissingImports]

        flags = turbojpeg.TJFLAG_FASTDCT | turbojpeg.TJFLAG_FASTUPSAMPLE
        turbo = turbojpeg.TurboJPEG()
        found["PyTurboJPEG, fast DCT and upsampling"] = run(
            lambda data: turbo.decode(data, pixel_format=turbojpeg.TJPF_RGB, flags=flags)
        )
    return found


class OurLoader:
    """Epochs through shards in this process: read, decode, crop twice; maybe all the rest.

    Args:
        index: The shards.
        size: Side of a view in pixels.
        batch_size: Samples in a batch.
        in_workers: Photometric changes are done by the loader, on uint8.
        is_whole: Views become normalised floats, with the photometric changes that are left.
    """

    def __init__(
        self, index: ShardIndex, size: int, batch_size: int, *, in_workers: bool, is_whole: bool
    ) -> None:
        dataset = two_view_dataset(index, size, in_workers=in_workers)
        self.loader, self.is_whole, self.epoch = Loader(dataset, batch_size=batch_size), is_whole, 0

    def __call__(self) -> None:
        """One epoch."""
        for batch in self.loader.epoch(self.epoch):
            if self.is_whole:
                finish(batch)
        self.epoch += 1


def ours(index: ShardIndex, batch_size: int) -> dict[str, Work]:
    """Our loader in its stages and ways."""
    found: dict[str, Work] = {}
    for size in (224, 64):
        for name, in_workers, is_whole in (
            ("two crops, uint8", False, False),
            ("whole recipe, uint8 in the loader", True, True),
            ("whole recipe, float in batches", False, True),
        ):
            found[f"{name}, {size} px"] = OurLoader(
                index, size, batch_size, in_workers=in_workers, is_whole=is_whole
            )
    return found


def peer_candidates(peers: dict[str, Peer]) -> dict[str, Candidate]:
    """The rivals' recipes, by name."""
    found = {}
    for library, peer in peers.items():
        for size in SIZES if library == "torchvision" else SIZES[:1]:
            for recipe in peer.recipes:
                found[f"{recipe}, {size} px"] = peer.candidate(recipe, size)
    return found


def measure(
    jpegs: list[bytes], folder: Path, python: str | None, num_rounds: int, batch_size: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str], dict[str, str]]:
    """All candidates in turns.

    Returns:
        {group: {name: rates}} of decoders, ours, peers; versions of the rivals' libraries; why
        libraries are left out.
    """
    files = write_files(jpegs, folder / "files")
    index = open_as_shards(files, folder / "shards", EPOCHS_OF * len(files))
    peers = start_peers(python, folder / "files")
    try:
        works = {"decoders": decoders(jpegs), "ours": ours(index, batch_size)}
        sizes = {"decoders": len(jpegs), "ours": index.num_samples}
        groups: dict[str, dict[str, Candidate]] = {
            group: {
                name: in_process(work, sizes[group], TURN_SECONDS) for name, work in found.items()
            }
            for group, found in works.items()
        }
        groups["peers"] = peer_candidates(peers)
        flat = {f"{group}/{name}": turn for group in groups for name, turn in groups[group].items()}
        measured = rates(flat, num_rounds)
    finally:
        for peer in peers.values():
            peer.close()
        index.close()
    versions = {library: peer.version for library, peer in peers.items() if not peer.missing}
    left_out = {library: peer.missing for library, peer in peers.items() if peer.missing}
    by_group = {g: {name: measured[f"{g}/{name}"] for name in groups[g]} for g in groups}
    return by_group, versions, left_out


def result(measured: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The figures for JSON; shares and ratios of medians of the same run."""
    median = {
        group: {name: statistics.median(values) for name, values in found.items()}
        for group, found in measured.items()
    }
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
        "spread": {
            group: {name: [min(values), max(values)] for name, values in found.items()}
            for group, found in measured.items()
        },
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
    index = open_as_shards(files, folder, num_pictures)
    theirs = DataLoader(  # a folder of pictures as torchvision's users read it
        PillowViews([str(path) for path in files], WALL_SIZE, num_pictures),
        batch_size=WALL_BATCH, shuffle=True, drop_last=True, num_workers=num_workers,
        persistent_workers=True, worker_init_fn=_one_thread,
    )  # fmt: skip
    epochs: dict[str, Callable[[int], object]] = {
        "ours, uint8 in the workers": _our_epochs(index, num_workers, in_workers=True),
        "ours, float in batches": _our_epochs(index, num_workers, in_workers=False),
        TORCHVISION: lambda _: [None for _batch in theirs],
    }
    steps = num_pictures // WALL_BATCH * WALL_BATCH
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
    dataset = two_view_dataset(index, WALL_SIZE, in_workers=in_workers)
    loader = Loader(dataset, batch_size=WALL_BATCH, num_workers=num_workers)

    def run(epoch: int) -> None:
        for batch in loader.epoch(epoch):
            finish(batch)

    return run


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def context(jpegs: list[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "num_rounds": options.num_rounds,
        "num_photos": len(jpegs),
        "batch_size": options.batch_size,
        "pictures": "generated" if options.pictures is None else "folder",
        "mean_kilobytes": sum(map(len, jpegs)) / len(jpegs) / 1e3,
        "load_average": os.getloadavg()[0],
        "versions": {
            **versions(),
            "torchvision": torchvision.__version__,
            "opencv": cv2.__version__,
            "simplejpeg": simplejpeg.__version__,
            "pillow": pillow_version,
        },
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = make_parser(__doc__, EXAMPLE, (
        ("num-photos", 64, "photographs"),
        ("batch-size", 64, "of our loader"),
        ("num-rounds", 5, "turns of each candidate"),
        ("workers", 0, "also rates through N worker processes, in wall-clock time"),
        ("epoch-pictures", 1024, "pictures per epoch with --workers"),
    ))  # fmt: skip
    real = "real pictures, shrunk to 500 x 375; default: generated ones"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=real)
    environment = "interpreter of the rivals' environment (peers/make_env.sh)"
    parser.add_argument("--peers", metavar="PYTHON", help=environment)
    options = parser.parse_args(arguments)
    if options.batch_size < 16 or options.batch_size % 16 or options.num_rounds < 1:
        parser.error("--batch-size must be a multiple of 16, --num-rounds at least 1")
    if options.num_photos < options.batch_size or options.num_photos % options.batch_size:
        parser.error(f"--num-photos must be a multiple of the batch size, {options.batch_size}")
    if options.workers and options.epoch_pictures < WALL_BATCH:
        parser.error(f"--epoch-pictures must fill a batch of {WALL_BATCH}")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; the figures for JSON."""
    jpegs = chosen_photos(options.pictures, options.num_photos)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured, versions, left_out = measure(
            jpegs, folder, options.peers, options.num_rounds, options.batch_size
        )
        figures = result(measured) | context(jpegs, options)
        figures["versions"].update(versions)
        figures["left_out"] = left_out
        if options.peers is None:
            figures["left_out"]["lightly, NVIDIA DALI, FFCV"] = "no --peers was given"
        files = sorted((folder / "files").iterdir())
        if options.workers:
            figures["workers"] = worker_rates(
                files, folder / "epoch", options.workers, options.epoch_pictures,
                options.num_rounds,
            )  # fmt: skip
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(arguments)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    return run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
