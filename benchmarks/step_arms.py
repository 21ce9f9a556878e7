"""Four ways to make the same BYOL step; each owns its networks and its optimiser.

ours: the engine's own loop (``Trainer.steps``) with whatever the config switches on.
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
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.data.input_pipeline import DeviceBatch
from pretrain.data.loader import TwoViewBatch
from pretrain.engine.trainer import Trainer
from pretrain.features.row_random import fa_generator
from pretrain.model.backbone import ResNet
from pretrain.model.joint_embedding import FAContrastive

LR, MOMENTUM, WEIGHT_DECAY, ETA, TAU = 0.1, 0.9, 1e-6, 1e-3, 0.99


@dataclass(frozen=True)
class Flags:
    """PyTorch's global switches that an arm runs under."""

    cudnn_benchmark: bool
    cudnn_tf32: bool
    matmul_tf32: bool

    @classmethod
    def now(cls) -> "Flags":
        """As they stand."""
        cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
        return cls(cudnn.benchmark, cudnn.allow_tf32, bool(cuda.matmul.allow_tf32))

    def set(self) -> None:
        """Make them stand so."""
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.matmul_tf32

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """These in the context, what was before after it."""
        before = Flags.now()
        self.set()
        try:
            yield
        finally:
            before.set()


FAST = Flags(cudnn_benchmark=False, cudnn_tf32=True, matmul_tf32=True)
LIGHTNING = Flags(cudnn_benchmark=False, cudnn_tf32=True, matmul_tf32=False)


class Ours:
    """The engine's own loop on a batch that lies on the device.

    Args:
        run: Freshly built.
        views: [2, n, 3, s, s], normalised.
    """

    name = "ours"

    def __init__(self, run: Trainer, views: Tensor) -> None:
        self.run, self.flags = run, Flags.now()
        if run.config.engine.channels_last:
            views = torch.stack([v.permute(0, 2, 3, 1) for v in views]).permute(0, 1, 4, 2, 3)
        self.views, self._fed = views, fed_of(views)

    def steps(self, num: int) -> None:
        """So many optimiser steps."""
        self.run.steps(self._fed for _ in range(num))

    def steps_on(self, batches: Iterable[DeviceBatch]) -> None:
        """A step on each batch."""
        self.run.steps(batches)

    def loss(self) -> Tensor:
        """In fp32, with the graph; BN moves on."""
        model, views = self.run.model, self._fed.views
        return model.step(views, fa_generator(0, 0, views.device)).loss

    def networks(self) -> list[nn.Module]:
        """The trained one first, then its EMA."""
        return [self.run.model.online, *([self.run.model.ema] if self.run.model.ema else [])]


def fed_of(views: Tensor) -> DeviceBatch:
    """Views as the loop takes them: samples 0 .. n - 1, without labels."""
    n, device = views.shape[1], views.device
    numbers = torch.arange(n, device=device)
    batch = TwoViewBatch(
        views=torch.empty(0, dtype=torch.uint8, device=device), keys=numbers, sample_ids=numbers,
        visits=torch.zeros_like(numbers), labels=torch.full_like(numbers, -1), num_bad=0,
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
        flags: PyTorch's global switches.
    """

    is_mixed: bool
    is_channels_last: bool
    is_ema_first: bool
    flags: Flags


EAGER = Recipe(is_mixed=False, is_channels_last=False, is_ema_first=False, flags=FAST)
SOLO_LEARN = Recipe(is_mixed=True, is_channels_last=True, is_ema_first=False, flags=LIGHTNING)
LIGHTLY = Recipe(is_mixed=True, is_channels_last=False, is_ema_first=True, flags=FAST)
RECIPES = {"eager": EAGER, "solo-learn-like": SOLO_LEARN, "lightly-like": LIGHTLY}


class Rival:
    """A BYOL step after a recipe.

    Args:
        name: Of the arm.
        recipe: How it goes about it.
        model: Its networks are copied.
        views: [2, n, 3, s, s]; contiguous, as their loaders give them.
    """

    def __init__(self, name: str, recipe: Recipe, model: FAContrastive, views: Tensor) -> None:
        assert model.ema is not None
        self.name, self.recipe, self.flags = name, recipe, recipe.flags
        self._online: Any = plain_copy(model.online)
        self._target: Any = plain_copy(model.ema)
        layout = torch.channels_last if recipe.is_channels_last else torch.contiguous_format
        for network in (self._online, self._target):
            network.to(memory_format=layout)  # type: ignore[call-overload]
        self._views, self._device = views.contiguous(), views.device
        self.optimizer = LoopLARS(self._online)
        is_scaled = recipe.is_mixed and self._device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=is_scaled)

    def steps(self, num: int) -> None:
        """So many optimiser steps."""
        for _ in range(num):
            self._step()

    def _step(self) -> None:
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
        kind = torch.float16 if self._device.type == "cuda" else torch.bfloat16
        return torch.autocast(self._device.type, dtype=kind, enabled=self.recipe.is_mixed)

    def loss(self) -> Tensor:
        """Sum over both directions of the mean of 2 - 2 cos(q(z_a), t_b)."""
        views = list(self._views)
        if self.recipe.is_channels_last:
            views = [view.to(memory_format=torch.channels_last) for view in views]
        online, target = self._online, self._target
        assert online.predictor is not None
        with torch.no_grad():
            t = [target.projector(target.backbone(view)) for view in views]
        p = [online.predictor(online.projector(online.backbone(view))) for view in views]
        return _distance(p[0], t[1]) + _distance(p[1], t[0])

    @torch.no_grad()
    def _move_target(self) -> None:
        """Each weight by itself, into new memory, as both libraries do."""
        pairs = (
            (self._online.backbone, self._target.backbone),
            (self._online.projector, self._target.projector),
        )
        for online, target in pairs:
            for new, old in zip(online.parameters(), target.parameters(), strict=True):
                old.data = TAU * old.data + (1 - TAU) * new.data

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


def _distance(p: Tensor, t: Tensor) -> Tensor:
    return 2 - 2 * functional.cosine_similarity(p, t.detach(), dim=-1).mean()


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


Arm = Ours | Rival


def make_arms(run: Trainer, views: Tensor) -> dict[str, Arm]:
    """All arms from the weights of a freshly built run."""
    rivals = {name: Rival(name, recipe, run.model, views) for name, recipe in RECIPES.items()}
    return {"ours": Ours(run, views), **rivals}


def check_same_loss(arms: dict[str, Arm], tolerance: float = 1e-4) -> dict[str, float]:
    """Each arm's loss in exact fp32, before any step.

    BN's running statistics are put back.

    Raises:
        RuntimeError: If one differs from ours by more than the tolerance, relative.
    """
    losses: dict[str, Any] = {}
    exact = replace(FAST, cudnn_tf32=False, matmul_tf32=False)
    with exact.kept(), torch.no_grad():
        for name, arm in arms.items():
            before = [(b, b.clone()) for network in arm.networks() for b in network.buffers()]
            losses[name] = float(arm.loss())
            for buffer, value in before:
                buffer.copy_(value)
    for name, loss in losses.items():
        if not abs(loss - losses["ours"]) <= tolerance * abs(losses["ours"]):
            raise RuntimeError(f"{name} has loss {loss}, ours is {losses['ours']}: not one step")
    return losses
