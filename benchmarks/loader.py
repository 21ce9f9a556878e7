"""Speed of the loader: decoding alone, our two views, and the same recipe of other libraries.

All figures are source pictures (each gives two views) per second of processor time of one thread,
medians over rounds in which every candidate takes its turn: what else the machine does disturbs
them little. "stages" says where our loader's time goes, in microseconds per picture. The other
libraries live in an environment of their own (benchmarks/peers/make_env.sh); without --peers only
torchvision and webdataset are compared.

Examples:
  export OMP_NUM_THREADS=1
  .venv/bin/python benchmarks/loader.py --json loader.json
  .venv/bin/python benchmarks/loader.py --json loader.json --peers /tmp/peers/bin/python
"""

import argparse
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image, ImageOps
from PIL import __version__ as pillow_version

from benchmarks import harness
from benchmarks.harness import SEED, VIEWS, two_view_dataset
from benchmarks.peers.serve import LIBRARIES, MEAN, STD
from common.errors import UserError, require
from pretrain.data import decode
from pretrain.data.augmentations.operation import Operation, Parameters, Step
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
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


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


def ours(index: ShardIndex, batch_size: int) -> dict[str, Work]:
    """Our loader, read, decode, crop twice, in its stages and ways; an epoch for each call."""
    numbers = itertools.count()

    def epoch(loader: Loader, is_whole: bool) -> None:
        for batch in loader.epoch(next(numbers)):
            if is_whole:  # up to normalised floats
                finish(batch)

    works = {}
    ways = {CROPS: (False, False), WHOLE: (True, True), FLOAT: (False, True)}
    for size, (name, (in_workers, is_whole)) in itertools.product(SIZES, ways.items()):
        dataset = two_view_dataset(index, size, in_workers=in_workers)
        loader = Loader(dataset, batch_size=batch_size)
        works[name.format(size)] = partial(epoch, loader, is_whole)
    return works


def finish(batch: ViewBatch) -> list[torch.Tensor]:
    """What is left to do with a batch of the loader: both views as normalised floats."""
    if batch.is_augmented:
        return [normalize(view, MEAN, STD) for view in batch.views]
    hashes, repeats, found = batch.sample_hashes.numpy(), batch.repeats.numpy(), []
    for n, view in enumerate(batch.views):
        drawn = draw_parameters(VIEWS[n], hashes, repeats, seed=SEED, view_index=n)
        found.append(augment(view, drawn, MEAN, STD))
    return found


# Stages of our loader: name, and the function in its place.
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("read the tar", ShardIndex, "read_many"),
    ("read headers", decode, "read_header"),
    ("draw crops", decode, "draw_crops"),
    ("draw colours", decode, "draw_parameters"),
    ("decode", decode, "decode_fast"),
    ("resize", decode, "resize"),
    ("flip", cv2, "flip"),
    ("normalise", sys.modules[__name__], "finish"),
)


def stage_times(work: Work, num_pictures: int) -> dict[str, float]:
    """Where the processor time of an epoch goes, in microseconds per picture.

    Each stage is timed in its place: alone it would find its code and its pixels in the cache.

    Args:
        work: The epoch; its batches are made in this process.
        num_pictures: How many it holds.
    Returns:
        Of each stage, of each photometric operation by its name, and of the "rest" (Python between
        the stages, the clock itself).
    """
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **named)
            finally:
                spent[name] += time.thread_time() - start  # type: ignore[assignment]

        return call

    def with_timed_steps(operation: type[Operation]) -> Callable[..., list[list[Step]]]:
        plan = timed("draw colours", operation.picture_steps)

        def picture_steps(own: Operation, parameters: Parameters, size: int) -> list[list[Step]]:
            return [[timed(own.name, s) for s in steps] for steps in plan(own, parameters, size)]

        return picture_steps

    with ExitStack() as stack:
        for name, owner, attribute in STAGES:
            function = timed(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, function))
        for name in Operation.registry.names():
            operation = Operation.registry[name]
            steps = with_timed_steps(operation)
            stack.enter_context(patch.object(operation, "picture_steps", steps))
        start = time.thread_time()
        work()
        total = time.thread_time() - start
    spent["rest"] = total - sum(spent.values())  # type: ignore[assignment]
    return {name: 1e6 * seconds / num_pictures for name, seconds in spent.items()}


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


def picture_rate(
    work: Callable[[], object], num_pictures: int, min_seconds: float = 0.0
) -> Callable[[], float]:
    """A candidate that works in this process.

    Args:
        work: Takes all pictures once.
        num_pictures: How many those are.
        min_seconds: Processor time of a turn; the work is repeated until it is reached.
    Returns:
        Gives source pictures per second of processor time.
    """

    def turn() -> float:
        start, repeats, seconds = time.process_time(), 0, 0.0
        while not repeats or seconds < min_seconds:
            work()
            repeats += 1
            seconds = time.process_time() - start
        return repeats * num_pictures / seconds

    return turn


