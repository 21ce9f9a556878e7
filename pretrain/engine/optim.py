"""Optimisers, parameter groups and schedules."""

# pyright: reportPrivateImportUsage=false
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.config import OptimConfig

_Tensors = list[Tensor] | tuple[Tensor, ...]


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise trust ratios (You et al., arXiv 1708.03888; as SimCLR and BYOL use it).

    g <- g + wd w;  g <- eta |w| / |g| g  (groups with ``adapt``);  m <- mu m + g;  w <- w - lr m.
    A layer whose weight or gradient norm is 0 is not scaled. With ``clip`` the scale is at most lr
    over the rate, min(eta |w| / |g| / lr, 1): LARC's clipping, as solo-learn's recipes use it.
    With ``norm`` "separate" the scale is eta |w| / (|g| + wd |w| + 1e-8), of the gradient before
    the decay, as in the paper (eq. 6), Apex, VISSL and solo-learn; a layer without gradient then
    has no decay either.

    Args:
        params: Groups; ``adapt`` (bool) in each says whether trust ratios apply.
        lr: Learning rate.
        momentum: mu.
        eta: Trust coefficient.
        weight_decay: wd, of groups without their own.
        clip: Whether the trust ratio is clipped.
        norm: What the weight's norm is divided by: |g + wd w| ("joint"), or both norms' sum.
    """

    def __init__(
        self,
        params: Iterable[dict],
        *,
        lr: float,
        momentum: float,
        eta: float,
        weight_decay: float = 0.0,
        clip: bool = False,
        norm: Literal["joint", "separate"] = "joint",
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        defaults |= {"adapt": True, "clip": clip, "norm": norm}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if weights and weights[0].device.type == "cpu":
                # One layer after the other: its weights are then in the cache for the whole update.
                for w in weights:
                    self._update([w], group)
            elif weights:
                # All together, since each launch costs time on a GPU.
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict) -> None:
        g: _Tensors = [w.grad for w in weights if w.grad is not None]
        plain, decay, is_joint = g, group["weight_decay"], group["norm"] == "joint"
        if decay:
            g = torch._foreach_add(g, weights, alpha=decay)
        if group["adapt"]:
            # The trust ratios: one number for each layer, on the device.
            measured = g if is_joint else plain
            w_norm, g_norm = (torch.stack(torch._foreach_norm(x)) for x in (weights, measured))
            divisor = g_norm if is_joint else g_norm + decay * w_norm + 1e-8
            scaled = group["eta"] * w_norm / divisor
            if group["clip"]:
                scaled = torch.clamp(scaled / group["lr"], max=1)
            others = 1.0 if is_joint else (w_norm == 0).to(w_norm)  # 0: no gradient, no decay
            ratios = torch.where((w_norm > 0) & (g_norm > 0), scaled, others).unbind()
            g = torch._foreach_mul(g, ratios)
        for w in weights:
            if "momentum_buffer" not in self.state[w]:
                self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        momentum_buffers = [self.state[w]["momentum_buffer"] for w in weights]
        torch._foreach_mul_(momentum_buffers, group["momentum"])
        torch._foreach_add_(momentum_buffers, g)
        torch._foreach_add_(weights, momentum_buffers, alpha=-group["lr"])


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Weights, and biases and normalisation parameters; of the backbone, the heads, the predictor.

    ``follows_schedule`` in each group says whether its rate does. Groups without parameters are
    left out.
    """
    parts = {name: list(part.parameters()) for name, part in model.named_children()}
    decay = config.weight_decay
    head_decay = decay if config.head_weight_decay is None else config.head_weight_decay
    groups = []
    for is_weight in (True, False):
        for names, part_decay, follows in (
            (("backbone",), decay, True),
            (set(parts) - {"backbone", "predictor"}, head_decay, True),
            (("predictor",), head_decay, not config.predictor_constant_lr),
        ):
            own = [p for name in parts if name in names for p in parts[name]]
            is_treated = is_weight or not config.exclude_bias_and_norm
            group = {
                "params": [p for p in own if (p.ndim > 1) == is_weight and p.requires_grad],
                "weight_decay": part_decay if is_treated else 0.0,
                "adapt": is_treated,
                "follows_schedule": follows,
            }
            groups += [group] if group["params"] else []
    return groups


def make_optimizer(
    model: nn.Module, config: OptimConfig, lr: float, *, is_fused: bool = False
) -> torch.optim.Optimizer:
    """The optimiser that ``config.name`` asks for.

    ``is_fused``: sgd and adamw in one kernel for all weights, with other rounding; LARS has none.
    """
    groups = parameter_groups(model, config)
    if config.name == "lars":
        return LARS(
            groups, lr=lr, momentum=config.momentum, eta=config.lars_eta, clip=config.lars_clip,
            norm=config.lars_norm,
        )  # fmt: skip
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=is_fused or None)
    return torch.optim.AdamW(groups, lr=lr, fused=is_fused or None)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from the momenta of ``state_dict()``; all settings stay as this optimiser has them."""
    groups = [
        {"params": saved["params"]} | {key: own[key] for key in own if key != "params"}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(state | {"param_groups": groups})


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the momenta that an optimiser of `make_optimizer` keeps from its first step on."""
    per_weight = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    return per_weight * sum(w.nbytes for group in optimizer.param_groups for w in group["params"])


def set_lr(optimizer: torch.optim.Optimizer, peak: float, factor: float) -> float:
    """Give every group its rate; the scheduled one is returned."""
    for group in optimizer.param_groups:
        group["lr"] = peak * factor if group["follows_schedule"] else peak
    return peak * factor


def peak_lr(config: OptimConfig, batch_size: int) -> float:
    """Linear scaling: base_lr x global batch / 256."""
    return config.base_lr * batch_size / 256


def lr_factor(config: OptimConfig, step: int, num_steps: int) -> float:
    """Share of the peak rate in step 0..num_steps-1: linear warm-up, then cosine to 0.

    Taken at the middle of the step, so that none has rate 0.
    """
    done, warmup = (step + 0.5) / num_steps, config.warmup_epochs / config.epochs
    if done < warmup:
        return done / warmup
    return (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2
