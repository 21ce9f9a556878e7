"""Memory of batches that is used again: first touching new memory would cost several times more."""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_MAX_KEPT = 4  # blocks that lie idle; a batch ahead and one in use need two


class ReusedMemory:
    """Hands out tensors; the memory of those that are gone, views of them included, comes again."""

    def __init__(self) -> None:
        self._idle: list[np.ndarray] = []
        self._lock = threading.RLock()  # a tensor may vanish in any thread, at any moment

    def tensor(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
        """A tensor on the CPU with any content.

        Args:
            shape: Its shape.
            dtype: NumPy's type of its elements.
        """
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._take(num_bytes)
        # The tensor's storage keeps this very array, and nothing else does.
        held = block.view(dtype).reshape(shape)
        weakref.finalize(held, self._give_back, block).atexit = False
        return torch.from_numpy(held)

    def _take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            for position, block in enumerate(self._idle):
                if block.nbytes == num_bytes:
                    return self._idle.pop(position)
        return np.empty(num_bytes, np.uint8)  # NumPy asks for huge pages

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._idle.append(block)
            if len(self._idle) > _MAX_KEPT:
                self._idle.pop(0)
