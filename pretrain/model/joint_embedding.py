"""The assembly: backbone -> projector -> FA -> predictor -> loss, as the paper draws it.

Notation: z = projections, q = predictor, t = the target branch, A = feature augmentation.
View a predicts view b, which is one of the two large ones; a may be any other (multi-crop):

    basic     L( z_a , A(t_b) )        pre       L( q(A(z_a)) , t_b )
    parallel  L( q(z_a) , A(t_b) )     post      L( A(q(z_a)) , t_b )
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from pretrain import collectives as dist
from pretrain.config import FAConfig, HeadConfig, resolve
from pretrain.features.augmentations.base import RowRandom
from pretrain.features.feature_augmentation import FeatureAugmenter
from pretrain.features.memory_bank import SupportQueue
from pretrain.model.backbones.base import Backbone
from pretrain.objectives.base import Objective, Pair

NUM_LARGE = 2  # views that are predicted; further ones, the small crops, only predict
# The large views; or a list of all, of which those behind them have another size.
Views = Float[Tensor, "2 n 3 s s"] | list[Float[Tensor, "n 3 _ _"]]
Features = Float[Tensor, "views n d *yx"]  # maps of an objective that predicts positions
NUM_BINS = 20  # of a step's histograms, from cosine -1 to 1


class OnlineNetwork(nn.Module):
    """Backbone f, projector g, predictor q: what gradients train and DDP wraps.

    An objective that trains a part of its own adds it as a further child.
    """

    def __init__(
        self,
        arch: Backbone,
        heads: HeadConfig,
        residual_gamma: float,
        *,
        has_predictor: bool,
        of_maps: bool = False,
    ) -> None:
        super().__init__()
        self.of_maps = of_maps
        self.backbone = arch.build(residual_gamma)
        self.projector = mlp(
            cast(int, self.backbone.output_dim),
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
            dims = heads.output_dim, heads.predictor_hidden_dim, heads.output_dim
            self.predictor = mlp(*dims, num_layers=2, dropout=heads.dropout, of_maps=of_maps)

    def project(self, view: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d *yx"]:
        """Projections z = g(f(view)), at each position of the map where there is one."""
        if not self.of_maps:
            return self.projector(self.backbone(view))
        maps = self.backbone(view, as_map=True).movedim(1, 3)
        return self.projector(maps.flatten(0, 2)).unflatten(0, maps.shape[:3]).movedim(3, 1)

    def predict(self, z: Float[Tensor, "N n d *yx"]) -> Float[Tensor, "N n d *yx"]:
        """Predictions q(z), each [n, d] on its own, so that BN is per view."""
        assert self.predictor is not None
        return torch.stack([self.predictor(part) for part in z])

    def forward(self, views: Views, compare: Callable[[Features], StepOutput]) -> StepOutput:
        """Project each view on its own, then compare: all inside DDP, so that its hooks see all."""
        return compare(torch.stack([self.project(view) for view in views]))

    def zero_through_heads(self) -> Float[Tensor, ""]:
        """Zero, with a graph to all parameters that projections do not depend on."""
        rest = [
            part for name, part in self.named_children() if name not in ("backbone", "projector")
        ]
        zero = torch.zeros((), device=next(self.parameters()).device)
        return sum((0 * p.sum() for part in rest for p in part.parameters()), zero)


class FAContrastive(nn.Module):
    """An objective with feature augmentation in one of the four architectures.

    Args:
        arch, heads, objective, fa: Their slices of the config.
        residual_gamma: See ``Backbone.build``.
        num_samples: Of the training set; None: not known.

    Attributes:
        online: What is trained.
        ema: The target branch of an objective that has an EMA copy.
        memory: What the objective keeps without training it.

    Raises:
        UserError: If FA and objective do not go together.
    """

    def __init__(
        self,
        arch: Backbone,
        heads: HeadConfig,
        objective: Objective,
        fa: FAConfig,
        residual_gamma: float = 1.0,
        num_samples: int | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.fa, self.spec = objective, fa, resolve(objective, fa)
        has_predictor, of_maps = self.spec.architecture != "basic", objective.min_positions > 0
        self.online = OnlineNetwork(
            arch, heads, residual_gamma, has_predictor=has_predictor, of_maps=of_maps
        )
        self.ema: OnlineNetwork | None = None
        if objective.has_ema:
            self.ema = copy.deepcopy(self.online).requires_grad_(False)
            del self.ema.predictor
        self.memory: nn.Module | None = objective.make_state(heads.output_dim, num_samples)
        if self.memory is not None and any(True for _ in self.memory.parameters()):
            self.online.add_module(objective.state_name, self.memory)
            self.memory = None
        self.augmenter = FeatureAugmenter(fa, heads.output_dim)

    @property
    def objective_state(self) -> nn.Module | None:
        """What the objective keeps, trained or not."""
        if self.memory is not None:
            return self.memory
        return getattr(self.online, self.objective.state_name, None)

    @property
    def queue(self) -> SupportQueue | None:
        """The support queue, where FA uses one."""
        return self.augmenter.queue

    def ema_projections(self, views: Views) -> Features | None:
        """The targets t of an EMA branch; None where the target branch is the online one."""
        if self.ema is None:
            return None
        with torch.no_grad(), record_function("EMA forward"):
            return torch.stack([self.ema.project(view) for view in views[:NUM_LARGE]])

    def compare(
        self,
        z: Features,
        t: Features | None,
        random: RowRandom,
        progress: float,
        sample_ids: Int[Tensor, " n"] | None = None,
    ) -> StepOutput:
        """FA, predictor and loss: view 2 predicts view 1, and view 1 predicts view 2.

        Small crops predict both (`Objective.pairs`). A target's A is taken once for all that
        predict it, A and predictor of a predicting view once for all that it predicts.

        Args:
            z: Projections of the online branch.
            t: Targets of the EMA branch, of the large views; None: z.
            random: Draws FA's random numbers for these rows.
            progress: Share of the training that is done, for FA's strength.
            sample_ids: Which sample each row is, if that is known.
        """
        architecture, side = self.spec.architecture, self.spec.side
        strength = self.augmenter.strength(progress)
        t = z if t is None else t
        t = t.detach() if self.spec.stops_target else t
        p = self.online.predict(z) if architecture in ("post", "parallel") else z
        with torch.autocast(z.device.type, enabled=False):  # bf16 cannot rank neighbours
            z, p, t = z.float(), p.float(), t.float()
        taken = t if side == "target" else p  # by A: t, z or q(z)

        directions, num_views, targets = [], len(z), []
        augmented: dict[int, Tensor] = {}  # by view
        predicted: dict[int, Tensor] = {}
        prepared: dict[tuple[int, int], list[Tensor]] = {}  # targets, by view and their number
        for a, b in self.objective.pairs(num_views):  # view a predicts view b
            view = b if side == "target" else a
            if view not in augmented:
                with torch.autocast(z.device.type, enabled=False), record_function("FA"):
                    if self.fa.views == "both" or view == ("first", "second").index(self.fa.views):
                        other = taken[int(view == 0)]  # the other large view
                        augmented[view] = self.augmenter(taken[view], other, random, strength)
                    else:
                        augmented[view] = taken[view].unsqueeze(0)
            # The figure of the paper. `made` is A(taken); p is q(z) in post and parallel.
            made = augmented[view]
            if architecture == "basic":  # L( z_a , A(t_b) ), or L( A(z_a) , t_b )
                online, target = (z[a], made) if side == "target" else (made, t[b])
            elif architecture == "pre":  # L( q(A(z_a)) , t_b )
                if a not in predicted:
                    predicted[a] = self.online.predict(made)
                online, target = predicted[a], t[b]
            elif architecture == "post":  # L( A(q(z_a)) , t_b )
                online, target = made, t[b]
            else:  # parallel: L( q(z_a) , A(t_b) )
                online, target = p[a], made
            with torch.autocast(z.device.type, enabled=False), record_function("loss"):
                # N augmented features make N terms: their mean, or their sum (the free loss).
                online, target = torch.broadcast_tensors(online.float(), target)
                state, key = self.objective_state, (b, len(target))
                if key not in prepared:
                    prepared[key] = [self.objective.prepare(x, state) for x in target]
                losses = [
                    self.objective.loss(
                        Pair(o, x, t[b], b, t[a] if a < len(t) else None, one, random, sample_ids),
                        state,
                    )
                    for o, x, one in zip(online, prepared[key], made, strict=True)
                ]
                terms = torch.stack(losses)
                directions.append(terms.sum() if self.fa.feature_loss == "free" else terms.mean())
                if self.objective.keeps_targets and a < NUM_LARGE:  # of N, the mean direction
                    targets.append(functional.normalize(target, dim=2).mean(dim=0))

        # The mean over the pairs, times 2 scale. Of the features, the last pair's are kept: view 1
        # predicts view 2.
        return StepOutput(
            loss=2 * self.objective.scale / len(directions) * reduce(add, reversed(directions)),
            online=_pooled(online[0]),
            target=_pooled(target[0]),
            projection=_pooled(t[1]),
            original=_pooled(taken[view]),
            augmented=_pooled(made[0]),
            is_augmented=self.augmenter.is_ready(),
            entering=_pooled(taken[1 if self.fa.views == "second" else 0]),
            keys=_pooled(torch.stack(targets) if targets else t[:NUM_LARGE], num_leading=3),
        )

    @torch.no_grad()
    def queue_report(
        self, output: StepOutput, sample_ids: Int[Tensor, " n"], labels: Int[Tensor, " n"]
    ) -> dict[str, float]:
        """Age, self-hits and labels of the nearest entries, before the batch itself enters."""
        if self.queue is None or not self.augmenter.is_ready():
            return {}
        nearest = self.augmenter.nearest_entry(output.original)
        return self.queue.report(nearest, sample_ids, labels)

    def before_update(self, step: int) -> None:
        """Let the objective change gradients before the optimiser's update number ``step``."""
        self.objective.before_update(self.objective_state, step)

    def start_epoch(self, generator: torch.Generator) -> None:
        """Let the objective prepare an epoch, with a generator on the CPU; not for the first."""
        self.objective.start_epoch(self.objective_state, generator)

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
        if self.queue is None and self.memory is None:
            return
        with record_function("queue"):
            ids, classes = (None if x is None else dist.gather(x) for x in (sample_ids, labels))
            if self.queue is not None:
                self.queue.put(dist.gather(torch.cat([o.entering for o in outputs])), ids, classes)
            if self.memory is not None:
                keys = torch.cat([o.keys for o in outputs], dim=1)
                keys = torch.stack([dist.gather(view) for view in keys])
                self.objective.after_update(self.memory, keys, ids)


