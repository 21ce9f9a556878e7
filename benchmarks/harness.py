"""What the benchmarks share: command line, report, turns of candidates, sizes, pictures, peers.

Candidates take turns, round by round, so that whatever else the machine does hits all alike; peers
do so in processes of their own. What is counted on a CPU is processor time of a whole process, all
its threads together, so that nobody gains by a thread of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import simplejpeg
import torch
from tqdm import tqdm

from common.errors import UserError, require, run_command
from common.files import write_json
from common.pictures import BadPicture, decode
from common.provenance import versions
from pretrain.collectives import choose_device
from pretrain.config import HeadConfig
from pretrain.data.loader import ViewDataset
from pretrain.data.pack import write_shards
from pretrain.data.pack_plan import ShardOptions, SourcePicture
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.shards import ShardIndex
from pretrain.model.backbones.resnet import ResNetBackbone

HEIGHT, WIDTH, QUALITY = 375, 500, 90
_SPECTRUM = ((4, 45), (8, 35), (16, 25), (32, 18), (64, 12), (128, 9), (250, 6))
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
VIEWS = AugmentationPolicy.of("asymmetric").views  # BYOL's
SEED = 0
ROOT = Path(__file__).resolve().parents[1]
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
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
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Exit status: 0 done, 1 it went wrong, 2 wrong arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="OUT", help="write the figures here too")
    for name, default, least, text in counts:
        text += f"; default: {default}"
        add(f"--{name}", type=partial(_whole, least), default=default, metavar="N", help=text)
    if sizes is not None:
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
        for name, value in asdict(CUDA_SIZES).items():
            text = f"{getattr(sizes, name)} on a CPU, {value} on a GPU"
            least = {"batch_size": 2, "image_size": 16, "queue_size": 64}.get(name, 1)
            choices = (18, 34, 50, 101) if name == "depth" else None
            add("--" + name.replace("_", "-"), type=partial(_whole, least), metavar="N",
                choices=choices, help=text)  # fmt: skip
    return parser


def _whole(least: int, text: str) -> int:
    """A whole number that is not below the least; argparse reports what is raised."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number}: must be at least {least}")
    return number


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """``--pictures FOLDER``, for `chosen_photos`."""
    text = "real pictures, shrunk to 500 x 375; default: generated ones"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=text)


def run_and_report(
    measure: Callable[[], dict[str, Any]],
    out: Path | None,
    is_success: Callable[[dict[str, Any]], bool] = lambda _: True,
) -> int:
    """Measure, write the figures, print them.

    Args:
        measure: Returns the figures, by name.
        out: The file of ``--json``.
        is_success: Whether these figures are as they must be.
    Returns:
        Exit status: 0 done, 1 it went wrong, 2 wrong arguments.
    """

    def work() -> int:
        has_folder = out is None or out.absolute().parent.is_dir()
        require(has_folder, f"--json {out}: its folder does not exist")
        figures = measure()
        if out is not None:
            write_json(out, figures)
        print_figures(figures)
        return 0 if is_success(figures) else 1

    # A RuntimeError is a GPU without memory, for instance.
    return run_command(work, failures=(RuntimeError,), when_interrupted="stopped")


def print_figures(figures: Mapping[Any, Any], depth: int = 0) -> None:
    """A line for each figure, named as in the JSON."""
    for name, value in figures.items():
        label = "  " * depth + str(name)
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            print(label)
            print_figures(value, depth + 1)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{label:56}{text}")


def context(device: torch.device | None = None, sizes: "Sizes | None" = None) -> dict[str, Any]:
    """What else was going on, with which libraries; where a step ran, and on what."""
    where = {}
    if device is not None and sizes is not None:
        where = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "sizes": asdict(sizes),
            "num_threads": torch.get_num_threads(),
        }
    return {**where, "load_average": os.getloadavg()[0], "versions": versions()}


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


