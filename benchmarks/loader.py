"""Speed of the loader per core: decoding alone, our two views, and the usual PIL recipe.

All figures are source pictures (each gives two views) per second of processor time of one thread,
medians over rounds in which every candidate takes its turn: what else the machine does disturbs
them little.
"""

import argparse
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from pretrain.data.augment import PRESETS, augment, draw_parameters
from pretrain.data.shards import ShardIndex, SourcePicture, write_shards
from pretrain.data.stream import Loader, TwoViewDataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEIGHT, WIDTH, QUALITY = 375, 500, 90
BATCH = 16
EXAMPLE = "example:\n  .venv/bin/python benchmarks/loader.py --json loader.json\n"


def photo(seed: int) -> np.ndarray:
    """uint8 [375, 500, 3] with the falling spectrum of photographs; about 54 kB as JPEG."""
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for cells, amplitude in ((4, 45), (8, 35), (16, 25), (32, 18), (64, 12), (128, 9), (250, 6)):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        noise = 0.3 * noise + 0.7 * noise.mean(axis=2, keepdims=True)
        image += amplitude * cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image += 3 * rng.standard_normal((HEIGHT, WIDTH, 1)).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def encoded_photos(num: int) -> list[bytes]:
    """JPEGs of quality 90."""
    return [simplejpeg.encode_jpeg(photo(seed), QUALITY, "RGB", "420") for seed in range(num)]


# -- candidates: each takes all photographs once --------------------------------------------------


def decoders(jpegs: list[bytes]) -> dict[str, Callable[[], None]]:
    """Decoding alone, by every decoder at hand."""

    def run(decode: Callable[[bytes], Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            for data in jpegs:
                decode(data)

        return all_of_them

    def with_torchvision(data: bytes) -> Any:
        array = np.frombuffer(bytearray(data), np.uint8)
        return torchvision.io.decode_jpeg(torch.from_numpy(array))

    return {
        "simplejpeg": run(lambda data: simplejpeg.decode_jpeg(data, "RGB")),
        "simplejpeg, fast DCT": run(lambda data: simplejpeg.decode_jpeg(data, "RGB", fastdct=True)),
        "OpenCV": run(lambda d: cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR_RGB)),
        "Pillow": run(lambda data: np.asarray(Image.open(io.BytesIO(data)))),
        "torchvision": run(with_torchvision),
    }


class OurLoader:
    """Epochs through shards in this process: read, decode, crop twice; maybe augment."""

    def __init__(self, index: ShardIndex, image_size: int, preset: str, *, is_whole: bool) -> None:
        self.views, self.size, self.is_whole = PRESETS[preset], image_size, is_whole
        scales = (self.views[0].crop_scale, self.views[1].crop_scale)
        dataset = TwoViewDataset(index, image_size=image_size, crop_scales=scales, seed=0)
        self.loader, self.epoch = Loader(dataset, batch_size=BATCH), 0

    def __call__(self) -> None:
        """One epoch."""
        for batch in self.loader.epoch(self.epoch):
            for number, view in enumerate(self.views if self.is_whole else ()):
                params = draw_parameters(
                    view, batch.keys, batch.visits, seed=0, view_index=number
                )  # fmt: skip
                augment(batch.views[number], params, MEAN, STD)
        self.epoch += 1


def pillow_recipe(image_size: int) -> list[Callable[[Image.Image], torch.Tensor]]:
    """BYOL's two views as torchvision's transforms on Pillow pictures make them."""

    def view(blur: float, solarize: float) -> v2.Compose:
        kernel = max(3, round((image_size * 0.1 - 1) / 2) * 2 + 1)
        steps = [
            v2.RandomResizedCrop(image_size, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur),
            v2.RandomSolarize(128, solarize),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(MEAN), list(STD)),
        ]
        return v2.Compose(steps)

    return [view(1.0, 0.0), view(0.1, 0.2)]


def pillow_candidate(jpegs: list[bytes], image_size: int) -> Callable[[], None]:
    """Decode and make both views of every photograph."""
    views = pillow_recipe(image_size)

    def run() -> None:
        for data in jpegs:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for view in views:
                view(image)

    return run


# -- measuring ------------------------------------------------------------------------------------


