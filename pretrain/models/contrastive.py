"""The assembly: backbone -> projector -> FA -> predictor -> loss, as the paper draws it.

Notation: z = projections, p = predictions q(z), t = the target branch, A = feature augmentation.
Parallel-predictor architecture, view a predicting view b:  L( q(z_a), A(t_b) ).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pretrain.config import ArchConfig, FAConfig, HeadConfig, ObjectiveConfig
from pretrain.engine import dist
from pretrain.models import feature_aug
from pretrain.models.backbone import Arch, ResNet
from pretrain.models.heads import mlp
from pretrain.models.losses import byol_loss, infonce_loss
from pretrain.models.support_queue import SupportQueue

Views = Float[Tensor, "2 n 3 s s"]
Features = Float[Tensor, "2 n d"]


class OnlineNetwork(nn.Module):
    """Backbone f, projector g and predictor q: what gradients train and what DDP wraps."""

    def __init__(self, arch: ArchConfig, heads: HeadConfig, residual_gamma: float) -> None:
        super().__init__()
        self.backbone = ResNet(
            Arch(arch.depth, arch.width_per_group, arch.stem_channels, arch.res2_channels),
            residual_gamma,
        )
        self.projector = mlp(
            self.backbone.output_dim,
            heads.projector_hidden_dim,
            heads.output_dim,
            num_layers=heads.projector_layers,
            last_bn=heads.projector_last_bn,
        )
        self.predictor = mlp(
            heads.output_dim, heads.predictor_hidden_dim, heads.output_dim, num_layers=2
        )

    def project(self, view: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Projections z = g(f(view))."""
        return self.projector(self.backbone(view))

    def forward(self, views: Views) -> tuple[Features, Features]:
        """Projections z and predictions p; each view passes on its own, so BN is per view."""
        z = torch.stack([self.project(view) for view in views])
        p = torch.stack([self.predictor(z_view) for z_view in z])
        return z, p


@dataclass(frozen=True)
class StepOutput:
    """The loss with its graph, and detached tensors to look at: t and A(t) of view 2, [n, d]."""

    loss: Float[Tensor, ""]
    target: Float[Tensor, "n d"]
    augmented: Float[Tensor, "n d"]
    is_augmented: bool


class FAContrastive(nn.Module):
    """A base objective with feature augmentation on its target branch.

    Args:
        arch, heads, objective, fa: Their slices of the config.
        residual_gamma: See ``ResNet``.
    """

    def __init__(
        self,
        arch: ArchConfig,
        heads: HeadConfig,
        objective: ObjectiveConfig,
        fa: FAConfig,
        residual_gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self.objective, self.fa = objective, fa
        self.online = OnlineNetwork(arch, heads, residual_gamma)
        self.ema = self._make_ema() if objective.name == "byol" else None
        self.queue = SupportQueue(fa.queue_size, heads.output_dim) if fa.method == "nn" else None
        self._seen: Tensor | None = None  # what the queue takes after the optimiser step

    def _make_ema(self) -> OnlineNetwork:
        ema = copy.deepcopy(self.online)
        del ema.predictor
        return ema.requires_grad_(False)

    def step(
        self,
        views: Views,
        generator: torch.Generator,
        forward: Callable[[Views], tuple[Features, Features]] | None = None,
    ) -> StepOutput:
        """The loss of one batch.

        Args:
            views: This process's part of the two views.
            generator: Draws FA's random numbers for the global batch; the same on every rank.
            forward: The online network's forward, where DDP wraps it.
        """
        z, p = (forward or self.online)(views)
        t = self._target(views, z)
        with torch.autocast(views.device.type, enabled=False):  # bf16 cannot rank neighbours
            return self._compare(p.float(), t.float(), generator)

    def _compare(self, p: Features, t: Features, generator: torch.Generator) -> StepOutput:
        """FA and the loss, in fp32: 1 -> 2 and its mirror image."""
        augmented = [self._augment(t[view], generator) for view in (0, 1)]
        one_to_two = self._pair_loss(p[0], augmented[1])
        two_to_one = self._pair_loss(p[1], augmented[0])
        loss = one_to_two + two_to_one
        if self.objective.name == "infonce":
            loss = loss / 2
        if self.queue is not None:
            self._seen = dist.gather(t[0].detach())
        return StepOutput(loss, t[1].detach(), augmented[1][0].detach(), self._can_augment())

    def _target(self, views: Views, z: Features) -> Features:
        """t: the EMA network's projections (BYOL), or z itself with its gradient (InfoNCE)."""
        if self.ema is None:
            return z
        with torch.no_grad():
            return torch.stack([self.ema.project(view) for view in views])

    def _augment(
        self, t: Float[Tensor, "n d"], generator: torch.Generator
    ) -> Float[Tensor, "N n d"]:
        """A(t): N augmented features of each local row. The one place where FA's gradient stops."""
        fa = self.fa
        if fa.method == "none":
            return t.unsqueeze(0)
        if fa.stop_gradient:
            t = t.detach()
        if not self._can_augment() or fa.method == "identity":
            return t.expand(fa.num_features, *t.shape)
        rows = dist.local_rows(t.shape[0])
        batch = dist.gather(t)
        if fa.method == "nn":
            assert self.queue is not None
            return feature_aug.nearest_neighbour(
                batch, self.queue, top_k=fa.top_k, num_features=fa.num_features, generator=generator
            )[:, rows]
        draws = {
            "mask": lambda: feature_aug.mask(batch, ratio=fa.mask_ratio, generator=generator),
            "noise": lambda: feature_aug.noise(batch, sigma=fa.noise_sigma, generator=generator),
            "mixup": lambda: feature_aug.mixup(batch, alpha=fa.mixup_alpha, generator=generator),
        }
        return torch.stack([draws[fa.method]()[rows] for _ in range(fa.num_features)])

    def _can_augment(self) -> bool:
        """Nearest neighbours wait until the queue is filled; all else augments from the start."""
        return self.queue is None or int(self.queue.count) >= self.fa.min_fill

    def _pair_loss(
        self, p: Float[Tensor, "n d"], augmented: Float[Tensor, "N n d"]
    ) -> Float[Tensor, ""]:
        """L( q(z_a), A(t_b) ), mean over the N features or free (their sum)."""
        if self.objective.name == "byol":
            losses = [byol_loss(p, a) for a in augmented]
        else:
            columns = dist.gather(p)
            losses = [
                infonce_loss(
                    a,
                    columns,
                    temperature=self.objective.temperature,
                    first_positive=dist.local_rows(p.shape[0]).start,
                )
                for a in augmented
            ]
        total = torch.stack(losses)
        return total.sum() if self.fa.feature_loss == "free" else total.mean()

    @torch.no_grad()
    def after_optimizer_step(self, tau: float) -> None:
        """Move the EMA network towards the online one and put the batch into the queue.

        EMA covers parameters; the EMA network's BN layers keep running statistics of their own.
        """
        if self.ema is not None:
            ema = list(self.ema.parameters())
            online = [*self.online.backbone.parameters(), *self.online.projector.parameters()]
            torch._foreach_lerp_(ema, online, 1 - tau)  # type: ignore
        if self.queue is not None:
            assert self._seen is not None, "after_optimizer_step without a step before it"
            self.queue.put(self._seen)
            self._seen = None


def fa_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """FA's random numbers of one optimiser step: a pure function of (seed, step)."""
    digest = hashlib.blake2b(f"fa|{seed}|{step}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator


def mean_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Mean cosine similarity between rows: how far FA moved them."""
    return float(functional.cosine_similarity(a.float(), b.float(), dim=1).mean())
