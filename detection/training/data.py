"""Training batches as a pure function of (seed, position), and registration with Detectron2.

Position p is the p-th training picture of the run. Its index and its augmentation follow from
(seed, p) alone, so a run resumed at iteration i starts at position i * batch and sees exactly what
the uninterrupted run would have seen, with any number of loader workers.
"""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
import copy
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import check_image_size, convert_PIL_to_numpy
from detectron2.data.transforms import AugInput, TransformList
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from common.annotations.record import LabelledSet, LabelledSplit, evenly
from common.errors import UserError
from common.pictures import BadPicture, decode, read_file


def derive_seed(*parts: int | str) -> int:
    """Hash a tuple into a seed of 32 bits, which numpy's global generator takes.

    Args:
        parts: What the random numbers are for, such as ("augment", seed, position).
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (1 << 32)


# Detectron2 makes these at run time.
# pyright: reportCallIssue=false, reportOptionalCall=false, reportReturnType=false


class BoxMapper(DatasetMapper):
    """Detectron2's mapper for boxes, with the project's decoder: upright pictures."""

    def of_pixels(self, image: np.ndarray) -> tuple[torch.Tensor, TransformList]:
        """Augment a picture: in an evaluation and for predictions, resize it.

        Args:
            image: uint8 [height, width, 3], RGB.

        Returns:
            uint8 (3, h, w) in the detector's order of colours, and what was done to it.
        """
        if self.image_format != "RGB":
            image = convert_PIL_to_numpy(Image.fromarray(image), self.image_format)
        augmented = AugInput(image)
        transforms = self.augmentations(augmented)
        assert augmented.image is not None
        channels_first = augmented.image.transpose(2, 0, 1)
        return torch.as_tensor(np.ascontiguousarray(channels_first)), transforms

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Decode and augment one picture."""
        example = copy.deepcopy(dataset_dict)
        path = example["file_name"]
        try:
            image = decode(read_file(path), where=path)
        except BadPicture as error:
            raise UserError(
                f"{error}; replace the picture or remove its line from the list"
            ) from error
        check_image_size(example, image)
        example["image"], transforms = self.of_pixels(image)
        if self.is_train:
            self._transform_annotations(example, transforms, example["image"].shape[1:])
        else:
            del example["annotations"]
        return example


def to_detectron2(split: LabelledSplit, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Annotations in Detectron2's format; "difficult" objects are trained on, as Detectron2 does.

    Returns:
        One dictionary a picture; boxes are [x0, y0, x1, y1] in pixels from 0.
    """
    return [
        {
            "file_name": str(picture.file),
            "image_id": picture.image_id,
            "height": picture.height,
            "width": picture.width,
            "annotations": [
                {
                    "category_id": classes.index(item.class_name),
                    "bbox": list(item.box),
                    "bbox_mode": BoxMode.XYXY_ABS,
                }
                for item in picture.objects
            ],
        }
        for picture in split.pictures
    ]


def register(data: LabelledSet) -> tuple[tuple[str, ...], str]:
    """Register a set's lists under names of their own, with the set's classes.

    Returns:
        Names of the training lists and of the test list.
    """
    mark = data.digest()[:12]

    def add(role: str, split: LabelledSplit) -> str:
        name = f"{data.name}-{role}-{split.folder.name}-{split.name}-{mark}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, functools.partial(to_detectron2, split, data.classes))
        MetadataCatalog.get(name).set(thing_classes=list(data.classes))
        return name

    return tuple(add("train", split) for split in data.train), add("test", data.test)


class PositionedPictures(Dataset):
    """Maps a position in the endless training stream to a ready training example."""

    def __init__(self, pictures: list[dict[str, Any]], mapper: DatasetMapper, seed: int) -> None:
        """Keep the pictures; decode none."""
        self.pictures, self.mapper, self.seed = pictures, mapper, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def index_at(self, position: int) -> int:
        """Which picture stands at a position: each epoch is a permutation of its own."""
        epoch, place = divmod(position, len(self.pictures))
        if epoch != self._epoch:
            generator = np.random.default_rng(derive_seed("order", self.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self.pictures))
        return int(self._order[place])

    def __len__(self) -> int:
        """Pictures per epoch."""
        return len(self.pictures)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The example at a position."""
        # Detectron2's augmentations draw from numpy's global generator.
        np.random.seed(derive_seed("augment", self.seed, position))  # noqa: NPY002
        return self.mapper(self.pictures[self.index_at(position)])


class PositionSampler(Sampler[int]):
    """Positions start, start + 1, .. without end; rank r of w takes every w-th."""

    def __init__(self, start: int, rank: int, world_size: int) -> None:
        """Begin at an absolute position."""
        self.start, self.rank, self.world_size = start, rank, world_size

    def __iter__(self) -> Iterator[int]:
        """Endless stream of positions of this rank."""
        return itertools.count(self.start + self.rank, self.world_size)


def build_train_loader(
    cfg: CfgNode,
    *,
    start_iteration: int = 0,
    purpose: str = "train",
    all_ranks_alike: bool = False,
    num_workers: int | None = None,
) -> DataLoader:
    """Build the training loader at an iteration.

    Args:
        cfg: Reads DATASETS.TRAIN, INPUT, DATALOADER, SOLVER.IMS_PER_BATCH (over all ranks), SEED.
        start_iteration: First iteration of the stream.
        purpose: Streams of different purpose draw different orders.
        all_ranks_alike: Whether every rank sees the same pictures (statistics), not its share.
        num_workers: Processes that load; None: DATALOADER.NUM_WORKERS.

    Returns:
        Endless iterable of lists of examples.
    """
    pictures = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    assert isinstance(pictures, list)
    seed = derive_seed(purpose, max(cfg.SEED, 0))
    dataset = PositionedPictures(pictures, BoxMapper(cfg, is_train=True), seed)
    rank, world = (0, 1) if all_ranks_alike else (comm.get_rank(), comm.get_world_size())
    sampler = PositionSampler(start_iteration * cfg.SOLVER.IMS_PER_BATCH, rank, world)
    return build_detection_train_loader(
        dataset,
        mapper=None,
        sampler=sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS if num_workers is None else num_workers,
        seed=seed,  # or starting the loader would draw from the generator that seeds a step
    )


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """Build the evaluation loader over TEST.NUM_IMAGES pictures (0: all), see `evenly`."""
    pictures = evenly(DatasetCatalog.get(name), cfg.TEST.NUM_IMAGES)
    return build_detection_test_loader(
        pictures,
        mapper=BoxMapper(cfg, is_train=False),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
