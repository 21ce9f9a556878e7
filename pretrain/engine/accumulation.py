"""The gradients of one optimiser step: in one pass, or over micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from common.backbone import Preprocessing
from common.errors import require
from pretrain import collectives as dist
from pretrain.config import AdversarialConfig, DataConfig, OptimConfig
from pretrain.features.augmentations.base import RowRandom
from pretrain.model.joint_embedding import FAContrastive, Features, StepOutput, Views

Images = Float[Tensor, "n 3 s s"]
Ids = Int[Tensor, " n"] | None
Compare = Callable[[Features], StepOutput]


@dataclass(frozen=True)
class Gradients:
    """Accumulates the gradients of a batch into the parameters' ``grad``.

    Args:
        model: The assembly.
        forward: The online network, or DDP around it.
        optim: ``micro_batch_size`` (of all processes together; 0: no micro-batches) and
            ``accumulation``.
        autocast: A fresh context for every forward pass.
        scale: Of the loss that backward is called on, for fp16; gradients stay scaled.

    Raises:
        UserError: If the micro-batches cannot be shared out among the processes.
    """

    model: FAContrastive
    forward: nn.Module
    optim: OptimConfig
    autocast: Callable[[], contextlib.AbstractContextManager]
    scale: Callable[[Tensor], Tensor] = lambda loss: loss

    def __post_init__(self) -> None:
        size, world_size = self.optim.micro_batch_size, dist.world_size()
        require(
            size % world_size == 0,
            f"optim.micro_batch_size ({size}) counts the rows of all processes: it must be a "
            f"multiple of their number, {world_size}",
        )
        require(
            size == 0 or size // world_size >= 2,
            f"optim.micro_batch_size ({size}) counts the rows of all processes: {world_size} need "
            f"{2 * world_size} or more, two each, for BN",
        )

    def compute(
        self,
        views: Views,
        generator: Callable[[], torch.Generator],
        progress: float,
        sample_ids: Ids = None,
    ) -> list[StepOutput]:
        """One output for each micro-batch; the first one's loss is that of the whole local batch.

        Args:
            views: This process's part of the batch.
            generator: Makes FA's generator of this step afresh.
            progress: Share of the training that is done.
            sample_ids: Which sample each row of this process is.
        """
        parts = self._parts(views)
        comparison = partial(self._comparison, views, generator, progress, sample_ids)
        if len(parts) > 1 and self.optim.accumulation == "cached":
            return [self._cached(views, parts, comparison)]
        # The loss is a mean over samples: each micro-batch adds its share.
        outputs, total = [], torch.zeros((), device=views[0].device)
        for part in parts:
            own = rows_of(views, part)
            with record_function("forward"), self._sync(part is parts[-1]), self.autocast():
                t = self.model.ema_projections(own)
                output = self.forward(own, comparison(t, part))
                share = output.loss / len(parts)
            with record_function("backward"), self._sync(part is parts[-1]):
                self.scale(share).backward()
            total += share.detach()
            outputs.append(replace(output, loss=output.loss.detach()))
        outputs[0] = replace(outputs[0], loss=total)
        return outputs

    def _cached(
        self, views: Views, parts: list[slice], comparison: Callable[..., Compare]
    ) -> StepOutput:
        """Cached gradients (GradCache, arXiv 2101.06983): the loss sees the whole batch.

        BN statistics of the online network are those of the second pass alone.
        """
        # First pass, without graph: all projections.
        z, states, device = [], [], views[0].device
        kept = kept_buffers(self.model.online)
        with record_function("forward"), torch.no_grad(), self.autocast(), kept:
            for part in parts:
                states.append(_random_state(device))
                z.append(self.model.online(rows_of(views, part), lambda z: z))
            ema = [self.model.ema_projections(rows_of(views, part)) for part in parts]
        # FA, predictor and loss on the whole batch leave gradients at the projections.
        t = None if ema[0] is None else torch.cat([x for x in ema if x is not None], dim=1)
        cached = torch.cat(z, dim=1).requires_grad_()
        with record_function("forward"), self.autocast():
            output = comparison(t, slice(0, len(views[0])))(cached)
        with record_function("backward"):
            self.scale(output.loss).backward()
        assert cached.grad is not None
        # Second pass, with graph: each micro-batch's projections again, from the same random
        # state, and the cached gradient through them. DDP waits for the heads' gradients too.
        after = _random_state(device)
        for part, state in zip(parts, states, strict=True):
            _set_random_state(state, device)
            with self._sync(part is parts[-1]):
                with record_function("forward"), self.autocast():
                    again = self.forward(rows_of(views, part), lambda z: z)
                surrogate = (again.float() * cached.grad[:, part].float()).sum()
                with record_function("backward"):
                    (surrogate + self.model.online.zero_through_heads()).backward()
        _set_random_state(after, device)
        return output

    def attacked(
        self,
        views: Views,
        generator: Callable[[], torch.Generator],
        progress: float,
        adversarial: AdversarialConfig,
        data: DataConfig,
        sample_ids: Ids = None,
    ) -> Views:
        """The views with view 1 changed to raise the loss (``adversarial.epsilon``; 0: as it is).

        The loss as gradients see it: a target without gradient counts as fixed, so it is view 1's
        prediction of view 2 that gets worse. Small crops stay as they are. Each micro-batch is
        attacked by its own loss. The search leaves BN statistics, global random state and
        parameters' gradients as they were; queues are only read.
        """
        if adversarial.epsilon == 0:
            return views
        views = views.clone() if isinstance(views, Tensor) else [views[0].clone(), *views[1:]]
        device = views[0].device
        state, ema = _random_state(device), self.model.ema or nn.Module()
        pixels = Preprocessing(data.pixel_mean, data.pixel_std)
        for part in self._parts(views):
            _set_random_state(state, device)
            with kept_buffers(self.model.online, ema):
                own = rows_of(views, part)
                with self.autocast():
                    t = self.model.ema_projections(own)
                before = _random_state(device)

                def loss_of(first: Tensor, part=part, t=t, before=before, own=own) -> Tensor:
                    """With the same random numbers at every call."""
                    _set_random_state(before, first.device)
                    compare = self._comparison(views, generator, progress, sample_ids, t, part)
                    with self.autocast():
                        large = torch.stack([first, own[1]])
                        return self.model.online([*large, *own[2:]], compare).loss

                views[0][part] = perturb(loss_of, own[0], adversarial, pixels)
        _set_random_state(state, device)
        return views

    def _parts(self, views: Views) -> list[slice]:
        """The local rows of each micro-batch."""
        n = len(views[0])
        size = self.optim.micro_batch_size // dist.world_size() or n
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def _comparison(
        self,
        views: Views,
        generator: Callable[[], torch.Generator],
        progress: float,
        sample_ids: Ids,
        t: Features | None,
        part: slice,
    ) -> Compare:
        """What turns the projections of some local rows into their loss."""
        num_local = len(views[0])
        first = dist.local_rows(num_local).start
        rows = slice(first + part.start, first + part.stop)
        random = RowRandom(generator(), rows, num_local * dist.world_size())
        ids = None if sample_ids is None else sample_ids[part]
        return partial(self.model.compare, t=t, random=random, progress=progress, sample_ids=ids)

    def _sync(self, is_last: bool) -> contextlib.AbstractContextManager:
        """DDP averages gradients in the last backward pass only."""
        if isinstance(self.forward, DistributedDataParallel) and not is_last:
            return self.forward.no_sync()
        return contextlib.nullcontext()


def rows_of(views: Views, part: slice) -> list[Images]:
    """Some rows of each view."""
    return [view[part] for view in views]


def perturb(
    loss_of: Callable[[Images], Float[Tensor, ""]],
    images: Images,
    adversarial: AdversarialConfig,
    pixels: Preprocessing,
) -> Images:
    """Pictures near the given ones at which the loss is higher.

    FGSM (arXiv 1412.6572) in one step, PGD (arXiv 1706.06083) in several.

    Each step moves every pixel value by ``step_size`` in the direction of the sign of its
    gradient, then back into the bound: at most epsilon from where it was, and in 0..1. Gradients
    are taken at the pictures only; those of the network's parameters stay as they are.

    Args:
        loss_of: The loss of normalised pictures, with a graph to them.
        images: Normalised; of valid pixels, 0..1 before (x - mean) / std.
        adversarial: The bound, the number of steps, and their size; None: one that reaches the
            bound, 1.25 epsilon of a single step and 2.5 epsilon / num_steps of several.
        pixels: Of the normalisation.
    Returns:
        Normalised pictures without a graph.
    """
    epsilon, num_steps = adversarial.epsilon, adversarial.num_steps
    usual = 1.25 * epsilon if num_steps == 1 else 2.5 * epsilon / num_steps
    step = (usual if adversarial.step_size is None else adversarial.step_size) / 255
    mean, std = (images.new_tensor(x).view(1, 3, 1, 1) for x in (pixels.mean, pixels.std))
    plain = images.detach() * std + mean
    low, high = (plain - epsilon / 255).clamp(0, 1), (plain + epsilon / 255).clamp(0, 1)
    for _ in range(num_steps):
        with torch.enable_grad():
            candidate = plain.detach().requires_grad_()
            loss = loss_of((candidate - mean) / std)
        (gradient,) = torch.autograd.grad(loss, candidate)
        plain = (plain + step * gradient.sign()).clamp(low, high)
    return (plain - mean) / std


@contextlib.contextmanager
def kept_buffers(*modules: nn.Module) -> Iterator[None]:
    """BN statistics as before, whatever passes through."""
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the global generators, which dropout draws from."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
