"""From the config to augmented views on the device: loader, transfer, photometric changes."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from common.errors import UserError
from common.files import append_json_lines, read_json_lines
from pretrain import collectives as dist
from pretrain.config import DataConfig
from pretrain.data.loader import Loader, ReusedMemory, ViewBatch, ViewDataset
from pretrain.data.policy import Drawn, ViewPolicy, draw_parameters
from pretrain.data.shards import open_samples
from pretrain.data.streaming import StreamingLoader

BAD_SAMPLES = "bad_samples.jsonl"
_MEMORY = ReusedMemory()  # its own: blocks of other sizes would push these out


@dataclass(frozen=True)
class DeviceBatch:
    """A batch and what the model sees of it.

    Attributes:
        samples: As the loader made it; its small tensors on the device.
        views: float32 [2, n, 3, s, s], normalised, on the device; with small crops a list of all
            views, [n, 3, s, s] each, the two large ones first.
        waited: Seconds that the loop stood still for this batch's pictures.
    """

    samples: ViewBatch
    views: Tensor | list[Tensor]
    waited: float

    @property
    def labels(self) -> Tensor:
        """int64 [n], -1 where there is none; on the device."""
        return self.samples.labels

    @property
    def num_bad(self) -> int:
        """How many samples stand in for bad ones."""
        return self.samples.num_bad


class InputPipeline:
    """The batches of a run, on the device.

    Args:
        data: The data section of the config.
        seed: Seed of the run.
        device: Where the views go.
        channels_last: Memory layout of each view.
        folder: Run folder, where bad samples are listed.
    Attributes:
        samples: The pictures by number; None for a stream.
        num_samples: How many there are; of a stream what an epoch takes.
        num_steps: Global batches per epoch.
        fingerprint: Which samples these are, and with which weights; None for a stream.
        notes: What of the list of bad samples is damaged.
    Raises:
        UserError: If nothing is named, or what is named cannot be read.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        device: torch.device,
        channels_last: bool,
        folder: Path,
    ) -> None:
        if data.shards is None:
            raise UserError("data.shards is not set: name the folder of tools/make_shards.py")
        self._data, self._seed, self._device = data, seed, device
        self._channels_last = channels_last
        self._bad_path = folder / BAD_SAMPLES
        self.notes: set[str] = set()
        self.samples = None if data.streaming else open_samples(data.shards, data.cache)
        left_out = [] if self.samples is None else self.samples.left_out
        if len(left_out) > data.max_bad_samples:
            reasons = "\n".join(f"  {item['file']}: {item['reason']}" for item in left_out[:10])
            raise UserError(
                f"data.shards: {len(left_out)} files of the tars cannot be used, allowed are "
                f"data.max_bad_samples={data.max_bad_samples}:\n{reasons}\n"
                "make the tars without them, or raise data.max_bad_samples"
            )
        # Bad samples of earlier parts of the run, those of all processes: they count too. The bound
        # is of each process, so what others found is added to it.
        form = {"sample": (int, str), "reason": str, "rank": int}
        rows = read_json_lines(self._bad_path, form, report=self.notes.add)
        listed = {row["sample"]: row["reason"] for row in rows}
        own = {row["sample"] for row in rows if row["rank"] == dist.rank()}
        unusable = {item["file"]: item["reason"] for item in left_out}
        self._known_bad = listed | unusable
        self._max_bad = data.max_bad_samples + len(listed.keys() - own - unusable.keys())
        self._loader = self._make_loader(data.num_workers)
        self._side: torch.cuda.Stream | None = None
        # What is left out is listed once, by the first process.
        self._num_listed = len(listed if dist.rank() == 0 else self._known_bad)
        self.num_steps = self._loader.num_steps
        self.fingerprint, self.num_samples = None, data.samples_per_epoch
        if self.samples is not None:
            self.fingerprint = self.samples.fingerprint
            self.num_samples = self.samples.num_samples

    def _make_loader(self, num_workers: int) -> Loader | StreamingLoader:
        data = self._data
        views: dict[str, Any] = {
            "image_size": data.image_size,
            "views": data.augmentation.views,
            "seed": self._seed,
            "with_colours": in_workers(data.photometric, self._device),
            "small_crops": data.augmentation.small_crops,
        }
        batches: dict[str, Any] = {
            "batch_size": data.batch_size,
            "rank": dist.rank(),
            "world_size": dist.world_size(),
            "num_workers": num_workers,
            "max_bad_samples": self._max_bad,
            "known_bad": self._known_bad,
        }
        if self.samples is not None:
            return Loader(
                ViewDataset(self.samples, **views),
                shuffle_window=data.shuffle_window,
                last_batch=data.last_batch,
                **batches,
            )
        num_readers = dist.world_size() * max(1, num_workers)
        assert data.shards is not None
        return StreamingLoader(
            data.shards,
            samples_per_epoch=data.samples_per_epoch,
            shuffle_buffer=max(1, data.shuffle_window // num_readers),
            patience=data.cache.patience,
            **views,
            **batches,
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[DeviceBatch]:
        """Batches `start_step` .. of an epoch, ready on the device.

        On a GPU each is prepared while the one before it is in use, on a stream of its own: its
        copy to the device and its photometric changes run beside the step.
        """
        batches = self._timed(self._loader.epoch(epoch, start_step))
        if self._device.type != "cuda":
            yield from itertools.starmap(self._prepare, batches)
            return
        # One for all epochs: what a stream has freed serves that stream alone.
        self._side = side = self._side or torch.cuda.Stream(self._device)
        ready: tuple[DeviceBatch, torch.cuda.Event] | None = None
        for batch, waited in batches:
            with torch.cuda.stream(side):
                coming = self._prepare(batch, waited)
                done = torch.cuda.Event()
                done.record(side)
            if ready is not None:
                yield _handed_over(*ready)
            ready = coming, done
        if ready is not None:
            yield _handed_over(*ready)

    def close(self) -> None:
        """End the loader's workers."""
        self._loader.close()

    def first_batch(self) -> DeviceBatch:
        """The first batch of the first epoch, read in this process."""
        return self._prepare(next(iter(self._make_loader(num_workers=0).epoch(0))), 0.0)

    def _timed(self, batches: Iterator[ViewBatch]) -> Iterator[tuple[ViewBatch, float]]:
        """Each batch with the seconds until it was there; new bad samples are listed."""
        while True:
            started = time.perf_counter()
            with record_function("loader"):
                batch = next(batches, None)
            if batch is None:
                return
            bad = self._loader.bad_samples
            if len(bad) > self._num_listed:
                append_json_lines(
                    self._bad_path,
                    ({"sample": sample, "reason": reason, "rank": dist.rank()}
                     for sample, reason in itertools.islice(bad.items(), self._num_listed, None)),
                )  # fmt: skip
                self._num_listed = len(bad)
            yield batch, time.perf_counter() - started

    def _prepare(self, batch: ViewBatch, waited: float) -> DeviceBatch:
        with record_function("transfer"):
            moved = batch.to(self._device)
        with record_function("augmentation"):
            return DeviceBatch(moved, self.views(moved, batch), waited)

    @torch.no_grad()
    def views(self, moved: ViewBatch, batch: ViewBatch) -> Tensor | list[Tensor]:
        """Photometric changes on the device: uint8 crops -> `DeviceBatch.views`.

        Args:
            moved: The batch on the device.
            batch: The same batch on the CPU, where parameters are drawn.
        """
        augmentation = self._data.augmentation
        large = self._of_one_size(moved.views, batch, augmentation.views, 0)
        if moved.small_views is None:
            return large
        policies = [augmentation.small_crops] * len(moved.small_views)
        return [*large, *self._of_one_size(moved.small_views, batch, policies, len(large))]

    def _of_one_size(
        self, crops: Tensor, batch: ViewBatch, policies: Sequence[ViewPolicy], first: int
    ) -> Tensor:
        """Views of one size, of which the first has the number `first`: [views, n, 3, s, s]."""
        data = self._data
        if batch.is_augmented:
            images = normalize(crops, data.pixel_mean, data.pixel_std)
            return images if self._channels_last else images.contiguous()
        views = []
        for number, view in enumerate(policies):
            drawn = draw_parameters(
                view, batch.sample_hashes.numpy(), batch.repeats.numpy(), seed=self._seed,
                view_index=first + number,
            )  # fmt: skip
            views.append(augment(crops[number], drawn, data.pixel_mean, data.pixel_std))
        if not self._channels_last:
            return torch.stack(views)
        # Stacked so that each view lies channels-last in memory.
        return torch.stack([view.permute(0, 2, 3, 1) for view in views]).permute(0, 1, 4, 2, 3)


def _handed_over(ready: DeviceBatch, done: torch.cuda.Event) -> DeviceBatch:
    """Let the current stream wait until a batch is there, and keep its memory while it is used."""
    views = [ready.views] if isinstance(ready.views, Tensor) else ready.views
    current = torch.cuda.current_stream(views[0].device)
    with record_function("wait for views"):
        current.wait_event(done)
    for tensor in (*views, ready.samples.sample_ids, ready.samples.labels):
        tensor.record_stream(current)
    return ready


def in_workers(photometric: str, device: torch.device) -> bool:
    """Whether the loader's processes make the photometric changes; ``auto``: without a GPU."""
    return photometric == "workers" or (photometric == "auto" and device.type == "cpu")


def augment(images: Tensor, drawn: Drawn, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Change and normalise a batch, each sample with its own parameters.

    Args:
        images: uint8 [n, 3, s, s], RGB, on any device.
        drawn: From `draw_parameters`.
        mean: Per channel, for values in 0..1.
        std: Per channel, for values in 0..1.
    Returns:
        float32 [n, 3, s, s].
    """
    x = images.contiguous().float().mul_(1 / 255)  # in this order: a quarter of the time
    for operation, parameters in drawn:
        operation.change_batch(x, parameters)
    shift, scale = (torch.tensor(values, dtype=x.dtype).view(1, 3, 1, 1) for values in (mean, std))
    shift = shift.to(x.device, non_blocking=True)
    scale = 1 / scale.to(x.device, non_blocking=True)
    return x.sub_(shift).mul_(scale)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Only normalise: for pictures whose photometric changes are done.

    On the CPU picture by picture, so that one stays in the cache, and into memory that is used
    again.

    Args:
        images: uint8 [*, 3, s, s], RGB, on any device.
        mean: Per channel, for values in 0..1.
        std: Per channel, for values in 0..1.
    Returns:
        float32 [*, 3, s, s], lying channels-last in memory.
    """
    deviation = torch.tensor(std, dtype=torch.float32)
    scale = (1 / (255 * deviation)).to(images.device, non_blocking=True)
    shift = torch.tensor(mean, dtype=torch.float32) / deviation
    shift = shift.to(images.device, non_blocking=True)
    pixels = images.movedim(-3, -1)
    if images.device.type != "cpu":
        return pixels.float().mul_(scale).sub_(shift).movedim(-1, -3)
    size = images.shape[-1]
    rows = pixels.reshape(-1, images.shape[-2], 3 * size)  # pixels of a line in a row: long loops
    scale, shift = scale.repeat(size), shift.repeat(size)
    out = _MEMORY.tensor(tuple(rows.shape), np.float32)
    for picture, floats in zip(rows, out, strict=True):
        floats.copy_(picture).mul_(scale).sub_(shift)
    return out.view(pixels.shape).movedim(-1, -3)
