"""The comparison of golden values notices what it must notice."""

import json
from pathlib import Path

import pytest

from tests.golden import gate

COMMITTED = {"loss": [1.0, 2.0], "order": [3, 1, 2], "name": "a", "flag": True}


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "VALUES", tmp_path)
    for name in ("GOLDEN_RECORD", "GOLDEN_DUMP"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "some.json").write_text(json.dumps(COMMITTED))


@pytest.mark.usefixtures("committed")
def test_values_within_the_tolerance_pass() -> None:
    gate.check("some", COMMITTED | {"loss": [1.0 + 1e-10, 2.0]}, rtol=1e-9)


@pytest.mark.usefixtures("committed")
@pytest.mark.parametrize(
    "change",
    [
        {"loss": [1.0, 2.00001]},
        {"loss": [1.0]},
        {"loss": [1.0, float("nan")]},
        {"order": [3, 2, 1]},
        {"name": "b"},
        {"flag": 1},
        {"more": 1},
    ],
)
def test_a_difference_is_named(change: dict) -> None:
    with pytest.raises(AssertionError, match=next(iter(change))):
        gate.check("some", COMMITTED | change, rtol=1e-9)


@pytest.mark.usefixtures("committed")
def test_dump_holds_values_and_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDEN_DUMP", str(tmp_path / "dump"))
    gate.check("some", COMMITTED, bits={"view": gate.digest(b"pixels")})
    dumped = json.loads((tmp_path / "dump" / "some.json").read_text())
    assert dumped == {"values": COMMITTED, "bits": {"view": gate.digest(b"pixels")}}
