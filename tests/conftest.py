"""What holds for every test."""

import gc
import sys
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All modules are imported here and stay: no collection of garbage looks at them again."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_unconfigure() -> None:
    """What was frozen is let go, or Triton's bindings take it for a leak and print it."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope
def pytest_runtest_setup() -> None:
    """One thread, whatever the test before has set: two wait for each other in small products."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
