"""What an objective is: its settings, the facts about it, its loss and what it keeps.

Each objective is a module of this package with one subclass of ``Objective``, whose fields are the
config's section ``objective``. Nothing about it stands elsewhere. These modules import no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Int

from common.config import Registry
from common.errors import require, within_0_and_1
from common.lazy import Tensor, nn, torch
from pretrain.features.augmentations.base import RowRandom


@dataclass(frozen=True)
class Pair:
    """One view's features against another view's; nothing of it is detached by a loss.

    Of an objective with ``min_positions`` they are maps: [n, d, y, x].

    Attributes:
        online: What predicts: z, q(z), q(A(z)) or A(q(z)).
        target: What is predicted: t or A(t), as `Objective.prepare` leaves it.
        plain_target: t without augmentation.
        target_view: Which large view t is of, 0 or 1.
        own_target: t of the predicting view, without augmentation; None: of a small crop.
        augmented: What A made for this term.
        random: Draws for these rows.
        sample_ids: Which sample each row is, if that is known.
    """

    online: Float[Tensor, "n d *yx"]
    target: Float[Tensor, "n _ *yx"]
    plain_target: Float[Tensor, "n d *yx"]
    target_view: int
    own_target: Float[Tensor, "n d *yx"] | None = None
    augmented: Float[Tensor, "n d *yx"] | None = None
    random: RowRandom | None = None
    sample_ids: Int[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Objective:
    """A loss between the two branches.

    Attributes:
        architecture: Where it is published: with a predictor (parallel) or without (basic), or
            with one behind A (pre).
        has_ema: The target branch is an EMA copy of backbone and projector.
        stops_target: No gradient through the target branch, unless ``stop_gradient`` says so.
        target_has_gradient: Whether the target has a gradient that could pass.
        is_per_sample: The loss of a batch is the mean over its samples, each by itself.
        needs_sample_ids: What is kept belongs to samples, so that a stream will not do.
        keeps_targets: ``after_update`` gets the targets as FA made them; otherwise plain t.
        scale: Factor on the sum of the losses of both directions; 0.5 is their mean. Of several
            views: half the factor on the mean over all pairs.
        two_views_only: Why small crops (multi-crop) are refused; empty: they may predict.
        min_positions: Of the backbone's last map, whose positions are predicted; 0: features are
            pooled.
        state_name: Under which the online network holds what ``make_state`` gives it to train.
    """

    registry: ClassVar[Registry[Objective]]
    architecture: ClassVar[Literal["basic", "parallel", "pre"]]
    has_ema: ClassVar[bool] = False
    stops_target: ClassVar[bool] = False
    target_has_gradient: ClassVar[bool] = True
    is_per_sample: ClassVar[bool] = False
    needs_sample_ids: ClassVar[bool] = False
    keeps_targets: ClassVar[bool] = False
    scale: ClassVar[float] = 0.5
    two_views_only: ClassVar[str] = "its loss is defined for two views"
    min_positions: ClassVar[int] = 0
    state_name: ClassVar[str] = "objective"

    name: str = ""
    stop_gradient: bool | None = None  # on the target; null: as the objective has it

    def __post_init__(self) -> None:
        require(
            self.stop_gradient is not False or self.target_has_gradient,
            f"objective.stop_gradient=false: the target of {self.name} has no gradient to let "
            "through (an EMA network's projection, or assigned codes); leave it out",
        )

    def check_fa(self, method: str, architecture: str, views: str, stop_gradient: bool) -> None:
        """Refuse values of the config's section ``fa`` that do not go with this objective.

        Raises:
            UserError: Naming the key, its value and the remedy.
        """

    def pairs(self, num_views: int) -> list[tuple[int, int]]:
        """Which view predicts which large one, in the order of the computation.

        Every view predicts each large view, 0 and 1, that it is not itself (SwAV, arXiv
        2006.09882: the codes of the large views alone are predicted). The last pair is (0, 1),
        whose features are logged.

        Args:
            num_views: At least 2; those from 2 on are small crops.
        """
        return [(a, b) for b in (0, 1) for a in (*range(2, num_views), 1 - b)]

    def prepare(self, target: Float[Tensor, "n d"], state: nn.Module | None) -> Tensor:
        """What is made of a target once for all views that predict it, as SwAV's codes."""
        return target

    def loss(self, pair: Pair, state: nn.Module | None) -> Float[Tensor, ""]:
        """The loss of this process's rows, for one pair of views.

        Args:
            pair: The features.
            state: What ``make_state`` made.
        """
        raise NotImplementedError

    def make_state(self, dim: int, num_samples: int | None = None) -> nn.Module | None:
        """What is kept from step to step, for features of width ``dim`` of so many samples.

        A module with parameters becomes a part of the online network, and is trained. One with
        buffers alone is kept and saved beside it.
        """
        return None

    def before_update(self, state: nn.Module | None, step: int) -> None:
        """Before the optimiser's update number ``step``, from 0: gradients may be changed."""

    def after_update(
        self,
        state: nn.Module | None,
        keys: Float[Tensor, "2 m d"],
        sample_ids: Int[Tensor, " m"] | None = None,
    ) -> None:
        """After it: ``keys`` are both views' t of the global batch; only if state is kept."""

    def start_epoch(self, state: nn.Module | None, generator: torch.Generator) -> None:
        """Before each epoch but the first. ``generator`` is the CPU's, alike in all processes."""

    def tau(self, step: int, num_steps: int) -> float:
        """Share of the EMA weights that stays after update number ``step`` of ``num_steps``."""
        return 1.0


Objective.registry = Registry("pretrain.objectives", Objective)


@dataclass(frozen=True)
class EmaObjective(Objective):
    """An objective whose target branch is an EMA copy."""

    has_ema: ClassVar[bool] = True
    stops_target: ClassVar[bool] = True
    target_has_gradient: ClassVar[bool] = False

    ema_tau: float = 0.99  # tau_0 of the schedule that ends at ema_tau_end
    ema_tau_end: float = 1.0  # MoCo v2+ of solo-learn ends at 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        within_0_and_1(self, "objective", "ema_tau", "ema_tau_end")

    def tau(self, step: int, num_steps: int) -> float:
        """tau_1 - (tau_1 - tau_0) (cos(pi t / T) + 1) / 2; tau_1 = 1 in BYOL (arXiv 2006.07733)."""
        end = self.ema_tau_end
        return end - (end - self.ema_tau) * (math.cos(math.pi * step / num_steps) + 1) / 2
