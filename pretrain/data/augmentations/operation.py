"""What a photometric operation is: settings, random parameters, and two implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from common.config import Registry
from common.errors import require
from common.lazy import Tensor, torch

Parameters = dict[str, np.ndarray]  # float32 [n] each, by name
Step = Callable[[np.ndarray], object]  # changes one picture in place, uint8 [h, w, 3], RGB


@dataclass(frozen=True)
class Operation:
    """A change of colours or sharpness that is made with some probability.

    A new operation is a new module with a subclass, and has the module's name
    (``common.config``). The random parameters of a sample are a function of the seed, the
    sample, its repeat index and the view, whatever other operations there are.

    Attributes:
        probability: How often the operation acts; 0: never, and nothing is drawn for it.
    """

    registry: ClassVar[Registry[Operation]]
    position: ClassVar[float]  # operations act in ascending order of it
    num_draws: ClassVar[int]  # uniform numbers per sample
    # The first four operations share a stream of random numbers, so that views stay what they
    # were; each says which is its first number. None: the operation has a stream of its own.
    first_draw: ClassVar[int | None] = None

    probability: float = 0.0

    def __post_init__(self) -> None:
        self.check("probability", self.probability, 0, 1)

    @property
    def name(self) -> str:
        """Name of the operation."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def stream(self) -> tuple[str, int]:
        """Purpose of its random numbers, and which is the first of them."""
        if self.first_draw is None:
            return f"augment:{self.name}", 0
        return "augment", self.first_draw

    def check(self, name: str, value: float, low: float, high: float) -> None:
        """Refuse a setting outside of low .. high.

        Raises:
            UserError: Naming the setting.
        """
        require(low <= value <= high, f"{self.name}.{name} must be in [{low}, {high}], got {value}")

    def draw(self, uniforms: np.ndarray) -> Parameters:
        """Parameters of a batch.

        Args:
            uniforms: float64 [num_draws, n] in [0, 1).
        """
        raise NotImplementedError

    def change_batch(self, x: Tensor, parameters: Parameters) -> None:
        """Change a batch in place.

        Args:
            x: float [n, 3, h, w] in 0..1, RGB, on any device.
            parameters: On the CPU: which samples change is decided there, so that the device is
                never waited for.
        """
        raise NotImplementedError

    def picture_steps(self, parameters: Parameters, image_size: int) -> list[list[Step]]:
        """For each of n pictures what changes it, in turn; nothing where nothing changes.

        Values are rounded and clamped to 0..255 after each step, as in a chain of Pillow
        operations. docs/augmentation.md says how far this is from `change_batch`.

        Args:
            parameters: Of n samples.
            image_size: Side of the pictures, pixels.
        """
        raise NotImplementedError


Operation.registry = Registry("pretrain.data.augmentations", Operation)


def change_where(
    x: Tensor,
    is_changed: np.ndarray,
    function: Callable[..., Tensor],
    values: np.ndarray | None = None,
) -> None:
    """Replace some samples of a batch by function(samples), or by function(samples, values).

    Args:
        x: float [n, ...], changed in place.
        is_changed: bool [n].
        function: Of the samples that change.
        values: float32 [n]; the function gets those of its samples.
    """
    numbers = torch.from_numpy(np.flatnonzero(is_changed))
    if len(numbers) == 0:
        return
    own = ()
    if values is not None:
        own = (torch.from_numpy(values[is_changed]).to(x.device, non_blocking=True),)
    if len(numbers) == len(x):
        x.copy_(function(x, *own))
        return
    numbers = numbers.to(x.device, non_blocking=True)
    x.index_copy_(0, numbers, function(x.index_select(0, numbers), *own))
