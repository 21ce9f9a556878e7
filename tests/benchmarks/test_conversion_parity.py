"""The benchmark of the conversion at its smallest; it sees a network that computes otherwise."""

import json
from pathlib import Path

import pytest

from benchmarks import conversion_parity
from detection.parity import build_bare_resnet


def test_thin_network_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    words = ["--networks", "thin_resnet50", "--size", "64", "--json", str(out)]
    assert conversion_parity.main(words) == 0
    figures = json.loads(out.read_text())
    (row,) = figures["networks"]
    assert row["bit_equal"]
    assert (row["num_tensors"], row["num_counters"]) == (265, 53)
    assert row["max_relative_difference"] == max(row["stages"].values()) <= 1e-5
    assert figures["good"]


def test_stride_in_the_wrong_place_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        conversion_parity,
        "build_bare_resnet",
        lambda arch: build_bare_resnet(arch, stride_in_1x1=True),
    )
    assert conversion_parity.main(["--networks", "thin_resnet50", "--size", "64"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["stages"]["res2"] <= 1e-5 < row["stages"]["res3"]
    assert row["bit_equal"]


def test_size_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert conversion_parity.main(["--size", "10"]) == 2
    assert "--size 10" in capsys.readouterr().err
