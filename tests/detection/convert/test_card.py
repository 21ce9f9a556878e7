"""The cards beside converted weights: everything that is known, nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg

from common.backbone import D2_CARD, read_backbone
from common.files import sha256_of
from detection.convert.card import place, plain, render
from detection.convert.to_detectron2 import convert
from detection.training.config import arch_of_config
from detection.training.weights import check_card
from tests.detection.tiny_weights import TINY, our_checkpoint, save, torchvision_state

CONFIG = {
    "out": "/data/someone/runs/first",
    "seed": 3,
    "data": {
        "shards": {"/data/someone/sets/photos": 1.0, "https://u:secret@host.org/a/b?s=token": 0.5},
        "augmentation": "asymmetric_strong", "image_size": 160, "batch_size": 512,
    },
    "objective": {"name": "byol"},
    "fa": {"method": "nn+noise", "architecture": "parallel"},
    "optim": {"epochs": 200},
    "eval": {"probe_train": "/data/someone/probe/train"},
}  # fmt: skip


def run_folder(folder: Path, **changes: Any) -> Path:
    """A pretraining run as `pretrain/` leaves it."""
    facts = {
        "config": CONFIG,
        "step": 4000,
        "position": {"step": 4000, "epoch": 40},
        "schedule": {"num_steps": 20000, "data_fingerprint": "f1a9"},
        "versions": {"torch": "2.9.1", "python": "3.12.1"},
    }
    folder.mkdir(exist_ok=True)
    path = save(our_checkpoint(torchvision_state(), **facts | changes), folder / "checkpoint.pth")
    environment = {"commit": "c0ffee", "device": "cpu", "command": ["x"], "num_threads": 2}
    (folder / "environment.json").write_text(json.dumps(environment))
    summary = {"steps": 4000, "knn_top1": 0.625, "knn_top1_initial": 0.25, "num_samples": 12345,
               "seconds": 99.5, "images_per_second": None, "peak_memory_bytes": 10**9}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return path


def cards(path: Path, out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    convert(read_backbone(path), out, size=64, **options)
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def test_what_is_known_stands_in_both_cards(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run")
    card, text = cards(path, tmp_path / "b.pkl")
    known = card["pretraining"]
    assert card["weights_file"] == "b.pkl"
    assert card["weights_sha256"] == sha256_of(tmp_path / "b.pkl")
    assert card["source"]["sha256"] == sha256_of(path)
    assert (known["step"], known["num_steps"], known["epoch"]) == (4000, 20000, 40)
    assert known["commit"] == "c0ffee"
    assert known["data_fingerprint"] == "f1a9"
    assert known["figures"] == {
        "knn_top1": 0.625, "knn_top1_initial": 0.25, "num_samples": 12345, "seconds": 99.5,
        "peak_memory_bytes": 10**9,
    }  # fmt: skip
    assert known["config"]["fa"] == CONFIG["fa"]
    assert known["versions"] == {"torch": "2.9.1", "python": "3.12.1"}
    for part in ("objective byol", "nn+noise", "architecture parallel", "steps 4000, of 20000",
                 "epochs 40", "c0ffee", "knn_top1 0.625", "num_samples 12345", "sets/photos",
                 card["weights_sha256"], card["source"]["sha256"], "127.5, 102.0, 76.5",
                 "Pixels known from: checkpoint"):  # fmt: skip
        assert part in text, part
    assert "not known" not in text
    assert len(text.splitlines()) < 16


def test_places_and_secrets_do_not_travel(tmp_path: Path) -> None:
    card, text = cards(run_folder(tmp_path / "run"), tmp_path / "b.pkl")
    for written in (json.dumps(card), text):
        for secret in ("secret", "token", "/data/someone", "u:"):
            assert secret not in written
    shards = card["pretraining"]["config"]["data"]["shards"]
    assert shards == {"sets/photos": 1.0, "https://host.org/a/b": 0.5}
    assert card["pretraining"]["config"]["out"] == "runs/first"


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("shards", "shards"),
        ("runs/data/shards", "runs/data/shards"),
        ("/a/b/c/d", "c/d"),
        ("/", ""),
        ("https://host/x/shard-{000..009}.tar", "https://host/x/shard-{000..009}.tar"),
        ("s3://key:pass@bucket/x?versionId=3#f", "s3://bucket/x"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://h/x", "pipe:curl .."),
        ("pipe:", "pipe: .."),
    ],
)
def test_location_as_shown(location: str, shown: str) -> None:
    assert place(location) == shown


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    card, text = cards(save(torchvision_state(), tmp_path / "a.pth"), tmp_path / "b.pkl")
    assert not any(card["pretraining"].values())
    assert card["origins"]["preprocessing"] == "assumed"
    for line in ("Training: not known", "Figures: not known", "Pixels known from: assumed",
                 "Notes: pixel statistics are ImageNet's by assumption"):  # fmt: skip
        assert f"\n- {line}" in text, line
    assert "Training data" not in text


def test_figures_of_another_step_are_left_out(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "run", step=3000)
    card, text = cards(path, tmp_path / "b.pkl")
    assert card["pretraining"]["figures"] is None
    assert "Figures: not known" in text
    older = path.parent / "checkpoints" / "step-4000.pth"
    older.parent.mkdir()
    run_folder(path.parent).rename(older)
    card, _ = cards(older, tmp_path / "c.pkl")
    assert card["pretraining"]["figures"]["knn_top1"] == 0.625  # of the run's folder above


def test_a_card_is_handed_on(tmp_path: Path) -> None:
    first, _ = cards(run_folder(tmp_path / "run"), tmp_path / "b.pkl")
    second, text = cards(tmp_path / "b.pkl", tmp_path / "c.pth", to="torchvision")
    assert second["pretraining"] == first["pretraining"]
    assert second["made_from"] == first["source"]
    assert second["preprocessing"] == {
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "order": "RGB", "pixel_range": [0, 1],
    }  # fmt: skip
    assert "c0ffee" in text


def test_assumption_stays_one_through_conversions(tmp_path: Path) -> None:
    cards(save(torchvision_state(), tmp_path / "a.pth"), tmp_path / "b.pkl")
    card, text = cards(tmp_path / "b.pkl", tmp_path / "c.pth", to="torchvision")
    assert card["origins"]["preprocessing"] == "assumed"
    assert "Pixels known from: assumed" in text


@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_keys_for_detectron2_are_the_right_ones(ending: str, tmp_path: Path) -> None:
    _, text = cards(run_folder(tmp_path / "run"), tmp_path / f"b{ending}")
    cfg = get_cfg()
    cfg.merge_from_list(text.partition("- For Detectron2: ")[2].split())
    assert arch_of_config(cfg) == TINY
    assert cfg.MODEL.WEIGHTS.partition("?")[0] == f"b{ending}"
    assert ("matching_heuristics" in cfg.MODEL.WEIGHTS) == (ending == ".pth")
    check_card(tmp_path / f"b{ending}", cfg)  # pixels, format, stride


def test_strange_contents_stay_text(tmp_path: Path) -> None:
    config = {
        "note": "```\n\n# Bought by\n<script>alert(1)</script>", "loss": float("nan"),
        "objective": {"name": "by|ol`\n## Heading <b>"}, "weights": torch.ones(2),
    }  # fmt: skip
    path = run_folder(tmp_path / "run", config=config)
    card, text = cards(path, tmp_path / "b.pkl")
    assert card["pretraining"]["config"]["loss"] == "nan"
    assert card["pretraining"]["config"]["weights"] == "<Tensor>"
    assert "objective by|ol' ## Heading (b)" in text
    assert "script" not in text
    lines = text.splitlines()[1:]
    assert not [line for line in lines if "`" in line or "<" in line]
    assert [line for line in lines if line.startswith("#")] == ["# Model card: b.pkl"]


def test_malformed_card_of_a_source_breaks_nothing(tmp_path: Path) -> None:
    card, _ = cards(run_folder(tmp_path / "run"), tmp_path / "b.pkl")
    for known in ({"figures": [1], "config": "x"}, "text", None, {"step": {"a": 1}, "versions": 3},
                  {"config": 1, "figures": {"knn_top1": "high", "seconds": None}}):  # fmt: skip
        (tmp_path / "b.json").write_text(json.dumps(card | {"pretraining": known}))
        again, text = cards(tmp_path / "b.pkl", tmp_path / "c.pth", to="torchvision")
        assert again["pretraining"]["config"] is None
        assert "\n- Network: " in text


def test_card_alone_makes_the_text(tmp_path: Path) -> None:
    card, text = cards(run_folder(tmp_path / "run"), tmp_path / "b.pkl")
    assert render(card) == text
    assert card["format"] == D2_CARD


def test_plain_ends_somewhere() -> None:
    nested: dict[str, Any] = {}
    inner = nested
    for _ in range(100):
        inner["a"] = {}
        inner = inner["a"]
    assert "<dict>" in json.dumps(plain(nested))
    assert plain([float("inf"), (1, None), {2: b"x"}]) == ["inf", [1, None], {"2": "<bytes>"}]
