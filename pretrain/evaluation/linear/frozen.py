"""The network that is evaluated: a backbone in eval mode whose parameters take no gradient."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from common import checkpoints
from common.backbone import IMAGENET, read_backbone
from common.errors import require
from common.files import sha256_of
from common.resnet import NAMED
from pretrain.collectives import autocast_type
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.probe import normalise
from pretrain.model.resnet import ResNet

RANDOM = "random:"
Branch = Literal["online", "ema"]


class FrozenBackbone:
    """Pictures to pooled features, without gradient.

    Args:
        source: A checkpoint of any layout that conversion reads, or ``random:`` with R18, R34, R50,
            R101, thin_R50 or such a checkpoint, whose architecture is taken.
        config: Seed of random weights, size of the pictures, precision.
        branch: Which network of a checkpoint that has two.
        device: Where it runs.
    Attributes:
        model: The ResNet, on the device.
        description: For the result: architecture, ``name`` of the file, ``kind`` (checkpoint of
            ours, another layout's name, or random), branch, ``file_sha256``, and ``weights_hash``
            of names and values of its tensors, which is what features depend on.
        view: How central crops are made and computed, for the result and the facts about features;
            ``image_size`` is the side of a crop in pixels.
    Raises:
        UserError: File missing or damaged, no such branch, or an architecture that is not here.
    """

    def __init__(
        self, source: str, config: LinearConfig, *, branch: Branch, device: torch.device
    ) -> None:
        # Architecture, pixels and tensors, from the file or by the name.
        name, is_random = source.removeprefix(RANDOM), source.startswith(RANDOM)
        path, image_size, weights, kind = Path(name), 224, None, "random"
        if is_random and name in NAMED:
            arch, self._preprocessing = NAMED[name], IMAGENET
        else:
            require(
                not is_random or path.is_file(),
                f"{source}: give random: with {', '.join(NAMED)}, or with a checkpoint",
            )
            file = read_backbone(path, branch=branch)
            arch, self._preprocessing = file.arch, file.preprocessing
            if file.layout == "ours":
                image_size = int(file.contents["config"]["data"]["image_size"])
            if not is_random:
                weights, kind = file.tensors, file.layout.replace("ours", "checkpoint")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ResNet(arch).eval().requires_grad_(False)
        if weights is not None:
            model.load_state_dict(weights)  # without batch counters, which nothing here reads
        values = model.state_dict().items()
        values = {k: v for k, v in values if not k.endswith("num_batches_tracked")}
        self.description: dict[str, Any] = {
            "arch": asdict(arch),
            "name": f"{RANDOM if is_random else ''}{path.name}",
            "kind": kind,
            "branch": None if is_random else branch,
            "weights_hash": checkpoints.checksum(values),
            "file_sha256": None if is_random else sha256_of(path),
        }
        # How it runs.
        self.model, self._device = model.to(device), device
        if device.type == "cuda":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._is_bf16 = autocast_type(config.precision, device) is torch.bfloat16
        self.view: dict[str, Any] = {
            "image_size": config.image_size or image_size,
            "mean": list(self._preprocessing.mean),
            "std": list(self._preprocessing.std),
            "precision": "bf16" if self._is_bf16 else "fp32",
            "crop": "central square of 7/8 of the short side",
        }

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Pooled features, float32, on the device."""
        x = normalise(images.to(self._device), self._preprocessing.mean, self._preprocessing.std)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_bf16):
            return self.model(x).float()
