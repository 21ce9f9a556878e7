"""How cost grows: with pictures, processes, queue entries, augmented features and epochs.

Each axis runs the product's own code at several sizes. Times are processor time of one thread, so
that other work on the machine counts little. The law is cost ~ size ^ exponent, fitted by least
squares to the logarithms of the larger half of the sizes (three at least), where constant parts
count little; "off" is the root mean square of what the fit leaves. The wall is the size at which
the law reaches a bound.

pictures: a set of empty shards (sparse files, 1,000 samples each) and a whole index, opened and
ordered in fresh processes without torch. The largest needs 6 GiB of memory and 3 GB of disk.
processes: the order of an epoch as each rank takes it, all ranks in turn: together they have each
sample once. A step with gathers, per process, in PyTorch's fake process group, which gives a single
process the shapes of many; two real processes under gloo must count the same bytes.
queue: the search of FA nn. features: N augmented features. "loss" is FA, predictor and loss of
both directions with their backward pass; what the graph keeps for it is counted tensor by tensor.
commands: not an axis; `--help` of each command, started anew: user and system time.
epochs: what a worker of the loader alone holds at the end of each epoch (Private_Clean +
Private_Dirty of /proc/PID/smaps_rollup), photometric changes on the device or in the workers.

Example:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/cost_growth.py --json cost_growth.json
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, distributed
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.distributed.fake_pg import FakeStore
from tqdm import tqdm

from benchmarks import harness
from benchmarks.harness import ROOT, Clock, Sizes
from benchmarks.train_step import CPU_SIZES, Ours, build_run, random_views
from common.provenance import memory_of
from pretrain import collectives
from pretrain.config import FAConfig, HeadConfig
from pretrain.data.index import NO_LABEL, SAMPLE_DTYPE, ShardPart, write_index
from pretrain.data.loader import Loader, RequestSampler
from pretrain.data.order import SourceSizes
from pretrain.engine.profiling import fill_queues
from pretrain.features.augmentations.base import RowRandom, fa_generator
from pretrain.features.memory_bank import SupportQueue
from pretrain.model.backbones.resnet import ResNetBackbone
from pretrain.model.joint_embedding import FAContrastive
from pretrain.objectives.base import Objective

CPU = torch.device("cpu")
MEBIBYTE = 2**20
_PICTURE_BYTES, _TAR_BLOCK = 54_000, 512
_STRIDE = 2 * _TAR_BLOCK + 54_272  # header, picture padded to blocks, room for a label
PER_SHARD = 1000  # samples
STEPS = {  # of the axis of processes: objective and FA
    "BYOL with nn": ("byol", "nn"),
    "InfoNCE with nn": ("infonce", "nn"),
    "MoCo with mask": ("moco", "mask"),
    "SimCLR with mask": ("simclr", "mask"),
}
N_FEATURES = {  # of the axis of features
    "InfoNCE, parallel, mask": ["objective.name=infonce", "fa.architecture=parallel"],
    "BYOL, pre, mask": ["objective.name=byol", "fa.architecture=pre", "fa.stop_gradient=false"],
}


@dataclass(frozen=True)
class Scale:
    """How large the axes are.

    Attributes:
        pictures, processes, queue, features: The sizes.
        epochs: Of the loader.
        num_rounds: Repeats, of which the median counts.
        num_ordered: Samples whose order the ranks share.
        local_rows: Of a process and step in the axis of processes.
        loss_rows: Of the loss in the axis of features.
        step: Sizes of its whole step; its `dim` is that of all axes.
        loader: Pictures per epoch, batch size, pixels, workers of the axis of epochs.
    """

    pictures: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 10**8)
    processes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    queue: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6)
    features: tuple[int, ...] = (1, 2, 4, 8, 16)
    epochs: int = 10
    num_rounds: int = 3
    num_ordered: int = 1_000_000
    local_rows: int = 64
    loss_rows: int = 128
    step: Sizes = CPU_SIZES
    loader: tuple[int, int, int, int] = (512, 128, 224, 2)


TINY = Scale(
    pictures=(300, 1000, 3000), processes=(1, 2, 4), queue=(100, 200, 400), features=(1, 2, 4),
    epochs=3, num_rounds=1, num_ordered=1000, local_rows=4, loss_rows=16,
    step=Sizes(width=4, image_size=32, batch_size=4, queue_size=64, dim=8, hidden_dim=8),
    loader=(16, 8, 32, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A cost along an axis.

    Attributes:
        what: Its name.
        unit: Of its values.
        bound: The value that is taken for a wall.
        values: One for each size.
    """

    what: str
    unit: str
    bound: float
    values: Sequence[float]


