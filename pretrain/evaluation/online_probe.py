"""A linear classifier that learns beside the run from the backbone's features, without gradient.

Its accuracy says how well the features separate the classes by now; no gradient reaches the
backbone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from common.errors import UserError
from pretrain import collectives as dist
from pretrain.config import EvalConfig
from pretrain.data.input_pipeline import DeviceBatch
from pretrain.data.shards import Samples
from pretrain.engine.trainer import Callback, StepResult


class OnlineProbe(Callback):
    """The classifier, its optimiser (Adam), and what it got right since the last look.

    It starts from zero weights, so that it draws no random number. All processes hold the same:
    gradients and counts are summed over them.

    Args:
        backbone: Whose outputs of the training's forward passes are learnt from.
        num_classes: Of the labels.
        lr: Constant learning rate.
        device: Of the backbone.
        classes: Names of the classes, where the shards name them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        lr: float,
        device: torch.device,
        classes: list[str] | None = None,
    ) -> None:
        self.classes, self._lr = classes, lr
        dim = cast(int, backbone.output_dim)
        linear = nn.Linear(dim, num_classes, device="meta")  # draws nothing there
        self.classifier = linear.to_empty(device=device)
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), lr)
        self._counts = torch.zeros(3, dtype=torch.float64, device=device)  # seen, right, loss
        self._outputs: list[Tensor] = []
        backbone.register_forward_hook(self._note)

    @classmethod
    def open(
        cls, config: EvalConfig, samples: Samples | None, backbone: nn.Module, device: torch.device
    ) -> OnlineProbe | None:
        """The probe of the config, or None where it is off.

        Args:
            config: The eval section.
            samples: What the run trains on; None for a stream.
            backbone: The online network's.
            device: Of the backbone.

        Raises:
            UserError: If no sample has a label, or the number of classes cannot be known.
        """
        if not config.online_probe:
            return None
        if samples is None:
            raise UserError(
                "eval.online_probe=true: a stream does not tell its classes; use "
                "data.streaming=false, or eval.online_probe=false"
            )
        most = int(samples.labels.max(initial=-1))
        if most < 0:
            raise UserError(
                "eval.online_probe=true, but no sample of data.shards has a label (several sets "
                "keep theirs only if all have the same classes); make the shards of class folders "
                "with tools/make_shards.py, or set eval.online_probe=false"
            )
        num_classes = len(samples.classes) if samples.classes else most + 1
        return cls(backbone, num_classes, config.online_probe_lr, device, samples.classes)

    def _note(self, backbone: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():  # cached micro-batches pass twice
            self._outputs.append(output.detach())

    def on_step_end(self, batch: DeviceBatch, result: StepResult) -> None:
        """Learn from the step."""
        self.step(batch.samples.labels)
        self._outputs = []

    def step(self, labels: Int[Tensor, " n"]) -> None:
        """One step on the features of both views that were seen; rows labelled -1 are left out.

        So are rows that are not finite.
        A batch without any label has no gradient; Adam's momentum still moves the weights.
        """
        # The step's own forward passes are the last ones; those of an attack come before them.
        outputs: list[Tensor] = []
        while sum(map(len, outputs)) < 2 * len(labels):
            outputs.insert(0, self._outputs.pop())
        # Rows in the order of the batch; the views take turns in the outputs.
        views = [torch.cat(outputs[view::2]).float() for view in (0, 1)]
        assert all(len(view) == len(labels) for view in views), [len(view) for view in views]
        features = torch.cat(views)
        is_finite = features.isfinite().all(dim=1)  # the guards look at some steps only
        features = features.nan_to_num_(0, 0, 0)
        labels = labels.repeat(2).where(is_finite, -1)
        logits = self.classifier(features)
        loss = functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        parameters = list(self.classifier.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        seen, right = (labels >= 0).sum(), (logits.argmax(dim=1) == labels).sum()
        counts = torch.stack([seen.float(), right.float(), loss.detach()])
        summed = dist.total(torch.cat([*(g.flatten() for g in gradients), counts]))
        parts = summed.split([*(p.numel() for p in parameters), 3])
        for parameter, part in zip(parameters, parts[:-1], strict=True):
            parameter.grad = (part / summed[-3].clamp(min=1)).view_as(parameter)
        self.optimizer.step()
        self._counts += parts[-1]

    def figures(self) -> dict[str, float]:
        """``online_top1`` and ``online_loss`` since the last call; nothing if no label was seen."""
        seen, right, loss = self._counts.tolist()
        self._counts.zero_()
        return {"online_top1": right / seen, "online_loss": loss / seen} if seen else {}

    def state_dict(self) -> dict[str, Any]:
        """Its entry of the checkpoint."""
        return {
            "online_probe": {
                "classifier": self.classifier.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "counts": self._counts,
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a checkpoint; says so where the classifier has to start anew."""
        own = state.get("online_probe")
        if own is None or own["classifier"]["weight"].shape != self.classifier.weight.shape:
            why = "none" if own is None else "one of another size"
            return f"eval.online_probe: the checkpoint holds {why}: the classifier starts anew"
        self.classifier.load_state_dict(own["classifier"])
        self.optimizer.load_state_dict(own["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self._counts.copy_(own["counts"])
        return None
