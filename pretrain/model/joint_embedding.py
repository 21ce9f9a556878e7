"""The assembly: backbone -> projector -> FA -> predictor -> loss, as the paper draws it.

Notation: z = projections, q = predictor, t = the target branch, A = feature augmentation.
View a predicts view b:

    basic     L( z_a , A(t_b) )        pre       L( q(A(z_a)) , t_b )
    parallel  L( q(z_a) , A(t_b) )     post      L( A(q(z_a)) , t_b )
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from common.resnet import Arch
from pretrain import collectives as dist
from pretrain.config import FAConfig, HeadConfig, ObjectiveConfig
from pretrain.features.feature_augmentation import AugmentationContext, FeatureAugmenter
from pretrain.features.memory_bank import SupportQueue
from pretrain.features.row_random import RowRandom
from pretrain.model.backbone import ResNet
from pretrain.model.heads import mlp
from pretrain.objectives.method_spec import resolve
from pretrain.objectives.objective import Objective, Prototypes

Views = Float[Tensor, "2 n 3 s s"]
Features = Float[Tensor, "2 n d"]
Many = Float[Tensor, "N n d"]


class OnlineNetwork(nn.Module):
    """Backbone f, projector g, predictor q, prototypes: what gradients train and DDP wraps."""

    def __init__(
        self,
        arch: Arch,
        heads: HeadConfig,
        residual_gamma: float,
        *,
        has_predictor: bool,
        num_prototypes: int,
    ) -> None:
        super().__init__()
        self.backbone = ResNet(arch, residual_gamma)
        self.projector = mlp(
            self.backbone.output_dim,
            heads.projector_hidden_dim,
            heads.output_dim,
            num_layers=heads.projector_layers,
            last_bn=heads.projector_last_bn,
            last_bn_affine=heads.projector_last_bn_affine,
            hidden_bn=heads.projector_hidden_bn,
            dropout=heads.dropout,
        )
        self.predictor: nn.Module | None = None
        if has_predictor:
            self.predictor = mlp(
                heads.output_dim,
                heads.predictor_hidden_dim,
                heads.output_dim,
                num_layers=2,
                dropout=heads.dropout,
            )
        self.prototypes: Prototypes | None = None
        if num_prototypes:
            self.prototypes = Prototypes(num_prototypes, heads.output_dim)

    def project(self, view: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Projections z = g(f(view))."""
        return self.projector(self.backbone(view))

    def predict(self, z: Float[Tensor, "... n d"]) -> Float[Tensor, "... n d"]:
        """Predictions q(z), each [n, d] on its own, so that BN is per view."""
        assert self.predictor is not None
        return torch.stack([self.predictor(part) for part in z])

    def forward(self, views: Views, compare: Callable[[Features], StepOutput]) -> StepOutput:
        """Project each view on its own, then compare: all inside DDP, so that its hooks see all."""
        return compare(torch.stack([self.project(view) for view in views]))


@dataclass(frozen=True)
class StepOutput:
    """The loss with its graph; the rest is detached and of the direction 1 -> 2, [n, d].

    Attributes:
        loss: Of this process's rows, both directions.
        online: What predicts, as the loss sees it.
        target: What is predicted, as the loss sees it.
        projection: t_2, before anything is done to it.
        original: What A took.
        augmented: What A made of it (its first feature).
        is_augmented: Whether A was more than the identity.
        entering: What the support queue takes after the optimiser step.
        keys: Both views' t, for MoCo's queues: [2, n, d].
    """

    loss: Float[Tensor, ""]
    online: Tensor
    target: Tensor
    projection: Tensor
    original: Tensor
    augmented: Tensor
    is_augmented: bool
    entering: Tensor
    keys: Features


