"""Other libraries' two BYOL views, in a process of their own that runs a recipe whenever asked.

Started by benchmarks/loader.py in the library's environment. Input, line by line:
{"recipe": name, "size": pixels}; answer: {"seconds": processor time, "num_pictures": n}.

torchvision works on Pillow pictures as solo-learn sets it up, and on tensors; lightly with its own
defaults. Settings of solo-learn (its documented `asymmetric` augmentation for ImageNet): crops of
8-100 % of the area, bicubic; jitter 0.4, 0.4, 0.2, 0.1 with probability 0.8; grey 0.2; Pillow's
blur of a random radius from 0.1 to 2 with probability 1 and 0.1; solarisation 0 and 0.2; flip.

NVIDIA DALI on the CPU: one thread, one decoding for both views. Jitter is DALI's own joined
operation (`color_twist`: one matrix for brightness, contrast, saturation and hue), which does less
work than the four operations of the others; its decoder uses the fast inverse DCT and plain
upsampling of the colour planes, and crops are bilinear. Nothing runs ahead, so that no work falls
between the turns.

webdataset and MosaicML Streaming read the same JPEG bytes from a tar and an MDS shard, shuffled,
and make batches of the views that torchvision makes of Pillow pictures, without workers. Streaming
has two threads that look ahead for shards; their time counts.

FFCV decodes and crops only (it has no hue, grey, blur or solarisation): it is beside our crops. A
field of FFCV gives one view for each decoding; two views are two fields over the same JPEG. Its
writer encodes anew, with quality 90.
"""

import contextlib
import importlib
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.transforms import v2

with contextlib.suppress(ImportError, OSError):  # it reads the names below from this module
    from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]

BATCH = 16  # of the peers that make batches
MEAN_255, STD_255 = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.4, 0.4, 0.2, 0.1)
BLUR_SIGMA = (0.1, 2.0)
VIEWS = ((1.0, 0.0), (0.1, 0.2))  # probabilities of blur and solarisation


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_SIGMA)))