@dataclass(frozen=True)
class StepOutput:
    """The loss with its graph; the rest is detached and of the direction 1 -> 2, [n, d].

    Of maps it is the mean over their positions.

    Attributes:
        loss: Of this process's rows, all pairs of views.
        online: What predicts, as the loss sees it.
        target: What is predicted, as the loss sees it.
        projection: t_2, before anything is done to it.
        original: What A took.
        augmented: What A made of it (its first feature).
        is_augmented: Whether A was more than the identity.
        entering: What the support queue takes after the optimiser step.
        keys: Both large views' t, or targets with FA, for what the objective keeps: [2, n, d].
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

    def figures(self) -> dict[str, float]:
        """What the features look like.

        Returns:
            ``feature_std``, ``effective_rank``: of the projections, see the functions.
            ``fa_cosine``: mean cosine between what FA took and what it made.
            ``positive_cosine``, ``negative_cosine``: mean cosine between what predicts and what is
            predicted, for the two views of a sample and for views of two samples; ``.._std`` is
            the deviation over the pairs. A single row has no negatives: their keys are absent.
        """
        moved = functional.cosine_similarity(self.original.float(), self.augmented.float(), dim=1)
        figures = {
            "feature_std": feature_std(self.projection),
            "effective_rank": effective_rank(self.projection),
            "fa_cosine": float(moved.mean()),
        }
        for name, cosines in self._cosines().items():
            if len(cosines):
                figures[f"{name}_cosine"] = float(cosines.mean())
                figures[f"{name}_cosine_std"] = float(cosines.std(correction=0))
        return figures

    def histograms(self) -> dict[str, list[float]]:
        """Share of the positive and of the negative pairs in each of ``NUM_BINS`` equal bins."""
        shares = {}
        for name, cosines in self._cosines().items():
            counts = torch.histc(cosines.cpu(), bins=NUM_BINS, min=-1, max=1)
            shares[f"{name}s"] = [round(x, 6) for x in (counts / max(len(cosines), 1)).tolist()]
        return shares

    def _cosines(self) -> dict[str, Tensor]:
        """Of what predicts with what is predicted: n positives, n (n - 1) negatives."""
        online, target = (
            functional.normalize(x.float(), dim=1) for x in (self.online, self.target)
        )
        cosines: Float[Tensor, "n n"] = (online @ target.T).clamp(-1, 1)
        others = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
        return {"positive": cosines.diagonal(), "negative": cosines[others]}


def _pooled(features: Tensor, num_leading: int = 2) -> Tensor:
    """Detached, and the mean over the positions of a map, which come behind so many axes."""
    features = features.detach()
    return features if features.ndim == num_leading else features.mean(dim=(-2, -1))


def feature_std(z: Float[Tensor, "n d"]) -> float:
    """Mean std per dimension of the normalised features, times sqrt(d) (SimSiam, section 4.1).

    About 1 for features spread over the sphere, 0 when collapsed.
    """
    normalised = functional.normalize(z.float(), dim=1)
    return float(normalised.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5)


def effective_rank(z: Float[Tensor, "n d"]) -> float:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli, 2007).

    Of the centred, normalised features: between 1 and min(n, d); 0 if all rows are the same.
    """
    normalised = functional.normalize(z.double(), dim=1)
    singular = torch.linalg.svdvals(normalised - normalised.mean(dim=0))
    total = singular.sum()
    if total <= 1e-12 * z.shape[0]:
        return 0.0
    return float(torch.exp(torch.special.entr(singular / total).sum()))