class FAContrastive(nn.Module):
    """A base objective with feature augmentation in one of the four architectures.

    Args:
        arch, heads, objective, fa: Their slices of the config.
        residual_gamma: See ``ResNet``.

    Raises:
        UserError: If FA and base method do not go together.
    """

    def __init__(
        self,
        arch: Arch,
        heads: HeadConfig,
        objective: ObjectiveConfig,
        fa: FAConfig,
        residual_gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self.spec, self.fa = resolve(objective, fa), fa
        self.online = OnlineNetwork(
            arch,
            heads,
            residual_gamma,
            has_predictor=self.spec.has_predictor,
            num_prototypes=objective.num_prototypes if objective.name == "swav" else 0,
        )
        self.ema: OnlineNetwork | None = None
        if self.spec.has_ema:
            self.ema = copy.deepcopy(self.online).requires_grad_(False)
            del self.ema.predictor
        self.objective = Objective(objective, heads.output_dim)
        self.augmenter = FeatureAugmenter(fa, heads.output_dim)

    @property
    def frozen_prototype_steps(self) -> int:
        """For so many steps SwAV's prototypes stand still."""
        return self.objective.config.frozen_prototype_steps

    @property
    def queue(self) -> SupportQueue | None:
        """The support queue, where FA uses one."""
        return self.augmenter.queue

    def step(
        self,
        views: Views,
        generator: torch.Generator,
        forward: Callable[..., StepOutput] | None = None,
        *,
        progress: float = 1.0,
    ) -> StepOutput:
        """The loss of one batch.

        Args:
            views: This process's part of the two views.
            generator: Draws FA's random numbers for the global batch; the same on every rank.
            forward: The online network's forward, where DDP wraps it.
            progress: Share of the training that is done, for FA's strength.
        """
        n = views.shape[1]
        random = RowRandom(generator, dist.local_rows(n), n * dist.world_size())
        t = self.ema_projections(views)
        compare = self.comparison(t, random, progress)
        return (forward or self.online)(views, compare)

    def ema_projections(self, views: Views) -> Features | None:
        """Z' of BYOL and MoCo; None where the target branch is the online one."""
        if self.ema is None:
            return None
        with torch.no_grad(), record_function("EMA forward"):
            return torch.stack([self.ema.project(view) for view in views])

    def comparison(
        self, t: Features | None, random: RowRandom, progress: float
    ) -> Callable[[Features], StepOutput]:
        """What turns the projections of these rows into their loss."""
        context = AugmentationContext(random, self.augmenter.strength(progress))
        return lambda z: self.compare(z, z if t is None else t, context)

    def compare(self, z: Features, t: Features, context: AugmentationContext) -> StepOutput:
        """FA, predictor and loss: view 2 predicts view 1, and view 1 predicts view 2."""
        if self.spec.stops_target:
            t = t.detach()
        p = self.online.predict(z) if self.spec.architecture in ("post", "parallel") else z
        with torch.autocast(z.device.type, enabled=False):  # bf16 cannot rank neighbours
            z, p, t = z.float(), p.float(), t.float()
        two_to_one = self._direction(1, 0, z, p, t, context)
        one_to_two = self._direction(0, 1, z, p, t, context)
        loss = self.objective.scale * (one_to_two.loss + two_to_one.loss)
        entering = self._taken(z, p, t)[1 if self.fa.views == "second" else 0]
        return StepOutput(
            loss=loss,
            online=one_to_two.online[0].detach(),
            target=one_to_two.target[0].detach(),
            projection=t[1].detach(),
            original=one_to_two.original.detach(),
            augmented=one_to_two.augmented.detach(),
            is_augmented=self.augmenter.is_ready(),
            entering=entering.detach(),
            keys=t.detach(),
        )

    def _direction(
        self, a: int, b: int, z: Features, p: Features, t: Features, context: AugmentationContext
    ) -> Direction:
        """View a predicts view b: the figure of the paper, one line for each architecture."""
        with torch.autocast(z.device.type, enabled=False):
            taken, is_target = self._taken(z, p, t), self.spec.side == "target"
            view = b if is_target else a
            with record_function("FA"):
                if self.fa.views in ("both", ("first", "second")[view]):
                    augmented = self.augmenter(taken[view], taken[1 - view], context)
                else:
                    augmented = taken[view].unsqueeze(0)
            if is_target:  # basic, parallel
                online, target = p[a].unsqueeze(0), augmented
            else:  # basic with FA online, pre, post
                online, target = augmented, t[b].unsqueeze(0)
        if self.spec.architecture == "pre":
            online = self.online.predict(online)
        with torch.autocast(z.device.type, enabled=False), record_function("loss"):
            # Mean over the N augmented features, or their sum (the free loss).
            num = max(len(online), len(target))
            pairs = zip(online.float().expand(num, -1, -1), target.expand(num, -1, -1), strict=True)
            losses = torch.stack(
                [self.objective(o, a, t[b], b, self.online.prototypes) for o, a in pairs]
            )
            loss = losses.sum() if self.fa.feature_loss == "free" else losses.mean()
        return Direction(loss, online, target, taken[view], augmented[0])

    def _taken(self, z: Features, p: Features, t: Features) -> Features:
        """The features that A takes."""
        if self.spec.side == "target":
            return t
        return p if self.spec.architecture == "post" else z

    @torch.no_grad()
    def queue_report(
        self, output: StepOutput, sample_ids: Int[Tensor, " n"], labels: Int[Tensor, " n"]
    ) -> dict[str, float]:
        """Age, self-hits and labels of the nearest entries, before the batch itself enters."""
        if self.queue is None or not self.augmenter.is_ready():
            return {}
        nearest = self.augmenter.nearest_indices(output.original, 1)[:, 0]
        return self.queue.report(nearest, sample_ids, labels)

    @torch.no_grad()
    def after_optimizer_step(
        self,
        tau: float,
        outputs: Sequence[StepOutput],
        sample_ids: Int[Tensor, " n"] | None = None,
        labels: Int[Tensor, " n"] | None = None,
    ) -> None:
        """Move the EMA network towards the online one and let the batch enter the queues.

        EMA covers parameters; the EMA network's BN layers keep running statistics of their own.

        Args:
            tau: Share of the EMA weights that stays.
            outputs: Of the step: one, or one for each micro-batch in order.
            sample_ids: Which sample each local row is.
            labels: Its class, -1 where there is none.
        """
        if self.ema is not None:
            ema = list(self.ema.parameters())
            online = [*self.online.backbone.parameters(), *self.online.projector.parameters()]
            with record_function("EMA update"):
                torch._foreach_lerp_(ema, online, 1 - tau)  # type: ignore
        with record_function("queue"):
            if self.queue is not None:
                ids, classes = (None if x is None else dist.gather(x) for x in (sample_ids, labels))
                self.queue.put(dist.gather(torch.cat([o.entering for o in outputs])), ids, classes)
            if self.objective.negatives is not None:
                keys = torch.cat([o.keys for o in outputs], dim=1)
                self.objective.put(torch.stack([dist.gather(view) for view in keys]))


@dataclass(frozen=True)
class Direction:
    """One view predicting the other."""

    loss: Float[Tensor, ""]
    online: Many
    target: Many
    original: Tensor
    augmented: Tensor


def mean_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Mean cosine similarity between rows: how far FA moved them."""
    return float(functional.cosine_similarity(a.float(), b.float(), dim=1).mean())