def _kernel_size(size: int) -> int:
    """A tenth of the side, odd, as the papers have it: 23 at 224 px."""
    return max(3, size // 10 // 2 * 2 + 1)


def pillow_views(size: int, blur_by: Callable | None = None) -> list[transforms.Compose]:
    """The two views of a Pillow picture, in torchvision's first set of transforms.

    Args:
        size: Side of a view in pixels.
        blur_by: The blur; Pillow's if none.
    """
    crop = transforms.RandomResizedCrop(
        size, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
    )
    jitter = transforms.RandomApply([transforms.ColorJitter(*JITTER)], 0.8)
    first = [crop, jitter, transforms.RandomGrayscale(0.2)]
    last = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return [
        transforms.Compose([
            *first, transforms.RandomApply([blur_by or _blur], blur),
            transforms.RandomApply([ImageOps.solarize], solarize), *last,
            transforms.Normalize(MEAN, STD),
        ])
        for blur, solarize in VIEWS
    ]  # fmt: skip


def tensor_views(size: int) -> list[v2.Compose]:
    """The two views of a uint8 tensor, in torchvision's second set of transforms."""
    crop = v2.RandomResizedCrop(size, (0.08, 1.0), antialias=True)  # bilinear: its fastest
    first = [crop, v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8), v2.RandomGrayscale(0.2)]
    last = [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    return [
        v2.Compose([
            *first, v2.RandomApply([v2.GaussianBlur(_kernel_size(size), BLUR_SIGMA)], blur),
            v2.RandomSolarize(128, solarize), *last, v2.Normalize(list(MEAN), list(STD)),
        ])
        for blur, solarize in VIEWS
    ]  # fmt: skip


def read_pillow(path: str) -> Image.Image:
    """An RGB picture."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def epochs(
    files: Sequence[str], read: Callable[[str], Any], views: Sequence[Callable]
) -> Callable[[], None]:
    """Read, decode and make the views of every file."""

    def epoch() -> None:
        for path in files:
            image = read(path)
            for view in views:
                view(image)

    return epoch


def pillow(files: Sequence[str], size: int) -> Callable[[], None]:
    """Both views of every file, on Pillow pictures."""
    return epochs(files, read_pillow, pillow_views(size))


def pillow_with_torchvision_blur(files: Sequence[str], size: int) -> Callable[[], None]:
    """The same with torchvision's own blur, a convolution on tensors, as other projects have it."""
    blur = transforms.GaussianBlur(_kernel_size(size), BLUR_SIGMA)
    return epochs(files, read_pillow, pillow_views(size, blur))


def tensors(files: Sequence[str], size: int) -> Callable[[], None]:
    """Both views of every file, on uint8 tensors."""

    def read(path: str) -> Any:
        return torchvision.io.decode_jpeg(torchvision.io.read_file(path))

    return epochs(files, read, tensor_views(size))


def lightly(files: Sequence[str], size: int) -> Callable[[], None]:
    """Both views of every file, as lightly does by default."""
    from lightly.transforms import byol_transform  # pyright: ignore[reportMissingImports]

    transform = byol_transform.BYOLTransform(
        byol_transform.BYOLView1Transform(input_size=size),
        byol_transform.BYOLView2Transform(input_size=size),
    )
    return epochs(files, read_pillow, [transform])


# -- webdataset, MosaicML Streaming --


def _batches(loader: Any, folder: tempfile.TemporaryDirectory) -> Callable[[], None]:
    """Take every batch; the folder lives as long as the function."""

    def epoch(_: tempfile.TemporaryDirectory = folder) -> None:
        for _batch in loader:
            pass

    return epoch


def webdataset(files: Sequence[str], size: int) -> Callable[[], None]:
    """Both views of every file, read from one tar."""
    wds: Any = importlib.import_module("webdataset")  # it loads its names lazily
    folder, views = tempfile.TemporaryDirectory(), pillow_views(size)
    path = str(Path(folder.name, "pictures.tar"))
    with wds.TarWriter(path, encoder=False) as writer:
        for file in files:
            writer.write({"__key__": Path(file).stem, "jpg": Path(file).read_bytes()})

    def both(sample: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return tuple(view(sample["jpg"]) for view in views)

    stream = wds.WebDataset(path, shardshuffle=False).shuffle(len(files))
    samples = stream.decode("pil").map(both).batched(BATCH)
    return _batches(wds.WebLoader(samples, batch_size=None, num_workers=0), folder)


def streaming(files: Sequence[str], size: int) -> Callable[[], None]:
    """Both views of every file, read from one MDS shard."""
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore[reportMissingImports]

    folder, views = tempfile.TemporaryDirectory(), pillow_views(size)
    with MDSWriter(out=folder.name, columns={"jpg": "jpeg"}) as writer:
        for file in files:
            with Image.open(file) as picture:
                writer.write({"jpg": picture})  # the bytes of the file, not encoded anew

    def collate(samples: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
        pictures = [sample["jpg"].convert("RGB") for sample in samples]
        return default_collate([[view(picture) for view in views] for picture in pictures])

    samples = StreamingDataset(local=folder.name, batch_size=BATCH, shuffle=True)
    return _batches(DataLoader(samples, BATCH, collate_fn=collate, num_workers=0), folder)


# -- NVIDIA DALI --


def _byol(files: Sequence[str], size: int) -> Any:
    data, _ = fn.readers.file(files=list(files), random_shuffle=True, name="reader")
    image = fn.decoders.image(data, device="cpu", output_type=types.RGB, use_fast_idct=True)
    return _view(image, size, 1.0, 0.0), _view(image, size, 0.1, 0.2)


def _view(image: object, size: int, blur: float, solarize: float) -> object:
    """One view; the `if`s are conditions for each sample, which DALI takes from the source."""
    view = fn.random_resized_crop(image, size=size, random_area=(0.08, 1.0))
    if _chance(0.8):
        view = fn.color_twist(
            view,
            brightness=fn.random.uniform(range=(0.6, 1.4)),
            contrast=fn.random.uniform(range=(0.6, 1.4)),
            saturation=fn.random.uniform(range=(0.8, 1.2)),
            hue=fn.random.uniform(range=(-36.0, 36.0)),
        )
    if _chance(0.2):
        view = fn.hsv(view, saturation=0.0)
    if _chance(blur):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=(0.1, 2.0)))
    if _chance(solarize):
        view = view ^ ((view >= 128) * types.Constant(255, dtype=types.UINT8))
    return fn.crop_mirror_normalize(
        view, mirror=fn.random.coin_flip(), mean=list(MEAN_255), std=list(STD_255),
        dtype=types.FLOAT, output_layout="CHW",
    )  # fmt: skip


def _chance(probability: float) -> object:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def dali(files: Sequence[str], size: int) -> Callable[[], None]:
    """Read, decode and make both views of every file; the last batch wraps around."""
    make: Any = pipeline_def(enable_conditionals=True)(_byol)  # it adds options
    pipeline = make(
        files, size, batch_size=BATCH, num_threads=1, device_id=None, seed=0,
        exec_pipelined=False, exec_async=False,
    )  # fmt: skip
    pipeline.build()

    def epoch() -> None:
        for _ in range(len(files) // BATCH):
            pipeline.run()

    return epoch


# -- FFCV --

FIELDS = ("view1", "view2")


def ffcv(files: Sequence[str], size: int) -> Callable[[], None]:
    """Read, decode and crop every file twice."""
    from ffcv.fields import RGBImageField, rgb_image  # pyright: ignore[reportMissingImports]
    from ffcv.loader import Loader, OrderOption  # pyright: ignore[reportMissingImports]
    from ffcv.transforms import RandomHorizontalFlip, ToTensor  # pyright: ignore[reportMissingImports]
    from ffcv.writer import DatasetWriter  # pyright: ignore[reportMissingImports]

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "pictures.beton")
    pictures = [(cv2.imread(file, cv2.IMREAD_COLOR_RGB),) * len(FIELDS) for file in files]
    fields = {name: RGBImageField(write_mode="jpg", jpeg_quality=90) for name in FIELDS}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(pictures)
    crop = rgb_image.RandomResizedCropRGBImageDecoder
    pipelines = {name: [crop((size, size)), RandomHorizontalFlip(), ToTensor()] for name in FIELDS}
    loader = Loader(
        str(path), batch_size=BATCH, num_workers=1, order=OrderOption.RANDOM, seed=0,
        pipelines=pipelines, drop_last=False,
    )  # fmt: skip
    return _batches(loader, folder)


# -- serving --

# Library -> what is imported, and its recipes.
LIBRARIES: dict[str, tuple[str, dict[str, Callable]]] = {
    "torchvision": (
        "torchvision",
        {
            "torchvision v1 on Pillow": pillow,
            "torchvision v1 on Pillow, its own blur": pillow_with_torchvision_blur,
            "torchvision v2 on tensors": tensors,
        },
    ),
    "webdataset": ("webdataset", {"webdataset": webdataset}),
    "mosaicml-streaming": ("streaming", {"MosaicML Streaming": streaming}),
    "lightly": ("lightly", {"lightly": lightly}),
    "dali": ("nvidia.dali", {"NVIDIA DALI, CPU": dali}),
    "ffcv": ("ffcv", {"FFCV, two crops": ffcv}),
}


def main(library: str, folder: str) -> None:
    """Say hello, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    package, recipes = LIBRARIES[library]
    try:
        version = importlib.import_module(package).__version__
    except (ImportError, OSError) as error:
        answer(missing=str(error))
        return
    answer(version=version, recipes=list(recipes))
    files = sorted(str(path) for path in Path(folder).glob("*.jpg"))
    made = {}
    for line in sys.stdin:
        question = json.loads(line)
        name = question["recipe"], question["size"]
        if name not in made:
            made[name] = recipes[question["recipe"]](files, question["size"])
        start = time.process_time()
        made[name]()
        answer(seconds=time.process_time() - start, num_pictures=len(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
