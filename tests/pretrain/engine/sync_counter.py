"""Counts on the CPU what would make the host wait for a GPU."""

from __future__ import annotations

import contextlib
import traceback
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# .item(), float(), int(), bool(); the sizes of what these give depend on values
READING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
INDEXING = ("aten::index", "aten::index_put_", "aten::index_put")


class SyncCounter(TorchDispatchMode):
    """``places``: a line of code for each time that values were read to the host.

    Torch's optimisers are left out: what they read is the number of steps, which lies on the CPU.
    What only a GPU can tell (copies of pageable memory) is not seen.
    """

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        has_mask = name in INDEXING and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in READING or has_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name):
        stack = [f for f in traceback.extract_stack() if f.filename != __file__]
        if any("/torch/optim/" in f.filename for f in stack):
            return
        last = next((f for f in reversed(stack) if "/pretrain/" in f.filename), stack[-1])
        self.places.append(f"{name} in {last.filename}:{last.lineno}: {last.line}")


@contextlib.contextmanager
def counted_syncs():
    """The `SyncCounter` of what runs within; .tolist() and .cpu() are counted as well."""
    with SyncCounter() as counter, contextlib.ExitStack() as stack:
        for name in ("tolist", "cpu", "numpy"):
            original = getattr(torch.Tensor, name)

            def noted(self, *args, name=name, original=original, **kwargs):
                counter.note(f"Tensor.{name}")
                return original(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(torch.Tensor, name, noted))
        yield counter