class Clock:
    """Milliseconds per call: CUDA events, processor time of one thread, or wall-clock time."""

    def __init__(self, device: torch.device, num_calls: int) -> None:
        is_single = torch.get_num_threads() == 1
        names = {"cuda": "cuda events", "cpu": "processor" if is_single else "wall"}
        self.name, self.num_calls = names[device.type], num_calls

    def __call__(self, work: Callable[[], None]) -> float:
        """Run it ``num_calls`` times without waiting in between."""
        if self.name == "cuda events":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            before.record()
            for _ in range(self.num_calls):
                work()
            after.record()
            torch.cuda.synchronize()
            return before.elapsed_time(after) / self.num_calls
        now = time.process_time if self.name == "processor" else time.perf_counter
        start = now()
        for _ in range(self.num_calls):
            work()
        return 1e3 * (now() - start) / self.num_calls


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

    def arch(self) -> ResNetBackbone:
        """The ResNet."""
        last = 4 * self.width if self.depth == 50 else self.width
        return ResNetBackbone(
            depth=self.depth,
            width_per_group=self.width,
            stem_channels=self.width,
            res2_channels=last,
        )

    def heads(self) -> HeadConfig:
        """Projector and predictor."""
        return HeadConfig(
            projector_hidden_dim=self.hidden_dim,
            predictor_hidden_dim=self.hidden_dim,
            output_dim=self.dim,
        )


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
        found.append(_encode(np.clip(image, 0, 255).astype(np.uint8)))
    return found


def photos_of_folder(folder: Path, num: int) -> list[bytes]:
    """Real pictures, shrunk and cropped in the middle to 500 x 375, as JPEGs of quality 90.

    Pictures that are smaller are left out: enlarged ones would be too smooth. The rest come in the
    order of their names, again from the beginning where there are fewer than `num`.

    Raises:
        UserError: If the folder holds no picture that is large enough.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        try:
            image = decode(path.read_bytes(), where=str(path))
        except BadPicture:
            continue
        height, width = image.shape[:2]
        if height < HEIGHT or width < WIDTH:
            continue
        scale = max(HEIGHT / height, WIDTH / width)
        size = (max(WIDTH, round(width * scale)), max(HEIGHT, round(height * scale)))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        top, left = (small.shape[0] - HEIGHT) // 2, (small.shape[1] - WIDTH) // 2
        found.append(_encode(small[top : top + HEIGHT, left : left + WIDTH]))
        if len(found) == num:
            break
    if not found:
        raise UserError(
            f"--pictures {folder}: no JPEG, PNG or WebP of at least {WIDTH} x {HEIGHT} pixels there"
        )
    return [found[number % len(found)] for number in range(num)]


def _encode(image: np.ndarray) -> bytes:
    """JPEG of quality 90 with halved colour planes, as cameras and ImageNet have it."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", "420")


def chosen_photos(folder: Path | None, num: int) -> list[bytes]:
    """Photographs of a folder (``--pictures``), or generated ones."""
    return encoded_photos(num) if folder is None else photos_of_folder(folder, num)


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


def two_view_dataset(index: ShardIndex, size: int, *, in_workers: bool) -> ViewDataset:
    """BYOL's two views; photometric changes in the loader on uint8, or none yet."""
    return ViewDataset(index, image_size=size, views=VIEWS, seed=SEED, with_colours=in_workers)


# -- peers ----------------------------------------------------------------------------------------


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
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # this project is not installed there
        environment = {
            **os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }  # fmt: skip
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
        hello = self._read()
        self.missing: str | None = hello.get("missing")
        self.version, self.recipes = hello.get("version", ""), hello.get("recipes", [])

    def candidate(self, recipe: str, size: int) -> Callable[[], float]:
        """One recipe at one size of the views: source pictures per second of processor time."""

        def turn() -> float:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"recipe": recipe, "size": size}) + "\n")
            self._process.stdin.flush()
            answer = self._read()
            return answer["num_pictures"] / answer["seconds"]

        return turn

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        tail = " | ".join(self._errors.read().strip().splitlines()[-5:])
        raise UserError(f"the process of {self._library} ended with status {status}: {tail}")

    def close(self) -> None:
        """End the process, which ends at the end of its input."""
        self._process.communicate()
        self._errors.close()


@contextmanager
def start_peers(python: str | None, folder: Path) -> Iterator[dict[str, Peer]]:
    """Peers by library: torchvision from this environment, the others from that of `python`."""
    interpreters = {"torchvision": sys.executable}
    if python is not None:
        interpreters |= dict.fromkeys(("lightly", "dali", "ffcv"), python)
    with ExitStack() as stack:
        yield {
            library: stack.enter_context(closing(Peer(interpreter, library, folder)))
            for library, interpreter in interpreters.items()
        }
