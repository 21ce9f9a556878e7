"""What holds for every test."""

import sys

import pytest


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope
def pytest_runtest_setup() -> None:
    """One thread, whatever the test before has set: two wait for each other in small products."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
