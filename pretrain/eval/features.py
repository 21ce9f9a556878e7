"""Frozen features of a labelled or unlabelled shard set."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from pretrain.data.mixture import Samples
from pretrain.data.stream import eval_loader


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
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Pooled features of centre crops in index order, with BN in eval mode.

    Returns:
        Features (float32, CPU), labels (-1 where there is none), sample ids.
    """
    was_training = backbone.training
    backbone.eval()
    features, labels, ids = [], [], []
    num_seen = 0
    for images, batch_labels, batch_ids in eval_loader(
        index, image_size=image_size, batch_size=batch_size, num_workers=0
    ):
        features.append(backbone(normalise(images.to(device), mean, std)).float().cpu())
        labels.append(batch_labels)
        ids.append(batch_ids)
        num_seen += len(batch_ids)
        if max_samples is not None and num_seen >= max_samples:
            break
    backbone.train(was_training)
    return torch.cat(features), torch.cat(labels), torch.cat(ids)
