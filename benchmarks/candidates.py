"""What benchmarks/loader.py measures in its own process: decoders, and our loader."""

import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image

from pretrain.data.augment import PRESETS, augment, draw_parameters, normalize
from pretrain.data.samples import TwoViewBatch
from pretrain.data.shards import ShardIndex
from pretrain.data.stream import Loader, TwoViewDataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = PRESETS["asymmetric"]  # BYOL's
SEED = 0
Work = Callable[[], object]


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