Costs = list[Cost]


def milliseconds(work: Callable[[], Any], scale: Scale) -> float:
    """Processor time, the median of the rounds after one that warms up."""
    clock = Clock(CPU, 1)
    return statistics.median([clock(work) for _ in range(scale.num_rounds + 1)][1:])


# -- pictures -------------------------------------------------------------------------------------

# In a process of its own, which does not load torch. Its peak memory is not getrusage's: that one
# outlives the start of another program, so the parent's would count.
_CHILD = """
import json, sys, time
from pathlib import Path
from pretrain.data.order import SourceSizes, epoch_samples, global_batch
from pretrain.data.shards import ShardIndex

def mebibytes(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if kind in line).split()[1]) / 1024

def measured(name, work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = mebibytes("VmRSS"), time.process_time()
    done = work()
    found[name + "_seconds"] = time.process_time() - start
    found[name + "_mebibytes"] = mebibytes("VmHWM") - before
    return done

def order(sources):
    epoch = epoch_samples(sources, seed=0, epoch=0, window=16384)
    assert len(global_batch(epoch, 0, 256).sample_ids) == 256

found = {}
index = measured("open", lambda: ShardIndex.open(sys.argv[1]))
measured("order", lambda: order(index.sources))
halves = index.shard_sizes[::2], index.shard_sizes[1::2]
measured("mixture", lambda: order([SourceSizes(half) for half in halves]))
print(json.dumps(found))
"""


def simulate(folder: Path, num_samples: int) -> None:
    """Write an index of `num_samples` samples and empty shards of the sizes it gives."""
    rng, parts = np.random.default_rng(0), []
    for number, first in enumerate(range(0, num_samples, PER_SHARD)):
        table = np.zeros(min(PER_SHARD, num_samples - first), SAMPLE_DTYPE)
        table["offset"] = np.arange(len(table)) * _STRIDE + _TAR_BLOCK
        table["size"], table["label"] = _PICTURE_BYTES, NO_LABEL
        table["key"] = rng.integers(0, 2**63, len(table), np.int64)
        name, num_bytes = f"shard-{number:06d}.tar", len(table) * _STRIDE + 2 * _TAR_BLOCK
        with open(folder / name, "wb") as stream:
            os.truncate(stream.fileno(), num_bytes)
        shard = {"name": name, "num_samples": len(table), "bytes": num_bytes, "sha256": "0" * 64}
        parts.append(ShardPart(table, shard, []))
    write_index(folder, parts, classes=None, options={})


