"""Frozen features of a labelled or unlabelled shard set."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from pretrain.data.index.mixture import Samples
from pretrain.data.loader import eval_loader


def normalise(
    images: UInt8[Tensor, "n 3 s s"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[Tensor, "n 3 s s"]:
    """(image / 255 - mean) / std per channel, float32."""
    shape = (1, 3, 1, 1)
    x = images.float().div_(255)
    return x.sub_(x.new_tensor(mean).view(shape)).div_(x.new_tensor(std).view(shape))


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    index: Samples,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device,
    batch_size: int = 256,
    max_samples: int | None = None,
    dtype: torch.dtype = torch.float32,
    each_batch: Callable[[Float[Tensor, "n d"], Int[Tensor, " n"]], None] | None = None,
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Pooled features of centre crops in index order, with BN in eval mode.

    They are written batch by batch into memory that is allocated once, on the CPU.

    Args:
        backbone: Image to pooled features.
        index: What to look at.
        image_size: Side of the crop, pixels.
        mean: Of the normalisation, RGB.
        std: Of the normalisation, RGB.
        device: Where the backbone is.
        batch_size: Pictures looked at together.
        max_samples: Stop after the batch that reaches so many.
        dtype: What features are stored in. Half precision keeps directions only: rows are brought
            to length 1 first, so that none can overflow.
        each_batch: Called with each batch's features (float32, on ``device``) and labels.

    Returns:
        Features (CPU), labels (-1 where there is none), sample ids.
    """
    num = index.num_samples
    if max_samples is not None:
        num = min(num, math.ceil(max_samples / batch_size) * batch_size)
    features = torch.empty(0, 0, dtype=dtype)
    labels, ids = (torch.empty(num, dtype=torch.int64) for _ in range(2))
    was_training = backbone.training
    backbone.eval()
    num_seen = 0
    for images, batch_labels, batch_ids in eval_loader(
        index, image_size=image_size, batch_size=batch_size, num_workers=0
    ):
        found = backbone(normalise(images.to(device), mean, std)).float()
        if each_batch is not None:
            each_batch(found, batch_labels)
        if num_seen == 0:
            features = torch.empty(num, found.shape[1], dtype=dtype)
        part = slice(num_seen, num_seen + len(batch_ids))
        features[part] = found if dtype == torch.float32 else functional.normalize(found, dim=1)
        labels[part], ids[part] = batch_labels, batch_ids
        num_seen = part.stop
        if num_seen == num:
            break
    backbone.train(was_training)
    return features, labels, ids
