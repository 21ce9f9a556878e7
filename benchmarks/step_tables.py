"""Tables about the engine's step: time against queue size and number of features, and memory."""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fa_overhead import Clock, Sizes
from benchmarks.step_arms import Ours
from benchmarks.step_setup import build_run, make_shards, random_views
from pretrain.config import FAConfig
from pretrain.engine.profiling import precision_of
from pretrain.models.augmenter import Draw, FeatureAugmenter
from pretrain.models.cell import resolve
from pretrain.models.row_random import RowRandom, fa_generator

QUEUE_SIZES = tuple(1 << power for power in range(10, 19, 2))  # 1,024 .. 262,144
NUM_FEATURES = (1, 2, 4, 8)
BATCH_SIZES = {"cpu": (32, 64, 128, 256), "cuda": (64, 128, 256, 512)}
_FA_REPEATS = 10


def queue_table(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Step time with nearest-neighbour FA for queues of different size."""
    cells = {f"{size}": _nn(size) for size in QUEUE_SIZES}
    return {"table": "queue", "rows": _timed_cells(options, sizes, device, cells)}


def features_table(
    options: argparse.Namespace, sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """Step time for 1 to 8 augmented features of a sample, of two methods."""
    cells = {f"nn, N = {num}": _nn(sizes.queue_size, num) for num in NUM_FEATURES}
    cells |= {f"mask, N = {num}": FAConfig(method="mask", num_features=num) for num in NUM_FEATURES}
    return {"table": "features", "rows": _timed_cells(options, sizes, device, cells)}


def _nn(queue_size: int, num: int = 1) -> FAConfig:
    return FAConfig(
        method="nn", queue_size=queue_size, min_fill=min(1024, queue_size), num_features=num,
        top_k=num,
    )  # fmt: skip


class Cells:
    """One network of the engine; FA of one cell or another.

    Args:
        ours: The engine's loop; its run has no FA.
        cells: FA by name; "none" is added.
    """

    def __init__(self, ours: Ours, cells: dict[str, FAConfig]) -> None:
        self._ours, self._model = ours, ours.run.model
        self._objective, self.device = ours.run.config.objective, ours.run.device
        self.fa = {"none": FAConfig(method="none"), **cells}
        dim = ours.run.config.heads.output_dim
        self.features = torch.randn(2, ours.run.config.data.batch_size, dim, device=self.device)
        self._augmenters = {}
        for name, fa in self.fa.items():
            augmenter = FeatureAugmenter(fa, dim).to(self.device)
            if augmenter.queue is not None:
                augmenter.queue.put(torch.randn(fa.queue_size, dim, device=self.device))
            self._augmenters[name] = augmenter

    def use(self, name: str) -> None:
        """Make the network that of this cell."""
        self._model.fa, self._model.augmenter = self.fa[name], self._augmenters[name]
        self._model.cell = resolve(self._objective, self.fa[name])

    def steps(self, num: int) -> None:
        """So many optimiser steps."""
        with self._ours.flags.kept():
            self._ours.steps(num)

    @torch.no_grad()
    def augment(self) -> None:
        """FA alone, as often as a step does it: both views, and the batch enters the queue."""
        augmenter, n = self._model.augmenter, self.features.shape[1]
        draw = Draw(RowRandom.whole(fa_generator(0, 0, self.device), n), 1.0)
        augmenter(self.features[0], self.features[1], draw)
        augmenter(self.features[1], self.features[0], draw)
        if augmenter.queue is not None:
            augmenter.queue.put(self.features[0])

    def queue_bytes(self, name: str) -> int:
        """Of the cell's support queue."""
        return sum(b.numel() * b.element_size() for b in self._augmenters[name].buffers())


def _timed_cells(
    options: argparse.Namespace, sizes: Sizes, device: torch.device, cells: dict[str, FAConfig]
) -> list[dict[str, Any]]:
    """A row for each cell: step, FA alone and the ratio to no FA, medians over rounds."""
    with tempfile.TemporaryDirectory() as name:
        make_shards(Path(name), sizes.batch_size)
        run = build_run(Path(name), sizes, device.type, options.workers, options.settings)
        group = Cells(Ours(run, random_views(sizes, device)), cells)
        one, many = Clock(device, 1), Clock(device, _FA_REPEATS)
        step: dict[str, list[float]] = {cell: [] for cell in group.fa}
        alone: dict[str, list[float]] = {cell: [] for cell in group.fa}
        for number in range(options.rounds + 1):  # the first warms up
            for cell in group.fa:
                group.use(cell)
                taken = one(lambda: group.steps(options.calls)) / options.calls
                fa = many(group.augment) if cell != "none" else 0.0
                if number:
                    step[cell].append(taken)
                    alone[cell].append(fa)
        if run.lock is not None:
            run.lock.close()
    base = step["none"]
    return [
        {
            "cell": cell,
            "step_ms": statistics.median(step[cell]),
            "ratio": statistics.median(a / b for a, b in zip(step[cell], base, strict=True)),
            "fa_ms": statistics.median(alone[cell]),
            "fa_share": statistics.median(alone[cell]) / statistics.median(base),
            "queue_mib": group.queue_bytes(cell) / 2**20,
            "clock": one.name,
        }
        for cell in group.fa
    ]


def memory_table(options: argparse.Namespace, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """What a step holds, for batches of different size; each in a fresh process."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for batch_size in BATCH_SIZES[device.type]:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, replace(sizes, batch_size=batch_size), device.type, options.settings)
        process = context.Process(target=_memory_row, args=arguments)
        process.start()
        sender.close()
        try:
            rows.append(receiver.recv())
        except EOFError:
            process.join()
            raise RuntimeError(
                f"batch {batch_size}: its process ended with status {process.exitcode}"
            ) from None
        process.join()
    return {"table": "memory", "rows": rows}


def _memory_row(sender: Any, sizes: Sizes, device: str, settings: list[str]) -> None:
    """In a process of its own: one run, two steps, what it holds."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as name:
        make_shards(Path(name), sizes.batch_size)
        before = _resident_bytes()
        run = build_run(Path(name), sizes, device, 0, settings)
        ours = Ours(run, random_views(sizes, run.device))
        with ours.flags.kept():
            ours.steps(1)  # optimiser state is there after it
            with saved_bytes(_parameters(run.model)) as saved:
                ours.steps(1)
        model = run.model
        peak = _resident_bytes() - before
        if run.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(run.device)
        sender.send(
            {
                "batch_size": sizes.batch_size,
                "precision": precision_of(run.gradients.autocast(), run.device),
                "weights": _bytes(model.online.parameters()) + _bytes(model.online.buffers()),
                "gradients": _bytes(p.grad for p in model.online.parameters()),
                "optimizer": _bytes(
                    v for state in run.optimizer.state.values() for v in state.values()
                ),
                "ema": 0 if model.ema is None else _bytes(model.ema.state_dict().values()),
                "queue": _bytes(model.augmenter.buffers()),
                "views": _bytes([ours.views]),
                "saved_for_backward": saved.total,
                "peak": peak,
            }
        )
        if run.lock is not None:
            run.lock.close()


def _resident_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bytes(tensors: Any) -> int:
    found = (t for t in tensors if isinstance(t, Tensor))
    return sum(t.numel() * t.element_size() for t in found)


def _parameters(*networks: nn.Module) -> set[int]:
    """Storages of the weights, by their address."""
    return {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}


class Saved:
    """Bytes of the storages that autograd keeps for the backward pass, each counted once."""

    def __init__(self, known: set[int]) -> None:
        self.total, self._known = 0, set(known)

    def note(self, tensor: Tensor) -> Tensor:
        """A tensor is kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


@contextmanager
def saved_bytes(known: set[int]) -> Iterator[Saved]:
    """Count what is saved for backward in the context, without these storages."""
    saved = Saved(known)
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        yield saved


Table = Callable[[argparse.Namespace, Sizes, torch.device], dict[str, Any]]
TABLES: dict[str, Table] = {
    "queue": queue_table,
    "features": features_table,
    "memory": memory_table,
}


def print_table(figures: dict[str, Any]) -> None:
    """The table for people."""
    sizes, rows = figures["sizes"], figures["rows"]
    print(
        f"\n{figures['device']}, {figures['num_threads']} threads, load "
        f"{figures['load_average']:.1f}; BYOL, ResNet-{sizes['depth']}, {sizes['image_size']} px, "
        f"dim {sizes['dim']}"
    )
    if figures["table"] == "memory":
        parts = [name for name in rows[0] if name not in ("batch_size", "precision")]
        print(f"MiB\n{'batch':>6} {'precision':>10}" + "".join(f"{p:>20}" for p in parts))
        for row in rows:
            cells = "".join(f"{row[part] / 2**20:20.1f}" for part in parts)
            print(f"{row['batch_size']:6} {row['precision']:>10}{cells}")
        return
    print(f"batch {sizes['batch_size']}, queue {sizes['queue_size']}, {rows[0]['clock']} time\n")
    print(f"{figures['table']:14}{'step ms':>10}{'ratio':>8}{'FA ms':>9}{'FA share':>10}{'MiB':>8}")
    for row in rows:
        print(
            f"{row['cell']:14}{row['step_ms']:10.1f}{row['ratio']:8.3f}{row['fa_ms']:9.2f}"
            f"{row['fa_share']:10.2%}{row['queue_mib']:8.1f}"
        )
