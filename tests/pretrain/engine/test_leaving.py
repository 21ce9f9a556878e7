"""How a process leaves its group: together with the others, or at once when it has failed alone."""

import contextlib
import os

import pytest

from common.errors import StoppedBySignal, UserError
from pretrain import __main__ as pretrain_program
from pretrain import collectives as dist
from tools import linear_eval


@pytest.fixture
def left(monkeypatch):
    """What a process of a group did at its end: "together" or its exit status."""
    found = []
    monkeypatch.setattr(dist, "is_on", lambda: not found)
    monkeypatch.setattr(dist, "wait", lambda: None)
    monkeypatch.setattr(dist, "stop", lambda: found.append("together"))
    monkeypatch.setattr(os, "_exit", found.append)
    return found


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, ["together"]), (StoppedBySignal(15, "saved"), ["together"]), (UserError("one"), [])],
)
def test_a_process_that_fails_alone_does_not_wait_for_the_group(left, error, expected):
    with contextlib.suppress(UserError, StoppedBySignal), dist.in_group():
        if error:
            raise error
    assert left == expected


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (pretrain_program.main, ["none.yaml"]),
        (linear_eval.main, ["none.pth", "--train", "a", "--val", "b", "--out", "c"]),
    ],
)
def test_programs_print_why_and_end_at_once(left, main, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(words)
    assert left == [2]
    assert "error: " in capsys.readouterr().err


def test_without_a_group_or_a_failure_the_program_ends_as_usual(left, monkeypatch):
    assert dist.end_process(0) == 0
    monkeypatch.setattr(dist, "is_on", lambda: False)
    assert dist.end_process(2) == 2
    assert left == []
