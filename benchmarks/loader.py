"""Speed of the loader: decoding alone, our two views, and the same recipe of other libraries.

All figures are source pictures (each gives two views) per second of processor time of one thread,
medians over rounds in which every candidate takes its turn: what else the machine does disturbs
them little. Libraries of the rivals live in an environment of their own
(benchmarks/peers/make_env.sh); without --peers only torchvision is compared. --workers and --gpu
add rates in wall-clock time.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import simplejpeg
import torch
import torchvision
from PIL import __version__ as pillow_version

from benchmarks.candidates import decoders, ours
from benchmarks.pictures import (
    HEIGHT,
    WIDTH,
    encoded_photos,
    open_as_shards,
    photos_of_folder,
    write_files,
)
from benchmarks.rounds import Candidate, Peer, in_process, rates, start_peers
from benchmarks.wall import BATCH as WALL_BATCH
from benchmarks.wall import gpu_rates, worker_rates
from common.errors import UserError

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
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "opencv": cv2.__version__,
            "simplejpeg": simplejpeg.__version__,
            "pillow": pillow_version,
        },
    }


def print_table(figures: dict[str, Any]) -> None:
    """The table for people."""
    ceiling = figures["ceiling"]
    print(f"one thread, {WIDTH} x {HEIGHT} JPEGs of {figures['mean_kilobytes']:.0f} kB "
          f"({figures['pictures']}), medians of {figures['num_rounds']} rounds, "
          f"load {figures['load_average']:.1f}\n")  # fmt: skip
    print(f"{'':48}{'pictures/s':>11}{'min':>8}{'max':>8}{'of ceiling':>12}")
    for group, label in (("decoders", "decode: "), ("ours", "ours: "), ("peers", "")):
        for name, value in figures[group].items():
            low, high = figures["spread"][group][name]
            print(f"{label + name:48}{value:11.0f}{low:8.0f}{high:8.0f}{value / ceiling:11.0%}")
    print(f"\nloader part (two 224-px crops): {figures['loader_share']:.0%} of the ceiling")
    for key, rival in (
        ("cpu_vs_pil", "torchvision v1 on Pillow at 224 px"),
        ("cpu_vs_pil_64", "torchvision v1 on Pillow at 64 px"),
        ("cpu_vs_pil_own_blur", "the same with torchvision's own blur at 224 px"),
        ("cpu_vs_lightly", "lightly at 224 px"),
    ):
        value = figures[key]
        text = "not compared" if value is None else f"{value:.1f} x"
        print(f"whole recipe on the CPU against {rival}: {text}")
    for library, reason in figures["left_out"].items():
        print(f"left out: {library} ({reason})")


def print_wall(figures: dict[str, Any]) -> None:
    """Rates in wall-clock time."""
    for place in ("workers", "gpu"):
        if place in figures:
            found = figures[place]
            print(f"\nwall-clock time, {found['num_workers']} workers, pictures/s ({place}):")
            for name, value in found["images_per_second"].items():
                print(f"  {name:56}{value:9.0f}")
    if "gpu" in figures:
        print(f"  share of the rate with synthetic data: {figures['gpu']['from_shards_share']:.1%}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind, metavar, text in (
        ("json", Path, "OUT", "write the figures here too"),
        ("pictures", Path, "FOLDER", "real pictures, shrunk to 500 x 375; default: generated ones"),
        ("peers", str, "PYTHON", "interpreter of the rivals' environment (peers/make_env.sh)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    for name, default, text in (
        ("num-photos", 64, "photographs"),
        ("batch-size", 64, "of our loader"),
        ("num-rounds", 5, "turns of each candidate"),
        ("workers", 0, "also rates through N worker processes, in wall-clock time"),
        ("epoch-pictures", 1024, "pictures per epoch with --workers"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    parser.add_argument(
        "--gpu", action="store_true", help="also rates on a GPU with --workers, in wall-clock time"
    )
    options = parser.parse_args(arguments)
    if options.batch_size < 16 or options.batch_size % 16 or options.num_rounds < 1:
        parser.error("--batch-size must be a multiple of 16, --num-rounds at least 1")
    if options.num_photos < options.batch_size or options.num_photos % options.batch_size:
        parser.error(f"--num-photos must be a multiple of the batch size, {options.batch_size}")
    if options.workers and options.epoch_pictures < WALL_BATCH:
        parser.error(f"--epoch-pictures must fill a batch of {WALL_BATCH}")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no GPU on this machine")
    if options.gpu and options.workers < 1:
        parser.error("--gpu needs --workers N: both loaders get as many worker processes")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; the figures for JSON."""
    if options.pictures is None:
        jpegs = encoded_photos(options.num_photos)
    else:
        jpegs = photos_of_folder(options.pictures, options.num_photos)
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
        if options.gpu:
            figures["gpu"] = gpu_rates(files, folder / "gpu", options.workers, options.num_rounds)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(arguments)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        figures = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print_table(figures)
    print_wall(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
