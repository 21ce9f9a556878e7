"""What a backbone is: settings that build a network.

Each one is a module of this package with one subclass of ``Backbone``, whose fields are the
config's section ``arch``. These modules import no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.config import Registry
from common.lazy import nn


@dataclass(frozen=True)
class Backbone:
    """Settings of a network from pictures to features, or to maps of them."""

    registry: ClassVar[Registry[Backbone]]
    stride: ClassVar[int] = 32  # pixels between two positions of the last map

    name: str = ""

    def build(self, residual_gamma: float = 1.0) -> nn.Module:
        """A fresh network: [n, 3, h, w] -> [n, d], with d as its attribute ``output_dim``.

        Called with ``as_map=True`` it gives the last map, before it is pooled: [n, d, y, x].

        Args:
            residual_gamma: Initial weight of the last BN of each residual block, where there are
                any.
        """
        raise NotImplementedError


Backbone.registry = Registry("pretrain.model.backbones", Backbone)
