"""Images per second of a BYOL step: the engine's own, a plain one, and two libraries' recipes.

Four arms start from the same weights and the same synthetic batch on the device; before anything is
timed their losses are compared in fp32. They take turns, round by round. Then the engine's step is
timed on batches from shards, by its own loader.

ours: the engine's own loop (``Trainer.step``) with whatever the config switches on.
eager: written from the definition (arXiv 2006.07733) in plain PyTorch; fp32, TF32 where there is.
solo-learn-like, lightly-like: the order of work, precision, memory format, LARS and EMA of their
published BYOL recipes, written anew. Left out of both: the online classifier, the logging of
metrics and Lightning's own hooks, so that a rival is rather faster here than it is at home.

Sources (read 2026): solo-learn ``scripts/pretrain/imagenet/byol.yaml`` (precision 16, LARS),
``main_pretrain.py`` (channels-last unless ``performance.disable_channel_last``),
``solo/methods/byol.py``, ``solo/utils/{lars,momentum}.py``; lightly
``benchmarks/imagenet/resnet50/{main,byol}.py`` (precision 16-mixed, contiguous memory,
``set_float32_matmul_precision("high")``), ``lightly/utils/lars.py``. On a CPU Lightning takes
bf16-mixed for 16-mixed; so do the two here.

"images_per_second" are medians over rounds, "ratios" medians of ours / rival in the same round.
"mfu": FLOPs of the plain step over the rate that --peak-tflops states for the device.
"convolutions", on a CPU: those of our step alone, on the same tensors, forward and backward; their
share of the step bounds what all else can gain.
"from_shards_share": the rate from shards over the rate on synthetic data, wall-clock time.

Examples:
  OMP_NUM_THREADS=1 .venv/bin/python benchmarks/train_step.py --json step.json
  .venv/bin/python benchmarks/train_step.py --workers 12 --set engine.precision=bf16
"""

import argparse
import contextlib
import copy
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from benchmarks.harness import Clock, Sizes
from common.errors import require
from common.files import write_json
from common.network import ResNet
from pretrain.config import load_config
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.data.loader import ViewBatch
from pretrain.engine.accumulation import kept_buffers
from pretrain.engine.contrastive_task import ContrastiveTask
from pretrain.engine.profiling import batches, count_flops, precision_of
from pretrain.engine.trainer import Trainer
from pretrain.features.augmentations.base import RowRandom, fa_generator
from pretrain.model.joint_embedding import FAContrastive
from pretrain.run import make_trainer

CPU_SIZES = Sizes(batch_size=32)
BATCHES_PER_EPOCH = 8
_NEVER = 1 << 40
# Of the rivals.
LR, MOMENTUM, WEIGHT_DECAY, ETA, TAU = 0.1, 0.9, 1e-6, 1e-3, 0.99


# -- arms -----------------------------------------------------------------------------------------


Switches = tuple[bool, bool, str]  # cuDNN's search, TF32 in cuDNN, precision of matrix products
FAST: Switches = (False, True, "high")
LIGHTNING: Switches = (False, True, "highest")


def switches_now() -> Switches:
    """PyTorch's global switches as they stand."""
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()


@contextlib.contextmanager
def switched(switches: Switches) -> Iterator[None]:
    """These in the context, what was before after it."""
    before = switches_now()
    try:
        _switch(*switches)
        yield
    finally:
        _switch(*before)


def _switch(is_benchmarked: bool, has_tf32: bool, products: str) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.benchmark, cudnn.allow_tf32 = is_benchmarked, has_tf32
    torch.set_float32_matmul_precision(products)


