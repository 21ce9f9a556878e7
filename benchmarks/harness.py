"""What the benchmarks share: pictures, our two views, turns of candidates, command line.

Candidates take turns, round by round; rivals do so in processes of their own. What is counted is
processor time of a whole process, all its threads together, so that other work on the machine
disturbs the figures little and nobody gains by a thread of his own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

from common.errors import UserError
from pretrain.data.augment import PRESETS, augment, draw_parameters, normalize
from pretrain.data.loader import TwoViewBatch, TwoViewDataset
from pretrain.data.pack.plan import ShardOptions, SourcePicture
from pretrain.data.pack.writer import write_shards
from pretrain.data.shards import ShardIndex

HEIGHT, WIDTH, QUALITY = 375, 500, 90
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = PRESETS["asymmetric"]  # BYOL's
SEED = 0
ROOT = Path(__file__).resolve().parents[1]
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


# -- the command line ------------------------------------------------------------------------------


def make_parser(
    description: str | None, epilog: str, counts: Sequence[tuple[str, int, str]]
) -> argparse.ArgumentParser:
    """A parser with ``--json`` and whole numbers: (name, default, what it is)."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    for name, default, text in counts:
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    return parser


def add_sizes(
    parser: argparse.ArgumentParser, cpu: Mapping[str, int], gpu: Mapping[str, int]
) -> None:
    """An option for each size of the networks and the batch; None where it is not given."""
    for name, value in gpu.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=int, metavar="N",
            choices=(18, 34, 50, 101) if name == "depth" else None,
            help=f"{cpu[name]} on a CPU, {value} on a GPU",
        )  # fmt: skip


