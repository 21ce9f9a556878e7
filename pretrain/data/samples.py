"""From requests to batches: what a worker does. It keeps no state; any worker does as well."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pretrain.data.mixture import Samples
from pretrain.data.order import counter_rng
from pretrain.data.views import RATIO, BadSample, center_crop, decode, random_resized_crop
from pretrain.errors import UserError

_MAX_REPLACEMENTS = 32  # draws of a stand-in for one bad sample before giving up
NUM_VIEWS = 2


@dataclass(frozen=True)
class TwoViewBatch:
    """One rank's part of a global batch.

    Attributes:
        views: uint8 [2, n, 3, s, s], RGB; each view lies channels-last in memory.
        keys: int64 [n], 64-bit hashes of the samples' names (the bits of an unsigned number).
        sample_ids: int64 [n], numbers in the shard index.
        visits: int64 [n], how often each sample was due before (docs/architecture.md).
        labels: int64 [n], -1 where there is none.
        num_bad: How many samples of this batch stand in for bad ones.
    """

    views: torch.Tensor
    keys: torch.Tensor
    sample_ids: torch.Tensor
    visits: torch.Tensor
    labels: torch.Tensor
    num_bad: int

    def pin_memory(self) -> "TwoViewBatch":
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> "TwoViewBatch":
        """The same batch on a device; the copy does not wait if the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Any) -> "TwoViewBatch":
        names = ("views", "keys", "sample_ids", "visits", "labels")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: these samples, in this order.

    Attributes:
        step: Global batch of the epoch.
        sample_ids: int64 [n].
        visits: int64 [n], how often each sample was due before.
    """

    step: int
    sample_ids: np.ndarray
    visits: np.ndarray


@dataclass
class Reply:
    """A worker's answer; errors travel as text so that the user sees no worker's traceback."""

    batch: Any = None
    bad: dict[int, str] = field(default_factory=dict)
    error: str | None = None

    def pin_memory(self) -> "Reply":
        """The same answer with its batch in page-locked memory."""
        if isinstance(self.batch, TwoViewBatch):
            self.batch = self.batch.pin_memory()
        return self


class TwoViewDataset(Dataset):
    """Two random resized crops of each picture; photometric changes come later, on the device.

    Args:
        index: The shards.
        image_size: Side of a view in pixels.
        crop_scales: For each view, the range of the crop's area as a share of the picture's.
        seed: Seed of the run.
        flip_probability: Probability of a horizontal flip.
    """

    def __init__(
        self,
        index: Samples,
        *,
        image_size: int,
        crop_scales: tuple[tuple[float, float], tuple[float, float]],
        seed: int,
        flip_probability: float = 0.5,
    ) -> None:
        if image_size < 1:
            raise UserError(f"image size {image_size}: must be at least 1 pixel")
        for low, high in crop_scales:
            if not 0 < low <= high <= 1:
                raise UserError(f"crop scale ({low}, {high}): must satisfy 0 < low <= high <= 1")
        self.index = index
        self.image_size = image_size
        self.crop_scales = crop_scales
        self.seed = seed
        self.flip_probability = flip_probability

    def __getitem__(self, request: Request) -> Reply:
        """The views of one request; a bad picture or shard is told in the reply, not raised."""
        reply = Reply()
        try:
            reply.batch = self._batch(request, reply.bad)
        except UserError as error:
            reply.error = str(error)
        return reply

    def _batch(self, request: Request, bad: dict[int, str]) -> TwoViewBatch:
        num, size = len(request.sample_ids), self.image_size
        views = np.empty((NUM_VIEWS, num, size, size, 3), np.uint8)
        used = np.empty(num, np.int64)
        for row, sample_id in enumerate(request.sample_ids):
            used[row] = self._fill(int(sample_id), int(request.visits[row]), views[:, row], bad)
        rows = self.index.samples[used]
        return TwoViewBatch(
            views=torch.from_numpy(views).permute(0, 1, 4, 2, 3),
            keys=torch.from_numpy(rows["key"].astype(np.uint64).view(np.int64)),
            sample_ids=torch.from_numpy(used),
            visits=torch.from_numpy(np.array(request.visits, np.int64)),
            labels=torch.from_numpy(rows["label"].astype(np.int64)),
            num_bad=int((used != request.sample_ids).sum()),
        )

    def _fill(self, sample_id: int, visit: int, out: np.ndarray, bad: dict[int, str]) -> int:
        """Write the views of a sample, or of a stand-in if it is bad; returns whose they are."""
        candidate = sample_id
        for attempt in range(_MAX_REPLACEMENTS):
            if candidate not in bad:
                try:
                    self.write_views(candidate, visit, out)
                    return candidate
                except BadSample as error:
                    bad[candidate] = str(error)
            draw = counter_rng("replacement", self.seed, visit, sample_id, attempt)
            candidate = int(draw.integers(self.index.num_samples))
        raise UserError(
            f"{bad[sample_id]}; {_MAX_REPLACEMENTS} samples drawn in its place were bad too"
        )

    def write_views(self, sample_id: int, visit: int, out: np.ndarray) -> None:
        """Decode a sample once and write its views into uint8 [2, s, s, 3].

        Raises:
            BadSample: If the picture does not decode.
        """
        image = decode_sample(self.index, sample_id)
        key = int(self.index.samples[sample_id]["key"])
        for view, scale in enumerate(self.crop_scales):
            rng = counter_rng("crop", self.seed, visit, key, view)
            random_resized_crop(
                image, rng, self.image_size, scale, RATIO, self.flip_probability, out=out[view]
            )


def decode_sample(index: Samples, sample_id: int) -> np.ndarray:
    """Decode sample `sample_id`, uint8 [height, width, 3].

    Raises:
        BadSample: If it does not decode; the message names sample and shard.
    """
    data = index.read_bytes(sample_id)
    try:
        return decode(data, where="picture")
    except BadSample as error:
        raise BadSample(f"{index.describe(sample_id)}: {error}") from error


class EvalDataset(Dataset):
    """Central crops in index order, for features and the kNN probe."""

    def __init__(self, index: Samples, image_size: int) -> None:
        self.index = index
        self.image_size = image_size

    def __getitem__(self, sample_ids: np.ndarray) -> Reply:
        """Crops, labels and numbers of some samples; a bad one is told in the reply."""
        images = np.empty((len(sample_ids), self.image_size, self.image_size, 3), np.uint8)
        try:
            for row, sample_id in enumerate(sample_ids):
                images[row] = center_crop(
                    decode_sample(self.index, int(sample_id)), self.image_size
                )
        except (BadSample, UserError) as error:
            return Reply(error=f"{error}; repair or remove it and make the shards again")
        labels = self.index.samples["label"][sample_ids].astype(np.int64)
        tensors = (
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(labels),
            torch.from_numpy(sample_ids),
        )
        return Reply(batch=tensors)