class Ours:
    """The engine's own loop on a batch that lies on the device.

    Args:
        run: Freshly built.
        views: [2, n, 3, s, s], normalised.
    """

    def __init__(self, run: Trainer[ContrastiveTask], views: Tensor) -> None:
        self.run, self.switches = run, switches_now()
        self.autocast = run.task.autocast
        if run.task.config.engine.channels_last:
            views = torch.stack([v.permute(0, 2, 3, 1) for v in views]).permute(0, 1, 4, 2, 3)
        self.views, self._batch = views, batch_of(views)

    def steps(self, num: int, batches: Iterator[DeviceBatch] | None = None) -> None:
        """So many optimiser steps, on the batch or on those that are given."""
        with switched(self.switches):
            for callback in self.run.callbacks:
                callback.on_epoch_start()
            for batch in islice(batches or repeat(self._batch), num):
                self.run.step(batch)

    def loss(self) -> Tensor:
        """In fp32, with the graph; BN moves on."""
        model, views = self.run.task.model, self._batch.views
        random = RowRandom.whole(fa_generator(0, 0, views[0].device), len(views[0]))
        t = model.ema_projections(views)
        return model.online(views, partial(model.compare, t=t, random=random, progress=1.0)).loss

    def networks(self) -> list[nn.Module]:
        """The trained one first, then its EMA."""
        model = self.run.task.model
        return [part for part in (model.online, model.ema) if part is not None]


def batch_of(views: Tensor) -> DeviceBatch:
    """Views as the loop takes them: samples 0 .. n - 1, without labels."""
    n, device = views.shape[1], views.device
    numbers = torch.arange(n, device=device)
    batch = ViewBatch(
        views=torch.empty(0, dtype=torch.uint8, device=device),
        sample_hashes=numbers, sample_ids=numbers,
        repeats=torch.zeros_like(numbers), labels=torch.full_like(numbers, -1), num_bad=0,
        is_augmented=True,
    )  # fmt: skip
    return DeviceBatch(batch, views, 0.0)


@dataclass(frozen=True)
class Recipe:
    """What distinguishes the rivals.

    Attributes:
        is_mixed: fp16 autocast with a gradient scaler; bf16 on a CPU. Otherwise fp32.
        is_channels_last: Weights, and each batch as it comes.
        is_ema_first: The EMA network moves before the forward passes, not after the update.
        switches: PyTorch's global ones.
    """

    is_mixed: bool
    is_channels_last: bool
    is_ema_first: bool
    switches: Switches


RECIPES = {
    "eager": Recipe(is_mixed=False, is_channels_last=False, is_ema_first=False, switches=FAST),
    "solo-learn-like": Recipe(
        is_mixed=True, is_channels_last=True, is_ema_first=False, switches=LIGHTNING
    ),
    "lightly-like": Recipe(is_mixed=True, is_channels_last=False, is_ema_first=True, switches=FAST),
}