def pictures(scale: Scale) -> Costs:
    """Open a set and order an epoch, alone and of two halves; medians over fresh processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rows: list[dict[str, float]] = []
    for num_samples in scale.pictures:
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder), num_samples)
            command = [sys.executable, "-c", _CHILD, folder]
            runs = [
                json.loads(subprocess.check_output(command, text=True, env=environment))
                for _ in range(scale.num_rounds if num_samples < 10**8 else 1)
            ]
        rows.append({name: statistics.median(run[name] for run in runs) for name in runs[0]})
    titles = (
        ("open", "opening the set"),
        ("order", "order of an epoch"),
        ("mixture", "order, mixture of two sets"),
    )
    costs = []
    for key, title in titles:
        seconds, memory = (
            [row[f"{key}_{unit}"] for row in rows] for unit in ("seconds", "mebibytes")
        )
        beside = "its peak memory, with the table (shared)" if key == "open" else "its peak memory"
        costs += [Cost(title, "s", 60, seconds), Cost(beside, "MiB", 8192, memory)]
    return costs


# -- processes ------------------------------------------------------------------------------------


def in_new_processes(function: Callable[..., Any], calls: Sequence[tuple]) -> list[Any]:
    """What a function of this module returns for each call, each in a process of its own."""
    with ProcessPoolExecutor(len(calls), multiprocessing.get_context("fork")) as pool:
        return [done.result() for done in [pool.submit(function, *call) for call in calls]]


def ordered_by_ranks(
    num_samples: int, batch_size: int, world_size: int
) -> tuple[float, np.ndarray]:
    """Seconds of the median rank for an epoch's requests, and all ranks' samples in order."""
    seconds, parts = [], []
    for rank in range(world_size):
        sampler = RequestSampler(
            sources=[SourceSizes([PER_SHARD] * (num_samples // PER_SHARD))], seed=0,
            batch_size=batch_size, rank=rank, world_size=world_size, window=16384,
        )  # fmt: skip
        start = time.process_time()
        requests = list(sampler)
        seconds.append(time.process_time() - start)
        parts.append(np.stack([request.sample_ids for request in requests]))
    return statistics.median(seconds), np.concatenate(parts, axis=1).ravel()


def steps_of_rank(
    backend: str, rank: int, world_sizes: Sequence[int], file: str, scale: Scale
) -> Any:
    """For each number of processes and each of STEPS: bytes gathered, and milliseconds of the loss.

    Bytes are those of the gathered tensors, once more where their gradient goes back.
    """
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in STEPS}
    for world_size in world_sizes:
        meeting: Any = {"store": FakeStore()} if backend == "fake" else {"init_method": file}
        distributed.init_process_group(backend, rank=rank, world_size=world_size, **meeting)
        for name, (objective, method) in STEPS.items():
            with counted_gathers() as gathered:
                step = loss_step(objective, method, scale)
                step()
            found[name].append((sum(gathered), milliseconds(step, scale)))
        distributed.destroy_process_group()
    return found


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """A list that gets the bytes of each gather."""
    original, gathered = collectives.gather, []

    def gather(x: Tensor) -> Tensor:
        whole = original(x)
        gathered.append(whole.nbytes * (2 if x.requires_grad else 1))
        return whole

    with patch.object(collectives, "gather", gather):
        yield gathered


def loss_step(objective: str, method: str, scale: Scale) -> Callable[[], None]:
    """FA, predictor, loss, backward pass and what enters the queues, of this process's rows."""
    sizes, num = scale.step, scale.local_rows
    model = FAContrastive(
        ResNetBackbone(depth=18, width_per_group=4, stem_channels=4, res2_channels=4),
        HeadConfig(projector_hidden_dim=8, predictor_hidden_dim=8, output_dim=sizes.dim),
        Objective.registry[objective](name=objective),
        FAConfig(method=method, queue_size=sizes.queue_size, min_fill=min(64, sizes.queue_size)),
    )
    fill_queues(model)
    world_size, ids = collectives.world_size(), torch.arange(num)

    def step() -> None:
        random = RowRandom(fa_generator(0, 0, CPU), collectives.local_rows(num), num * world_size)
        z = torch.randn(2, num, sizes.dim, requires_grad=True)
        t = None if model.ema is None else torch.randn_like(z).detach()
        output = model.compare(z, t, random, 1.0, ids)
        output.loss.backward()
        model.after_optimizer_step(0.99, [output], ids, ids)

    return step


def processes(scale: Scale) -> Costs:
    """The order that each rank takes, and a step's gathers and loss.

    Raises:
        RuntimeError: If the ranks' parts differ from one process's batches, or gloo gathers other
            bytes than are counted.
    """
    batch_size = scale.local_rows * max(scale.processes)
    ordered = {
        world_size: ordered_by_ranks(scale.num_ordered, batch_size, world_size)
        for world_size in scale.processes
    }
    # The ranks' parts, side by side, are the batches of one process, each sample once.
    whole = ordered[1][1]
    if len(np.unique(whole)) != len(whole):
        raise RuntimeError("a sample comes twice in an epoch")
    for world_size, (_, samples) in ordered.items():
        if not np.array_equal(samples, whole):
            raise RuntimeError(f"{world_size} ranks have other batches than one")
    (fake,) = in_new_processes(steps_of_rank, [("fake", 0, scale.processes, "", scale)])
    with tempfile.TemporaryDirectory() as folder:
        calls = [("gloo", rank, (2,), f"file://{folder}/store", scale) for rank in range(2)]
        real = in_new_processes(steps_of_rank, calls)
    at_two = scale.processes.index(2)
    for name, rows in fake.items():
        if any(one[name][0][0] != rows[at_two][0] for one in real):
            raise RuntimeError(f"{name}: gloo gathers other bytes than the fake group")
    costs = [Cost("order of an epoch, per rank", "s", 60, [ordered[w][0] for w in scale.processes])]
    for name, rows in fake.items():
        sizes, times = zip(*rows, strict=True)
        costs.append(Cost(f"{name}: gathered", "MiB", 64, [size / MEBIBYTE for size in sizes]))
        costs.append(Cost(f"{name}: loss", "ms", 1000, times))
    return costs


