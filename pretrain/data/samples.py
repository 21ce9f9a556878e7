"""From requests to batches: what a worker does. It keeps no state; any worker does as well."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data
from torch.utils.data import Dataset

from common.errors import UserError
from common.pictures import BadPicture, Header, decode, decode_fast, read_header
from pretrain.data import photometric_uint8
from pretrain.data.augment import ViewAugment, draw_parameters
from pretrain.data.crops import center_crop, crop, draw_crops, reductions_for
from pretrain.data.index.mixture import Samples
from pretrain.data.order import counter_rng
from pretrain.data.photometric_uint8 import Changes, changes_of
from pretrain.data.reused_memory import ReusedMemory

_CHUNK = 64  # samples whose encoded pictures a worker holds at once
_MAX_REPLACEMENTS = 32  # draws of a stand-in for one bad sample before giving up
NUM_VIEWS = 2
_MEMORY = ReusedMemory()


@dataclass(frozen=True)
class TwoViewBatch:
    """One rank's part of a global batch.

    Attributes:
        views: uint8 [views, n, 3, s, s], RGB; each view lies channels-last in memory.
        keys: int64 [n], 64-bit hashes of the samples' names (the bits of an unsigned number).
        sample_ids: int64 [n], numbers in the shard index.
        visits: int64 [n], how often each sample was due before (docs/architecture.md).
        labels: int64 [n], -1 where there is none.
        num_bad: How many samples of this batch stand in for bad ones.
        is_augmented: True if photometric changes are done; what is left is to normalise.
    """

    views: torch.Tensor
    keys: torch.Tensor
    sample_ids: torch.Tensor
    visits: torch.Tensor
    labels: torch.Tensor
    num_bad: int
    is_augmented: bool = False

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


class BadSamples:
    """What one process replaced so far, and how much of it is allowed.

    Args:
        most: How many different ones may be replaced.
        known: Those that an earlier part of the run met: {sample number: reason}.
    Attributes:
        found: {sample number: reason}.
    """

    def __init__(self, most: int, known: Mapping[int, str] | None) -> None:
        self.found: dict[int, str] = dict(known or {})
        self._most = most

    def check(self, reply: Reply) -> None:
        """Note what a worker met.

        Raises:
            UserError: If these are too many, or the worker could not go on.
        """
        self.found.update(reply.bad)
        if len(self.found) > self._most:
            reason = next(iter(reply.bad.values()), "bad samples of the run so far")
            raise UserError(
                f"{reason}. {len(self.found)} bad samples, allowed are {self._most}: repair the "
                "source and make the shards again, or raise data.max_bad_samples to replace and "
                "count such samples"
            )
        if reply.error is not None:
            raise UserError(reply.error)


class TwoViewDataset(Dataset):
    """Random resized crops of each picture, two as a rule; photometric changes too, if asked.

    Args:
        index: The shards.
        image_size: Side of a view in pixels.
        crop_scales: For each view, the range of the crop's area as a share of the picture's. One
            range: one view, for linear evaluation.
        seed: Seed of the run.
        flip_probability: Probability of a horizontal flip.
        photometric: For each view, the changes done here, on uint8; None leaves them to the device.
    """

    def __init__(
        self,
        index: Samples,
        *,
        image_size: int,
        crop_scales: tuple[tuple[float, float], ...],
        seed: int,
        flip_probability: float = 0.5,
        photometric: tuple[ViewAugment, ViewAugment] | None = None,
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
        self.photometric = photometric

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
        views = empty_uint8((len(self.crop_scales), num, size, size, 3))
        used = np.array(request.sample_ids, np.int64)
        visits = np.array(request.visits, np.int64)
        for start in range(0, num, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._fill(used[part], visits[part], views.numpy()[:, part], bad)
        rows = self.index.samples[used]
        return TwoViewBatch(
            views=views.permute(0, 1, 4, 2, 3),
            keys=torch.from_numpy(rows["key"].astype(np.uint64).view(np.int64)),
            sample_ids=torch.from_numpy(used),
            visits=torch.from_numpy(visits),
            labels=torch.from_numpy(rows["label"].astype(np.int64)),
            num_bad=int((used != request.sample_ids).sum()),
            is_augmented=self.photometric is not None,
        )

    def _fill(
        self, used: np.ndarray, visits: np.ndarray, out: np.ndarray, bad: dict[int, str]
    ) -> None:
        """Write the views of samples; those of a stand-in, noted in `used`, where one is bad."""
        failed = self.write_views(used, visits, out)
        for row, reason in failed.items():
            sample_id, visit = int(used[row]), int(visits[row])
            bad[sample_id] = reason
            for attempt in range(_MAX_REPLACEMENTS):
                draw = counter_rng("replacement", self.seed, visit, sample_id, attempt)
                used[row] = draw.integers(self.index.num_samples)
                if int(used[row]) in bad:
                    continue
                one = slice(row, row + 1)
                failed_too = self.write_views(used[one], visits[one], out[:, one])
                if not failed_too:
                    break
                bad[int(used[row])] = failed_too[0]
            else:
                raise UserError(
                    f"{reason}; {_MAX_REPLACEMENTS} samples drawn in its place were bad too"
                )

    def write_views(
        self, sample_ids: np.ndarray, visits: np.ndarray, out: np.ndarray
    ) -> dict[int, str]:
        """Decode samples once each and write their views.

        Args:
            sample_ids: int64 [n].
            visits: int64 [n].
            out: uint8 [views, n, s, s, 3], written in place.
        Returns:
            {row: reason} of the pictures that do not decode.
        """
        pictures = self.index.read_many(sample_ids)
        failed: dict[int, str] = {}
        headers: dict[int, Header] = {}
        for row, data in enumerate(pictures):
            try:
                headers[row] = read_header(data, where="picture")
            except BadPicture as error:
                failed[row] = f"{self.index.describe(int(sample_ids[row]))}: {error}"
        plans = self._plans(sample_ids, visits, headers)
        for row, (reduction, num_rows, views) in plans.items():
            try:
                image, reduction = decode_fast(
                    pictures[row], headers[row], reduction, where="picture", num_rows=num_rows
                )
            except BadPicture as error:
                failed[row] = f"{self.index.describe(int(sample_ids[row]))}: {error}"
                continue
            for view, plan in enumerate(views):
                plan.write(image, reduction, out[view, row])
        return failed

    def _plans(
        self, sample_ids: np.ndarray, visits: np.ndarray, headers: dict[int, Header]
    ) -> dict[int, tuple[int, int, list["_ViewPlan"]]]:
        """For each row with a header: decode how much smaller, how many rows, into what views."""
        rows = np.fromiter(headers, np.int64, len(headers))
        if len(rows) == 0:
            return {}
        keys = self.index.samples[sample_ids[rows]]["key"].astype(np.uint64).view(np.int64)
        own_visits = visits[rows]
        sizes = np.array([(headers[row].height, headers[row].width) for row in headers], np.int64)
        crops = draw_crops(
            sizes, keys, own_visits, seed=self.seed, scales=dict(enumerate(self.crop_scales)),
            flip_probability=self.flip_probability,
        )  # fmt: skip
        plans = []
        for number, drawn in enumerate(crops):
            changes: list[Changes | None] = [None] * len(rows)
            if self.photometric is not None:
                params = draw_parameters(
                    self.photometric[number], keys, own_visits, seed=self.seed, view_index=number
                )
                changes = [*changes_of(params, self.image_size)]
            both = zip(drawn.boxes.tolist(), drawn.flips.tolist(), changes, strict=True)
            plans.append([_ViewPlan(*plan) for plan in both])
        sides = np.min([drawn.boxes[:, 2:] for drawn in crops], axis=(0, 2))
        reductions = reductions_for(sides, self.image_size)
        bottoms = np.max([drawn.boxes[:, 0] + drawn.boxes[:, 2] for drawn in crops], axis=0)
        views = [list(both) for both in zip(*plans, strict=True)]
        own = zip(reductions.tolist(), bottoms.tolist(), views, strict=True)
        return dict(zip(headers, own, strict=True))


class _ViewPlan(NamedTuple):
    """One view of one picture: where it is cut, whether it is flipped, what becomes of it."""

    box: tuple[int, int, int, int]
    is_flipped: bool
    changes: Changes | None

    def write(self, image: np.ndarray, reduction: int, out: np.ndarray) -> None:
        """Make the view from the decoded picture, into uint8 [s, s, 3]."""
        size = len(out)
        crop(image, self.box, size, is_flipped=self.is_flipped, reduction=reduction, out=out)
        if self.changes is not None:
            photometric_uint8.apply(out, self.changes)


def empty_uint8(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for a batch; shared in a DataLoader's worker, so that handing over copies nothing."""
    if torch.utils.data.get_worker_info() is None:
        return _MEMORY.tensor(shape, np.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


def decode_sample(index: Samples, sample_id: int) -> np.ndarray:
    """Decode sample `sample_id`, uint8 [height, width, 3].

    Raises:
        BadPicture: If it does not decode; the message names sample and shard.
    """
    data = index.read_bytes(sample_id)
    try:
        return decode(data, where="picture")
    except BadPicture as error:
        raise BadPicture(f"{index.describe(sample_id)}: {error}") from error


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
        except (BadPicture, UserError) as error:
            return Reply(error=f"{error}; repair or remove it and make the shards again")
        labels = self.index.samples["label"][sample_ids].astype(np.int64)
        tensors = (
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(labels),
            torch.from_numpy(sample_ids),
        )
        return Reply(batch=tensors)