def rates(
    candidates: dict[str, Callable[[], None]], num_photos: int, num_rounds: int
) -> dict[str, list[float]]:
    """Pictures per second of processor time of each candidate in each round."""
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(num_rounds + 1):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            if round_number:  # the first warms up
                measured[name].append(num_photos / (time.process_time() - start))
    return measured


def candidates_for(
    jpegs: list[bytes], index: ShardIndex
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything that is measured, by name."""
    for name, run in decoders(jpegs).items():
        yield f"decode: {name}", run
    for size in (224, 64):
        yield f"ours: two {size}-px crops", OurLoader(index, size, "asymmetric", is_whole=False)
        yield (
            f"ours: whole BYOL recipe, {size} px",
            OurLoader(index, size, "asymmetric", is_whole=True),
        )
        yield f"torchvision on Pillow: BYOL recipe, {size} px", pillow_candidate(jpegs, size)


def result(measured: dict[str, list[float]], num_rounds: int, kilobytes: float) -> dict[str, Any]:
    """The figures for JSON; shares and ratios of medians of the same run."""
    median = {name: statistics.median(values) for name, values in measured.items()}
    ceiling = max(value for name, value in median.items() if name.startswith("decode"))
    crops, whole = median["ours: two 224-px crops"], median["ours: whole BYOL recipe, 224 px"]
    recipe = median["torchvision on Pillow: BYOL recipe, 224 px"]
    recipe_64 = median["torchvision on Pillow: BYOL recipe, 64 px"]
    return {
        "ceiling": ceiling,
        "loader_share": crops / ceiling,
        "loader_share_64": median["ours: two 64-px crops"] / ceiling,
        "cpu_vs_pil": whole / recipe,
        "cpu_vs_pil_64": median["ours: whole BYOL recipe, 64 px"] / recipe_64,
        "cpu_vs_lightly": None,
        "peers": {name: value for name, value in median.items() if not name.startswith("ours")},
        "ours": {name: value for name, value in median.items() if name.startswith("ours")},
        "spread": {name: [min(values), max(values)] for name, values in measured.items()},
        "num_rounds": num_rounds,
        "mean_kilobytes": kilobytes,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "opencv": cv2.__version__,
            "simplejpeg": simplejpeg.__version__,
        },
    }


def print_table(figures: dict[str, Any]) -> None:
    """The table for people."""
    ceiling, rows = figures["ceiling"], {**figures["peers"], **figures["ours"]}
    print(f"one core, {WIDTH} x {HEIGHT} JPEGs of {figures['mean_kilobytes']:.0f} kB, "
          f"medians of {figures['num_rounds']} rounds\n")  # fmt: skip
    print(f"{'':48}{'pictures/s':>11}{'min':>8}{'max':>8}{'of ceiling':>12}")
    for name, value in rows.items():
        low, high = figures["spread"][name]
        print(f"{name:48}{value:11.0f}{low:8.0f}{high:8.0f}{value / ceiling:11.0%}")
    print(f"\nwhole recipe on the CPU against torchvision on Pillow: {figures['cpu_vs_pil']:.1f} x "
          f"at 224 px, {figures['cpu_vs_pil_64']:.1f} x at 64 px")  # fmt: skip


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--num-photos", type=int, default=48, metavar="N", help="default: 48")
    parser.add_argument("--num-rounds", type=int, default=5, metavar="N", help="default: 5")
    options = parser.parse_args()
    if options.num_photos < BATCH or options.num_photos % BATCH or options.num_rounds < 1:
        parser.error(f"--num-photos must be a multiple of {BATCH}, --num-rounds at least 1")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    jpegs = encoded_photos(options.num_photos)
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        for number, data in enumerate(jpegs):
            path = Path(folder, f"{number}.jpg")
            path.write_bytes(data)
            pictures.append(SourcePicture(str(path), path.name))
        write_shards(pictures, Path(folder, "shards"))
        index = ShardIndex.open(Path(folder, "shards"))
        candidates = dict(candidates_for(jpegs, index))
        measured = rates(candidates, options.num_photos, options.num_rounds)
        index.close()
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1e3
    figures = result(measured, options.num_rounds, kilobytes)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print_table(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
