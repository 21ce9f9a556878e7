"""From the config to augmented views on the device: loader, transfer, photometric changes."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from common.errors import UserError
from pretrain import collectives as dist
from pretrain.config import DataConfig
from pretrain.data.augment import PRESETS, augment, draw_parameters, normalize
from pretrain.data.loader import Loader, TwoViewBatch, TwoViewDataset
from pretrain.data.mixture import Samples, open_samples
from pretrain.data.streaming.loader import StreamingLoader

BAD_SAMPLES = "bad_samples.jsonl"


@dataclass(frozen=True)
class Fed:
    """A batch and what the model sees of it.

    Attributes:
        batch: As the loader made it; its small tensors on the device.
        views: float32 [2, n, 3, s, s], normalised, on the device.
        waited: Seconds that the loop stood still for this batch's pictures.
    """

    batch: TwoViewBatch
    views: Tensor
    waited: float


class Feed:
    """What the training loop eats.

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
        self._data, self._seed, self._device = data, seed, device
        self._channels_last = channels_last
        self._presets = PRESETS[data.augmentation]
        self._bad_path = folder / BAD_SAMPLES
        self.samples = None if data.streaming else _open(data)
        self._loader = self._make_loader(data.num_workers)
        self._num_listed = len(self._loader.bad_samples)
        self.num_steps = self._loader.num_steps
        self.fingerprint = None if self.samples is None else self.samples.fingerprint
        self.num_samples = (
            data.samples_per_epoch if self.samples is None else self.samples.num_samples
        )

    def _make_loader(self, num_workers: int) -> Loader | StreamingLoader:
        data = self._data
        views: dict[str, Any] = {
            "image_size": data.image_size,
            "crop_scales": (self._presets[0].crop_scale, self._presets[1].crop_scale),
            "seed": self._seed,
            "photometric": self._presets if in_workers(data.photometric, self._device) else None,
        }
        batches: dict[str, Any] = {
            "batch_size": data.batch_size,
            "rank": dist.rank(),
            "world_size": dist.world_size(),
            "num_workers": num_workers,
            "max_bad_samples": data.max_bad_samples,
            "known_bad": _read_bad(self._bad_path),
        }
        if self.samples is not None:
            return Loader(
                TwoViewDataset(self.samples, **views),
                shuffle_window=data.shuffle_window,
                last_batch=data.last_batch,
                **batches,
            )
        num_readers = dist.world_size() * max(1, num_workers)
        return StreamingLoader(
            _named(data),
            samples_per_epoch=data.samples_per_epoch,
            shuffle_buffer=max(1, data.shuffle_window // num_readers),
            patience=data.cache.patience,
            **views,
            **batches,
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Fed]:
        """Batches `start_step` .. of an epoch, ready on the device."""
        batches = self._loader.epoch(epoch, start_step)
        return prepared_ahead(timed(self._listing_bad(batches)), self._prepare, self._device)

    def first_batch(self) -> Fed:
        """The first batch of the first epoch, read in this process."""
        return self._prepare(next(iter(self._make_loader(num_workers=0).epoch(0))), 0.0)

    def _prepare(self, batch: TwoViewBatch, waited: float) -> Fed:
        with record_function("transfer"):
            moved = batch.to(self._device)
        with record_function("augmentation"):
            return Fed(moved, self.views(moved, batch), waited)

    @torch.no_grad()
    def views(self, moved: TwoViewBatch, batch: TwoViewBatch) -> Tensor:
        """Photometric changes on the device: uint8 crops -> normalised [2, n, 3, s, s].

        Args:
            moved: The batch on the device.
            batch: The same batch on the CPU, where parameters are drawn.
        """
        data = self._data
        if batch.is_augmented:
            images = normalize(moved.views, data.pixel_mean, data.pixel_std)
            return images if self._channels_last else images.contiguous()
        views = []
        for number, preset in enumerate(self._presets):
            parameters = draw_parameters(
                preset, batch.keys, batch.visits, seed=self._seed, view_index=number
            )
            images = augment(moved.views[number], parameters, data.pixel_mean, data.pixel_std)
            if self._channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            views.append(images)
        return _stack_nhwc(views) if self._channels_last else torch.stack(views)

    def _listing_bad(self, batches: Iterator[TwoViewBatch]) -> Iterator[TwoViewBatch]:
        """Write each bad sample to the run folder when it is met first."""
        for batch in batches:
            bad = self._loader.bad_samples
            if len(bad) > self._num_listed:
                rows = [
                    {"sample": sample, "reason": reason, "rank": dist.rank()}
                    for sample, reason in itertools.islice(bad.items(), self._num_listed, None)
                ]
                with open(self._bad_path, "a", encoding="utf-8") as stream:
                    stream.writelines(json.dumps(row) + "\n" for row in rows)
                self._num_listed = len(bad)
            yield batch


def timed(batches: Iterator[TwoViewBatch]) -> Iterator[tuple[TwoViewBatch, float]]:
    """Each batch with the seconds that went by until it was there."""
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        with record_function("loader"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def prepared_ahead(
    batches: Iterator[tuple[TwoViewBatch, float]],
    prepare: Callable[[TwoViewBatch, float], Fed],
    device: torch.device,
) -> Iterator[Fed]:
    """Prepare each batch; on a GPU one batch ahead, on a stream of its own.

    The copy to the device and the photometric changes of the next batch then run beside the step.
    """
    if device.type != "cuda":
        yield from itertools.starmap(prepare, batches)
        return
    side = torch.cuda.Stream(device)
    ready: tuple[Fed, torch.cuda.Event] | None = None
    for batch, waited in batches:
        with torch.cuda.stream(side):
            coming = prepare(batch, waited)
            done = torch.cuda.Event()
            done.record(side)
        if ready is not None:
            yield _handed_over(*ready)
        ready = coming, done
    if ready is not None:
        yield _handed_over(*ready)


def _handed_over(fed: Fed, done: torch.cuda.Event) -> Fed:
    """Let the current stream wait until a batch is there, and keep its memory while it is used."""
    current = torch.cuda.current_stream(fed.views.device)
    with record_function("wait for views"):
        current.wait_event(done)
    for tensor in (fed.views, fed.batch.sample_ids, fed.batch.labels):
        tensor.record_stream(current)
    return fed


def _stack_nhwc(views: list[Tensor]) -> Tensor:
    """Stack so that each view keeps its channels-last memory."""
    return torch.stack([view.permute(0, 2, 3, 1) for view in views]).permute(0, 1, 4, 2, 3)


def in_workers(photometric: str, device: torch.device) -> bool:
    """Whether the loader's processes make the photometric changes; ``auto``: without a GPU."""
    return photometric == "workers" or (photometric == "auto" and device.type == "cpu")


def _named(data: DataConfig) -> str | list[str] | dict[str, float]:
    if data.shards is None:
        raise UserError(
            "data.shards is not set: name the folder that tools/make_shards.py wrote, "
            "e.g. data.shards=data/shards"
        )
    return data.shards


def _open(data: DataConfig) -> Samples:
    return open_samples(_named(data), data.cache)


def _read_bad(path: Path) -> dict[int, str]:
    """Bad samples that earlier parts of the run met, of all processes."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last
    return {int(row["sample"]): str(row["reason"]) for row in rows}