class Peer:
    """A process that runs another library's recipes when it is asked to.

    Args:
        python: The interpreter; its environment has the library.
        library: Its name in benchmarks/peers/serve.py.
        folder: Folder of JPEG files.
    Attributes:
        missing: Why the library cannot be used; None if it can.
        version: Of the library.
        recipes: Names of what it can run.
    """

    def __init__(self, python: str, library: str, folder: Path) -> None:
        self._library = library
        path = [str(harness.ROOT), os.environ.get("PYTHONPATH", "")]  # it is not installed there
        environment = os.environ | dict.fromkeys(_ONE_THREAD, "1") | {"CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._process: Any = subprocess.Popen(
            [python, "-m", "benchmarks.peers.serve", library, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        hello = self._read()
        self.missing: str | None = hello.get("missing")
        self.version, self.recipes = hello.get("version", ""), hello.get("recipes", [])

    def candidate(self, recipe: str, size: int) -> Callable[[], float]:
        """One recipe at one size of the views: source pictures per second of processor time."""

        def turn() -> float:
            self._process.stdin.write(json.dumps({"recipe": recipe, "size": size}) + "\n")
            self._process.stdin.flush()
            answer = self._read()
            return answer["num_pictures"] / answer["seconds"]

        return turn

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        raise UserError(f"the process of {self._library} ended with status {status}")

    def close(self) -> None:
        """End the process, which ends at the end of its input."""
        self._process.communicate()


@contextmanager
def start_peers(python: str | None, folder: Path) -> Iterator[dict[str, Peer]]:
    """Peers by library: the first two from this environment, the others from that of `python`."""
    interpreters = dict.fromkeys(LIBRARIES, python)
    interpreters |= dict.fromkeys(("torchvision", "webdataset"), sys.executable)
    with ExitStack() as stack:
        yield {
            library: stack.enter_context(closing(Peer(interpreter, library, folder)))
            for library, interpreter in interpreters.items()
            if interpreter is not None
        }


def photos_of_folder(folder: Path, num: int) -> list[bytes]:
    """Real pictures, shrunk and cropped in the middle to 500 x 375, as JPEGs of quality 90.

    Pictures that are smaller are left out: enlarged ones would be too smooth. The rest come in the
    order of their names, again from the beginning where there are fewer than `num`.

    Raises:
        UserError: If the folder holds no picture that is large enough.
    """
    size, found = (harness.WIDTH, harness.HEIGHT), []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        with Image.open(path) as picture:
            if len(found) < num and picture.width >= size[0] and picture.height >= size[1]:
                fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.BOX)
                found.append(harness.encode(np.asarray(fitted)))
    require(
        bool(found),
        f"--pictures {folder}: no JPEG, PNG or WebP of at least {size[0]} x {size[1]} pixels there",
    )
    return [found[number % len(found)] for number in range(num)]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; the figures for JSON."""
    require(
        options.peers is None or shutil.which(options.peers) is not None,
        f"--peers {options.peers}: not the interpreter that benchmarks/peers/make_env.sh makes",
    )
    num = options.num_photos
    is_real = options.pictures is not None
    jpegs = photos_of_folder(options.pictures, num) if is_real else harness.encoded_photos(num)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = harness.open_as_shards(jpegs, folder, EPOCHS_OF * num)
        works = {("decoders", name): (work, num) for name, work in decoders(jpegs).items()}
        for name, work in ours(index, options.batch_size).items():
            works["ours", name] = work, index.num_samples
        turns = {key: picture_rate(*work, TURN_SECONDS) for key, work in works.items()}
        with start_peers(options.peers, folder / "files") as peers:
            for library, peer in peers.items():
                for size in SIZES if library == "torchvision" else SIZES[:1]:
                    for recipe in peer.recipes:
                        turns["peers", f"{recipe}, {size} px"] = peer.candidate(recipe, size)
            measured = harness.take_turns(turns, options.num_rounds)
        whole, num_due = works["ours", WHOLE.format(224)]
        # The first round warms up.
        rounds = [stage_times(whole, num_due) for _ in range(options.num_rounds + 1)][1:]
        index.close()
    groups: Rates = {"decoders": {}, "ours": {}, "peers": {}}
    for (group, name), values in measured.items():
        groups[group][name] = values
    figures = result(groups) | {
        "stages": harness.medians({name: [x[name] for x in rounds] for name in rounds[0]}),
        "num_rounds": options.num_rounds,
        "num_photos": num,
        "batch_size": options.batch_size,
        "pictures": "folder" if is_real else "generated",
        "mean_kilobytes": sum(map(len, jpegs)) / num / 1e3,
        **harness.context(),
        "left_out": {library: peer.missing for library, peer in peers.items() if peer.missing},
    }
    if options.peers is None:
        figures["left_out"]["Streaming, lightly, NVIDIA DALI, FFCV"] = "no --peers was given"
    figures["versions"] |= {"opencv": cv2.__version__, "pillow": pillow_version}
    figures["versions"] |= {name: peer.version for name, peer in peers.items() if not peer.missing}
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (
        ("num-photos", 64, 1, "photographs"),
        ("batch-size", 64, 16, "of our loader"),
        ("num-rounds", 5, 1, "turns of each candidate"),
    )
    parser = harness.make_parser(__doc__, counts)
    text = "real pictures, shrunk to 500 x 375; default: generated ones"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=text)
    environment = "interpreter of the other libraries' environment (peers/make_env.sh)"
    parser.add_argument("--peers", metavar="PYTHON", help=environment)
    options = parser.parse_args(arguments)
    if options.batch_size % 16 or options.num_photos % options.batch_size:
        parser.error("--batch-size must be a multiple of 16, --num-photos of --batch-size")
    harness.one_thread()
    return harness.run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