def mlp(
    input_dim: int,
    hidden_dim: int,
    output_dim: int,
    *,
    num_layers: int,
    last_bn: bool = False,
    last_bn_affine: bool = True,
    hidden_bn: bool = True,
    dropout: float = 0.0,
    of_maps: bool = False,
) -> nn.Sequential:
    """Linear layers with BN and ReLU between them (BYOL, NNCLR: 2 and 3 layers).

    Args:
        input_dim: Width of the input.
        hidden_dim: Width of every hidden layer.
        output_dim: Width of the output.
        num_layers: Linear layers, at least 1.
        last_bn: A BN after the last layer as well (NNCLR's projector).
        last_bn_affine: Whether that BN has a scale and shift (SimSiam's projector: no).
        hidden_bn: BN in the hidden layers; without it they have a bias (MoCo v2's projector).
        dropout: Share of hidden units set to 0 in training, after each ReLU; no layer if 0.
        of_maps: Convolutions of maps instead: 3x3 in the hidden layers, so that a position sees
            its neighbours, and 1x1 in the last.
    """
    hidden, last, norm = nn.Linear, nn.Linear, nn.BatchNorm1d
    if of_maps:
        hidden = partial(nn.Conv2d, kernel_size=3, padding=1)
        last, norm = partial(nn.Conv2d, kernel_size=1), nn.BatchNorm2d
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers.append(hidden(input_dim, hidden_dim, bias=not hidden_bn))
        if hidden_bn:
            layers.append(norm(hidden_dim))
        layers.append(nn.ReLU(inplace=True))
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        input_dim = hidden_dim
    layers.append(last(input_dim, output_dim, bias=not last_bn))
    if last_bn:
        layers.append(norm(output_dim, affine=last_bn_affine))
    return nn.Sequential(*layers)