def run_and_report(
    measure: Callable[[], dict[str, Any]],
    out: Path | None,
) -> int:
    """Measure, write the figures, print them.

    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
    """
    try:
        if out is not None and not out.absolute().parent.is_dir():
            raise UserError(f"--json {out}: its folder does not exist")
        figures = measure()
        if out is not None:
            out.write_text(json.dumps(figures, indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:  # a full disk, a GPU without memory
        print(f"error: it went wrong: {error}", file=sys.stderr)
        return 1
    print_figures(figures)
    return 0


def print_figures(figures: Mapping[str, Any], depth: int = 0) -> None:
    """A line for each figure, named as in the JSON."""
    for name, value in figures.items():
        label = "  " * depth + name
        if isinstance(value, Mapping):
            print(label)
            print_figures(value, depth + 1)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{label:56}{text}")


def versions() -> dict[str, str]:
    """Of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- pictures and shards ---------------------------------------------------------------------------


def photo(seed: int) -> np.ndarray:
    """uint8 [375, 500, 3] with the falling spectrum of photographs; about 52 kB as JPEG."""
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for cells, amplitude in ((4, 45), (8, 35), (16, 25), (32, 18), (64, 12), (128, 9), (250, 6)):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        noise = 0.3 * noise + 0.7 * noise.mean(axis=2, keepdims=True)
        image += amplitude * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image += 3 * rng.standard_normal((HEIGHT, WIDTH, 1)).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image: np.ndarray) -> bytes:
    """JPEG of quality 90 with halved colour planes, as cameras and ImageNet have it."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", "420")


def encoded_photos(num: int) -> list[bytes]:
    """Generated photographs as JPEGs."""
    return [encode(photo(seed)) for seed in range(num)]


def photos_of_folder(folder: Path, num: int) -> list[bytes]:
    """Real pictures, shrunk and cropped in the middle to 500 x 375, as JPEGs of quality 90.

    Pictures that are smaller are left out: enlarged ones would be too smooth. The rest come in the
    order of their names, again from the beginning where there are fewer than `num`.

    Raises:
        UserError: If the folder holds no picture that is large enough.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if image is not None and image.shape[0] >= HEIGHT and image.shape[1] >= WIDTH:
            found.append(encode(_fitted(image)))
            if len(found) == num:
                break
    if not found:
        raise UserError(
            f"--pictures {folder}: no JPEG, PNG or WebP of at least {WIDTH} x {HEIGHT} pixels there"
        )
    return [found[number % len(found)] for number in range(num)]


def _fitted(image: np.ndarray) -> np.ndarray:
    """The middle of a picture, shrunk by area averaging until it just covers 500 x 375."""
    scale = max(HEIGHT / image.shape[0], WIDTH / image.shape[1])
    size = (max(WIDTH, round(image.shape[1] * scale)), max(HEIGHT, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    top, left = (small.shape[0] - HEIGHT) // 2, (small.shape[1] - WIDTH) // 2
    return small[top : top + HEIGHT, left : left + WIDTH]


def write_files(jpegs: Sequence[bytes], folder: Path) -> list[Path]:
    """One file for each JPEG."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(len(jpegs))]
    for path, data in zip(paths, jpegs, strict=True):
        path.write_bytes(data)
    return paths


def open_as_shards(
    files: Sequence[Path], folder: Path, num_samples: int | None = None, per_shard: int = 1000
) -> ShardIndex:
    """Shards of the files; each comes several times, under other names, to reach `num_samples`."""
    num_samples = num_samples or len(files)
    pictures = [
        SourcePicture(str(files[number % len(files)]), f"{number:07d}.jpg")
        for number in range(num_samples)
    ]
    write_shards(pictures, folder, options=ShardOptions(max_samples_per_shard=per_shard))
    return ShardIndex.open(str(folder))


def chosen_photos(folder: Path | None, num: int) -> list[bytes]:
    """Photographs of a folder (``--pictures``), or generated ones."""
    return encoded_photos(num) if folder is None else photos_of_folder(folder, num)


# -- our two views ---------------------------------------------------------------------------------


def two_view_dataset(index: ShardIndex, size: int, *, in_workers: bool) -> TwoViewDataset:
    """BYOL's two views; photometric changes in the loader on uint8, or none yet."""
    scales = (VIEWS[0].crop_scale, VIEWS[1].crop_scale)
    return TwoViewDataset(
        index, image_size=size, crop_scales=scales, seed=SEED,
        photometric=VIEWS if in_workers else None,
    )  # fmt: skip


def finish(batch: TwoViewBatch) -> list[torch.Tensor]:
    """What is left to do with a batch of the loader: both views as normalised floats."""
    if batch.is_augmented:
        return [normalize(view, MEAN, STD) for view in batch.views]
    return [
        augment(
            view, draw_parameters(VIEWS[n], batch.keys, batch.visits, seed=SEED, view_index=n),
            MEAN, STD,
        )
        for n, view in enumerate(batch.views)
    ]  # fmt: skip


# -- turns of candidates ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Lap:
    """What one turn of a candidate cost and gave."""

    seconds: float  # processor time
    num_pictures: int

    @property
    def rate(self) -> float:
        """Source pictures per second of processor time."""
        return self.num_pictures / self.seconds


Candidate = Callable[[], Lap]


def in_process(
    work: Callable[[], object], num_pictures: int, min_seconds: float = 0.0
) -> Candidate:
    """A candidate that works in this process.

    Args:
        work: Takes all pictures once.
        num_pictures: How many those are.
        min_seconds: Processor time of a turn; the work is repeated until it is reached.
    """

    def turn() -> Lap:
        start, repeats, seconds = time.process_time(), 0, 0.0
        while not repeats or seconds < min_seconds:
            work()
            repeats += 1
            seconds = time.process_time() - start
        return Lap(seconds, repeats * num_pictures)

    return turn


def rates(candidates: Mapping[str, Candidate], num_rounds: int) -> dict[str, list[float]]:
    """Pictures per second of each candidate in each round, after a round that warms up."""
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(num_rounds + 1):
        for name, turn in candidates.items():
            lap = turn()
            if number:
                measured[name].append(lap.rate)
    return measured


class Peer:
    """A process that runs rivals' recipes when it is asked to; `greet` it first.

    Args:
        python: The interpreter; its environment has the rival's library.
        library: Name of a module in benchmarks/peers, without "_recipes".
        folder: Folder of JPEG files.
    Attributes:
        missing: Why the library cannot be used; None if it can.
        version: Of the library.
        recipes: Names of what it can run.
    """

    def __init__(self, python: str, library: str, folder: Path) -> None:
        self._library = library
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "CUDA_VISIBLE_DEVICES": ""}
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # this project is not installed there
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        try:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.serve", library, str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=environment,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise UserError(
                f"--peers {python}: cannot be started ({error.strerror}); it must be the "
                "interpreter of the environment that benchmarks/peers/make_env.sh makes"
            ) from error
        self.missing: str | None = None
        self.version, self.recipes = "", []

    def greet(self) -> None:
        """Wait until the library is there, or is known to be missing."""
        hello = self._read()
        self.missing = hello.get("missing")
        self.version, self.recipes = hello.get("version", ""), hello.get("recipes", [])

    def candidate(self, recipe: str, size: int) -> Candidate:
        """One recipe at one size of the views."""

        def turn() -> Lap:
            return Lap(**self._ask({"recipe": recipe, "size": size}))

        return turn

    def _ask(self, question: dict) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().strip().splitlines()[-5:]
        self.close()
        raise UserError(
            f"the process of {self._library} ended with status {status}: " + " | ".join(tail)
        )

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self._process.wait()  # it ends at the end of its input
        self._errors.close()


def start_peers(python: str | None, folder: Path) -> dict[str, Peer]:
    """Rivals by library: torchvision from this environment, the others from that of `python`."""
    peers: dict[str, Peer] = {}
    try:
        peers["torchvision"] = Peer(sys.executable, "torchvision", folder)
        for library in ("lightly", "dali", "ffcv") if python is not None else ():
            peers[library] = Peer(python, library, folder)  # type: ignore[arg-type]
        for peer in peers.values():
            peer.greet()
    except BaseException:
        for peer in peers.values():
            peer.close()
        raise
    return peers