# -- queue ----------------------------------------------------------------------------------------


def queue(scale: Scale) -> Costs:
    """The search for the batch's nearest entries, and the memory of the queue."""
    costs, dim = [], scale.step.dim
    z = torch.randn(scale.step.batch_size, dim)
    for kind in (torch.float32, torch.float16):
        times, memory = [], []
        for size in scale.queue:
            queue = SupportQueue(size, dim, dtype=kind)
            rows = torch.randn(min(size, 10_000), dim)
            for _ in range(0, size, len(rows)):
                queue.put(rows)
            search = partial(queue.nearest_indices, z, 1)
            times.append(milliseconds(search, scale))
            memory.append(sum(buffer.nbytes for buffer in queue.buffers()) / MEBIBYTE)
        name = str(kind).removeprefix("torch.")
        costs.append(Cost(f"search, {name}", "ms", 100, times))
        costs.append(Cost(f"memory, {name}", "MiB", 8192, memory))
    return costs


# -- features -------------------------------------------------------------------------------------


def features(scale: Scale) -> Costs:
    """A step with N augmented features, and its loss alone: time and what the graph keeps."""
    costs, clock = [], Clock(CPU, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        harness.open_as_shards(harness.encoded_photos(1), folder, scale.step.batch_size).close()
        for title, settings in N_FEATURES.items():
            arms, losses, kept = {}, {}, []
            for num in scale.features:
                own = [*settings, "fa.method=mask", f"fa.num_features={num}"]
                run = build_run(folder, scale.step, "cpu", 0, own)
                arms[num] = Ours(run, random_views(scale.step, run.device))
                losses[num] = partial(clock, loss_alone(run.task.model, scale))
                with storages_kept() as sizes:
                    loss_alone(run.task.model, scale)()
                kept.append(sum(sizes.values()) / MEBIBYTE)
            steps = {num: partial(clock, partial(arm.steps, 1)) for num, arm in arms.items()}
            for what, turns, bound in (("step", steps, 10_000), ("loss", losses, 1000)):
                times = harness.medians(harness.take_turns(turns, scale.num_rounds))
                costs.append(Cost(f"{title}: {what}", "ms", bound, list(times.values())))
            costs.append(Cost(f"{title}: kept by the loss", "MiB", 8192, kept))
    return costs


def loss_alone(model: FAContrastive, scale: Scale) -> Callable[[], None]:
    """FA, predictor, loss and their backward pass."""
    num, dim = scale.loss_rows, scale.step.dim
    z = torch.randn(2, num, dim, requires_grad=True)
    t = None if model.ema is None else torch.randn(2, num, dim)

    def step() -> None:
        random = RowRandom.whole(fa_generator(0, 0, CPU), num)
        model.compare(z, t, random, 1.0).loss.backward()

    return step


@contextmanager
def storages_kept() -> Iterator[dict[int, int]]:
    """The bytes of each storage that a graph keeps, which is made in this context."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield sizes


# -- epochs ---------------------------------------------------------------------------------------


def epochs(scale: Scale) -> Costs:
    """What a worker of the loader holds at the end of each epoch, the largest of all workers."""
    num_pictures, batch_size, image_size, num_workers = scale.loader
    costs = []
    with tempfile.TemporaryDirectory() as name:
        jpegs = harness.encoded_photos(64)
        shards = harness.open_as_shards(jpegs, Path(name), num_pictures, per_shard=256)
        for where, in_workers in (("on the device", False), ("in workers", True)):
            dataset = harness.two_view_dataset(shards, image_size, in_workers=in_workers)
            before = set(multiprocessing.active_children())
            loader = Loader(dataset, batch_size=batch_size, num_workers=num_workers)
            at_rest = []
            for epoch in tqdm(range(scale.epochs), unit="epoch", disable=not sys.stderr.isatty()):
                for _ in loader.epoch(epoch):
                    pass
                workers = set(multiprocessing.active_children()) - before
                held = [memory_of(worker.pid, "Private_") for worker in workers]
                at_rest.append(max(held) / MEBIBYTE)
            title = f"a worker's own memory, photometric changes {where}"
            costs.append(Cost(title, "MiB", 400, at_rest))
            del loader
        shards.close()
    return costs


# -- commands -------------------------------------------------------------------------------------


def help_seconds(num_rounds: int, pattern: str = "*.py") -> dict[str, float]:
    """Processor time of `--help` of each command of tools/ and of `python -m pretrain`.

    Args:
        num_rounds: Of which the median counts.
        pattern: Of the files of tools/.
    """
    environment, spent = os.environ | {"PYTHONPATH": str(ROOT)}, {}

    def seconds(command: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, *command, "--help"]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    files = [path for path in sorted((ROOT / "tools").glob(pattern)) if path.stem != "__init__"]
    commands = {path.stem: [str(path)] for path in files} | {"pretrain": ["-m", "pretrain"]}
    for name, command in commands.items():
        spent[name] = statistics.median(seconds(command) for _ in range(num_rounds))
    return dict(sorted(spent.items(), key=lambda item: item[1]))


# -- laws and table -------------------------------------------------------------------------------


def law(sizes: Sequence[float], cost: Cost) -> dict[str, Any]:
    """The fitted exponent, the share by which it is off, the wall up to 1000 times the sizes."""
    num = max(3, math.ceil(len(sizes) / 2))
    x, y = np.log(sizes[-num:]), np.log(np.maximum(cost.values[-num:], 1e-9))
    exponent, intercept = np.polyfit(x, y, 1)
    off = math.expm1(math.sqrt(np.mean((y - exponent * x - intercept) ** 2)))
    wall = None
    if exponent > 0.05:
        power = math.log10(sizes[-1]) + math.log10(cost.bound / cost.values[-1]) / exponent
        wall = 10**power if power < math.log10(1000 * sizes[-1]) else None
    return {"exponent": float(exponent), "off": off, "wall": wall}


def table(figures: dict[str, Any]) -> str:
    """The axes, or the commands, as one Markdown table."""
    if "commands" in figures:
        rows = [f"| `{name}` | {spent:.2f} |" for name, spent in figures["commands"].items()]
        return "\n".join(["| command | seconds |", "|---|---|", *rows])
    lines = ["| cost, per process | at the sizes | exponent (off) | wall |", "|---|---|---|---|"]
    for axis, found in figures["axes"].items():
        lines.append(f"| **{axis}** | {' / '.join(short(x) for x in found['sizes'])} | | |")
        for cost in found["costs"]:
            values = " / ".join(short(x) for x in cost["values"])
            fitted = cost["law"]
            wall = f"{short(cost['bound'])} {cost['unit']} "
            wall += "not in sight" if fitted["wall"] is None else f"at {short(fitted['wall'])}"
            exponent = f"{fitted['exponent']:.2f} ({fitted['off']:.0%})"
            lines.append(f"| {cost['what']}, {cost['unit']} | {values} | {exponent} | {wall} |")
    return "\n".join(lines)


def short(number: float) -> str:
    """Two or three digits, from 10,000 on as a power of ten."""
    if number >= 9_999.5:
        mantissa, power = f"{number:.1e}".split("e+")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{number:.0f}" if number >= 99.5 or number == int(number) else f"{number:.2g}"


AXES = {axis.__name__: axis for axis in (pictures, processes, queue, features, epochs)}


def run(axes: Sequence[str], scale: Scale) -> dict[str, Any]:
    """Measure some axes; the figures for JSON."""
    found = {}
    for axis in axes:
        costs = AXES[axis](scale)
        given: Any = getattr(scale, axis)
        sizes = list(range(1, given + 1)) if isinstance(given, int) else list(given)
        rows = [{**vars(cost), "law": law(sizes, cost)} for cost in costs]
        found[axis] = {"sizes": sizes, "costs": rows}
    return {"axes": found, "clock": Clock(CPU, 1).name, **harness.context()}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = harness.make_parser(__doc__, ())
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it works")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    parser.add_argument("--commands", action="store_true", help="`--help` of each command instead")
    options: argparse.Namespace = parser.parse_args(arguments)
    harness.one_thread()
    scale = TINY if options.tiny else Scale()

    def measure() -> dict[str, Any]:
        if options.commands:
            return {"commands": help_seconds(5), **harness.context()}
        return run(options.axes, scale)

    return harness.run_and_report(measure, options.json, text_of=table)


if __name__ == "__main__":
    sys.exit(main())