class Rival:
    """A BYOL step after a recipe.

    Args:
        recipe: How it goes about it.
        model: Its networks are copied.
        views: [2, n, 3, s, s]; contiguous, as their loaders give them.
    """

    def __init__(self, recipe: Recipe, model: FAContrastive, views: Tensor) -> None:
        assert model.ema is not None
        self.recipe, self.switches = recipe, recipe.switches
        self._online: Any = plain_copy(model.online)
        self._target: Any = plain_copy(model.ema)
        self._layout = torch.channels_last if recipe.is_channels_last else torch.contiguous_format
        for network in self.networks():
            network.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._views, self._device = views.contiguous(), views.device.type
        self.optimizer = LoopLARS(self._online)
        is_scaled = recipe.is_mixed and self._device == "cuda"
        self._scaler = torch.amp.GradScaler(self._device, enabled=is_scaled)

    def steps(self, num: int) -> None:
        """So many optimiser steps."""
        with switched(self.switches):
            for _ in range(num):
                if self.recipe.is_ema_first:
                    self._move_target()
                with self.autocast():
                    loss = self.loss()
                self.optimizer.zero_grad(set_to_none=True)
                self._scaler.scale(loss).backward()
                self._scaler.step(self.optimizer)
                self._scaler.update()
                if not self.recipe.is_ema_first:
                    self._move_target()

    def autocast(self) -> torch.autocast:
        """A context for a forward pass."""
        kind = torch.float16 if self._device == "cuda" else torch.bfloat16
        return torch.autocast(self._device, dtype=kind, enabled=self.recipe.is_mixed)

    def loss(self) -> Tensor:
        """Sum over both directions of the mean of 2 - 2 cos(q(z_a), t_b)."""
        views = [view.contiguous(memory_format=self._layout) for view in self._views]
        online, target = self._online, self._target
        with torch.no_grad():
            t = [target.projector(target.backbone(view)) for view in views]
        p = [online.predictor(online.projector(online.backbone(view))) for view in views]
        cosines = [functional.cosine_similarity(p[i], t[1 - i], dim=-1).mean() for i in (0, 1)]
        return 4 - 2 * (cosines[0] + cosines[1])

    @torch.no_grad()
    def _move_target(self) -> None:
        """Each weight by itself, into new memory, as both libraries do."""
        online = dict(self._online.named_parameters())
        for name, old in self._target.named_parameters():  # it has no predictor
            old.data = TAU * old.data + (1 - TAU) * online[name].data

    def networks(self) -> list[nn.Module]:
        """The trained one first, then its EMA."""
        return [self._online, self._target]


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy that computes as its classes say: not compiled, nothing checkpointed.

    A compiled forward pass stands in the module itself and would lead back to the original.
    """
    copied = copy.deepcopy(module)
    for part in copied.modules():
        part.__dict__.pop("forward", None)
        if isinstance(part, ResNet):
            part.checkpoints_stages = False
    return copied


class LoopLARS(torch.optim.Optimizer):
    """LARS weight by weight (arXiv 1708.03888), as both libraries have it from Lightning Bolts.

    Norms are compared with 0 in Python, which waits for a GPU twice for each weight matrix. Biases
    and norm parameters are neither scaled nor decayed.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(
            list(network.parameters()), {"lr": LR, "momentum": MOMENTUM, "decay": WEIGHT_DECAY}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                change, w_norm, g_norm = w.grad, torch.norm(w), torch.norm(w.grad)
                if w.ndim > 1 and w_norm != 0 and g_norm != 0:
                    ratio = ETA * w_norm / (g_norm + group["decay"] * w_norm + 1e-8)
                    change = ratio * change.add(w, alpha=group["decay"])
                state = self.state[w]
                if "velocity" not in state:
                    state["velocity"] = change.clone()
                else:
                    state["velocity"].mul_(group["momentum"]).add_(change)
                w.add_(state["velocity"], alpha=-group["lr"])


class Convolutions(TorchDispatchMode):
    """The convolutions of a step, forward and backward, on the tensors that they were given.

    Args:
        ours: One step of it is recorded.
    """

    def __init__(self, ours: Ours) -> None:
        super().__init__()
        self.calls: list[partial[Any]] = []
        with self:
            ours.steps(1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call, aten = partial(func, *args, **(kwargs or {})), torch.ops.aten
        if func.overloadpacket in (aten.convolution, aten.convolution_backward):
            self.calls.append(call)
        return call()

    def steps(self, num: int) -> None:
        """So many times those of one step."""
        for _ in range(num):
            for call in self.calls:
                call()


Arm = Ours | Rival


def random_views(sizes: Sizes, device: torch.device) -> Tensor:
    """[2, n, 3, s, s], normal, seeded: as normalised pictures would be."""
    shape = (2, sizes.batch_size, 3, sizes.image_size, sizes.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def make_arms(run: Trainer[ContrastiveTask], views: Tensor) -> dict[str, Arm]:
    """All arms from the weights of a freshly built run."""
    rivals = {name: Rival(recipe, run.task.model, views) for name, recipe in RECIPES.items()}
    return {"ours": Ours(run, views), **rivals}


def check_same_loss(arms: dict[str, Arm], tolerance: float = 1e-4) -> dict[str, float]:
    """Each arm's loss in exact fp32, before any step.

    BN's running statistics are put back.

    Raises:
        RuntimeError: If one differs from ours by more than the tolerance, relative.
    """
    losses: dict[str, float] = {}
    with switched((False, False, "highest")), torch.no_grad():
        for name, arm in arms.items():
            with kept_buffers(*arm.networks()):
                losses[name] = float(arm.loss())
    for name, loss in losses.items():
        if not abs(loss - losses["ours"]) <= tolerance * abs(losses["ours"]):
            raise RuntimeError(f"{name} has loss {loss}, ours is {losses['ours']}: not one step")
    return losses


# -- measuring ------------------------------------------------------------------------------------


def build_run(
    folder: Path, sizes: Sizes, device: str, num_workers: int, settings: Sequence[str] = ()
) -> Trainer[ContrastiveTask]:
    """A run of plain BYOL that never saves, probes or draws pictures.

    Args:
        folder: Holds ``shards``; the run gets a folder of its own there.
        sizes: Of the networks and the batch.
        device: ``auto``, ``cpu`` or ``cuda``.
        num_workers: Of the loader.
        settings: ``key=value`` overrides of the config, e.g. ``fa.method=nn``.
    Raises:
        UserError: If a setting is refused.
    """
    out = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    config: dict[str, Any] = {
        "out": str(out / "run"),
        "arch": {
            "depth": sizes.depth, "width_per_group": sizes.width, "stem_channels": sizes.width,
            "res2_channels": sizes.width * (4 if sizes.depth >= 50 else 1),
        },
        "heads": {
            "projector_hidden_dim": sizes.hidden_dim, "predictor_hidden_dim": sizes.hidden_dim,
            "output_dim": sizes.dim,
        },
        "data": {
            "shards": str(folder / "shards"), "image_size": sizes.image_size,
            "batch_size": sizes.batch_size, "num_workers": num_workers, "shuffle_window": 4096,
        },
        "objective": {"name": "byol"},
        "fa": {"method": "none"},
        "optim": {"epochs": 100_000},
        "engine": {
            "device": device, "checkpoint_every_steps": _NEVER, "log_every_steps": 50,
            "watchdog_seconds": 0,
        },
        "eval": {"num_pictures": 0},
    }  # fmt: skip
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    return make_trainer(load_config(out / "config.yaml", settings), resume=False)


def wall_rates(ours: Ours, num_rounds: int, num_steps: int, num_drained: int) -> dict[str, Any]:
    """Images per second in wall-clock time, on synthetic data and from shards, in turns.

    Batches that the workers made while the other one had its turn are used up first.
    """
    stream, batch_size = batches(ours.run), ours.run.task.config.data.batch_size

    def synchronised() -> float:
        if ours.run.device.type == "cuda":
            torch.cuda.synchronize(ours.run.device)
        return time.perf_counter()

    def rate(given: Iterator[DeviceBatch] | None) -> float:
        if given is not None:
            ours.steps(num_drained, given)
        start = synchronised()
        ours.steps(num_steps, given)
        return num_steps * batch_size / (synchronised() - start)

    with contextlib.closing(stream):
        turns = {"synthetic": partial(rate, None), "shards": partial(rate, stream)}
        return harness.take_turns(turns, num_rounds, num_warmups=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for; the figures for JSON.

    Raises:
        UserError: For an impossible value.
    """
    device, sizes = harness.chosen_sizes(options, CPU_SIZES)
    is_gpu, peak = device.type == "cuda", options.peak_tflops
    require(peak is None or 0 < peak < math.inf, f"--peak-tflops {peak}: must be more than 0")
    num_steps, num_wall_steps, num_warmups = (10, 20, 10) if is_gpu else (1, 6, 2)
    num_workers = options.workers or max(1, (os.cpu_count() or 2) - 1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as at_end:
        folder, num_samples = Path(name), BATCHES_PER_EPOCH * sizes.batch_size
        harness.open_as_shards(harness.encoded_photos(16), folder, num_samples).close()
        run = build_run(folder, sizes, device.type, num_workers, options.settings)
        at_end.callback(run.batches.close)  # collected later, its workers would keep 10 s waiting
        arms = make_arms(run, random_views(sizes, device))
        losses = check_same_loss(arms)
        per_picture = count_flops(lambda: arms["eager"].steps(1)) // sizes.batch_size

        # All arms on synthetic data, after warm-up steps; then the engine alone, also from shards.
        clock = Clock(device, 1)
        for arm in arms.values():
            arm.steps(num_warmups)
        turns = {n: partial(clock, partial(arm.steps, num_steps)) for n, arm in arms.items()}
        is_taken_apart = not (is_gpu or run.task.config.engine.compile)
        if is_taken_apart:
            alone = Convolutions(arms["ours"])  # type: ignore[arg-type]
            turns["convolutions"] = partial(clock, partial(alone.steps, num_steps))
        times = harness.take_turns(turns, options.rounds, num_warmups=0)
        convolutions = None
        if is_taken_apart:
            of_them = times.pop("convolutions")
            ms = statistics.median(of_them) / num_steps
            gflop = count_flops(lambda: alone.steps(1)) / 1e9
            share = statistics.median(harness.ratios(of_them, times["ours"]))
            convolutions = {"ms": ms, "gflop": gflop, "gflop_per_second": 1e3 * gflop / ms}
            convolutions["share_of_step"] = share
        images = 1e3 * num_steps * sizes.batch_size
        rates = {name: [images / ms for ms in rounds] for name, rounds in times.items()}
        used = {}
        for name, arm in arms.items():
            with switched(arm.switches):
                used[name] = precision_of(arm.autocast(), device)
        median = harness.medians(rates)
        ratios = {
            f"ours/{name}": harness.ratios(rates["ours"], of_rival)
            for name, of_rival in rates.items()
            if name != "ours"
        }
        figures = {
            **harness.context(device, sizes),
            "images_per_second": median,
            "mfu": peak and median["ours"] * per_picture / (1e12 * peak),
            "convolutions": convolutions,
            "ratios": harness.medians(ratios),
            "ratio_range": harness.ranges(ratios),
            "range": harness.ranges(rates),
            "flops_per_picture": per_picture,
            "loss_in_fp32": losses,
            "precision": used,
            "clock": clock.name,
            "num_rounds": options.rounds,
            "num_workers": num_workers,
            "settings": options.settings,
        }
        if options.json is not None:  # a time limit then costs the rest alone
            write_json(options.json, figures)
        ours: Any = arms.pop("ours")
        arms.clear()
        wall = wall_rates(ours, options.rounds, num_wall_steps, 2 * num_workers + 2)
    shares = harness.ratios(wall["shards"], wall["synthetic"])
    return {
        **figures,
        "from_shards_share": statistics.median(shares),
        "wall_images_per_second": harness.medians(wall),
        "share_range": [min(shares), max(shares)],
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    counts = (
        ("rounds", 5, 1, "rounds in which every arm takes its turn"),
        ("workers", 0, 0, "of the loader; 0: one less than cores, at least 1"),
    )
    parser = harness.make_parser(__doc__, counts, sizes=CPU_SIZES)
    add = parser.add_argument
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="of the engine's config, e.g. engine.compile=true; again for more")  # fmt: skip
    add("--peak-tflops", type=float, metavar="X",
        help="dense rate of the device, from its data sheet: the MFU is printed too")  # fmt: skip
    options = parser.parse_args(argv)
    return harness.run_and_report(lambda: run(options), options.json)


if __name__ == "__main__":
    sys.exit(main())
