"""BYOL's two views by libraries of transforms: torchvision, and lightly with its own defaults.

torchvision works on Pillow pictures as solo-learn sets it up, and on tensors. Settings of
solo-learn (its documented `asymmetric` augmentation for ImageNet): crops of 8-100 % of the area,
bicubic; jitter 0.4, 0.4, 0.2, 0.1 with probability 0.8; grey 0.2; Pillow's blur of a random radius
from 0.1 to 2 with probability 1 and 0.1; solarisation 0 and 0.2; flip.
"""

import random
from collections.abc import Callable, Sequence

import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import v2

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


class PillowViews(Dataset):
    """Files -> two views, as a folder of pictures is read with torchvision.

    Args:
        files: Paths of JPEGs.
        size: Side of a view in pixels.
        num_samples: How many items an epoch has; files come again where they are fewer.
        blur_by: The blur; Pillow's if none.
    """

    def __init__(
        self, files: Sequence[str], size: int, num_samples: int | None = None,
        blur_by: Callable | None = None,
    ) -> None:  # fmt: skip
        self.files, self.views = list(files), pillow_views(size, blur_by)
        self.num_samples = num_samples or len(self.files)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> list[Tensor]:
        """Two float32 [3, size, size]."""
        with Image.open(self.files[number % len(self.files)]) as picture:
            image = picture.convert("RGB")
        return [torch.as_tensor(view(image)) for view in self.views]


def pillow(files: Sequence[str], size: int, blur_by: Callable | None = None) -> Callable[[], None]:
    """Read, decode and make both views of every file, on Pillow pictures."""
    dataset = PillowViews(files, size, blur_by=blur_by)

    def epoch() -> None:
        for number in range(len(dataset)):
            dataset[number]

    return epoch


def pillow_with_torchvision_blur(files: Sequence[str], size: int) -> Callable[[], None]:
    """The same with torchvision's own blur, a convolution on tensors, as other projects have it."""
    return pillow(files, size, transforms.GaussianBlur(_kernel_size(size), BLUR_SIGMA))


def tensors(files: Sequence[str], size: int) -> Callable[[], None]:
    """Read, decode and make both views of every file, on uint8 tensors."""
    views = tensor_views(size)

    def epoch() -> None:
        for path in files:
            image = torchvision.io.decode_jpeg(torchvision.io.read_file(path))
            for view in views:
                view(image)

    return epoch


def lightly(files: Sequence[str], size: int) -> Callable[[], None]:
    """Read, decode and make both views of every file, as lightly does by default."""
    from lightly.transforms import byol_transform  # pyright: ignore[reportMissingImports]

    transform = byol_transform.BYOLTransform(
        byol_transform.BYOLView1Transform(input_size=size),
        byol_transform.BYOLView2Transform(input_size=size),
    )

    def epoch() -> None:
        for path in files:
            with Image.open(path) as picture:
                transform(picture.convert("RGB"))

    return epoch


RECIPES = {
    "torchvision": {
        "torchvision v1 on Pillow": pillow,
        "torchvision v1 on Pillow, its own blur": pillow_with_torchvision_blur,
        "torchvision v2 on tensors": tensors,
    },
    "lightly": {"lightly": lightly},
}
