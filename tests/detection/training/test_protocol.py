"""Linear scaling of a schedule: arithmetic, Detectron2's own, what is given by hand, the table."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.engine import DefaultTrainer

from common.errors import UserError
from detection.training.config import load_config, parse_overrides, scale_schedule, schedule_table
from tests.detection.tiny_detection import CONFIGS

PROTOCOL = CONFIGS / "voc0712_R50_C4_24k.yaml"
THIN = CONFIGS / "thin_R50_C4.yaml"
Schedule = tuple[int, float, int, tuple[int, ...], int]


def schedule(*overrides: str, num_gpus: int | None, path: Path = PROTOCOL) -> Schedule:
    solver = load_config(path, parse_overrides(overrides), num_gpus=num_gpus).SOLVER
    return (
        solver.IMS_PER_BATCH,
        solver.BASE_LR,
        solver.MAX_ITER,
        tuple(solver.STEPS),
        solver.WARMUP_ITERS,
    )


PUBLISHED = (16, 0.02, 24_000, (18_000, 22_000), 100)


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "expected"),
    [
        (None, "", PUBLISHED),
        (8, "", PUBLISHED),
        (4, "", (8, 0.01, 48_000, (36_000, 44_000), 200)),
        (1, "", (2, 0.0025, 192_000, (144_000, 176_000), 800)),
        (16, "", (32, 0.04, 12_000, (9_000, 11_000), 50)),
        (3, "", (6, 0.0075, 64_000, (48_000, 58_667), 267)),
        (1, "SOLVER.IMS_PER_BATCH 16", PUBLISHED),  # one GPU that holds the whole batch
        (2, "SOLVER.IMS_PER_BATCH 8", (8, 0.01, 48_000, (36_000, 44_000), 200)),
        (8, "SOLVER.IMS_PER_BATCH 64", (64, 0.08, 6_000, (4_500, 5_500), 25)),
        # What is given by hand stays; steps and warm-up follow a number of iterations.
        (1, "SOLVER.BASE_LR 0.1", (2, 0.1, 192_000, (144_000, 176_000), 800)),
        (1, "SOLVER.WARMUP_ITERS 1000", (2, 0.0025, 192_000, (144_000, 176_000), 1000)),
        (4, "SOLVER.MAX_ITER 24000", (8, 0.01, 24_000, (18_000, 22_000), 100)),
        (1, "SOLVER.REFERENCE_WORLD_SIZE 0", PUBLISHED),
        (1, "SOLVER.REFERENCE_WORLD_SIZE 4", (4, 0.005, 96_000, (72_000, 88_000), 400)),
    ],
)
def test_schedule_follows_gpus_and_batch(
    num_gpus: int | None, overrides: str, expected: Schedule
) -> None:
    found = schedule(*overrides.split(), num_gpus=num_gpus)
    assert found == (expected[0], pytest.approx(expected[1]), *expected[2:])


@pytest.mark.parity
@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4, 8, 16])
def test_the_same_as_detectron2_for_any_number_of_gpus(num_gpus: int) -> None:
    """Its own mechanism leaves precise batch norm alone; all else must agree, and end there."""
    cfg = load_config(PROTOCOL)
    cfg.TEST.EVAL_PERIOD = 3000
    theirs = DefaultTrainer.auto_scale_workers(cfg, num_gpus)
    ours = cfg.clone()
    scale_schedule(ours, num_gpus)
    for key in ("BASE_LR", "MAX_ITER", "WARMUP_ITERS", "IMS_PER_BATCH", "REFERENCE_WORLD_SIZE"):
        assert ours.SOLVER[key] == pytest.approx(theirs.SOLVER[key]), key
    assert tuple(ours.SOLVER.STEPS) == tuple(theirs.SOLVER.STEPS)
    assert ours.SOLVER.CHECKPOINT_PERIOD == theirs.SOLVER.CHECKPOINT_PERIOD
    assert ours.TEST.EVAL_PERIOD == theirs.TEST.EVAL_PERIOD
    assert DefaultTrainer.auto_scale_workers(ours, num_gpus) == ours, "not scaled twice"
    assert pytest.approx(3200, abs=16) == ours.TEST.PRECISE_BN.NUM_ITER * ours.SOLVER.IMS_PER_BATCH


def test_config_that_is_no_protocol_is_left_alone() -> None:
    plain = load_config(THIN)
    assert plain.SOLVER.REFERENCE_WORLD_SIZE == 0
    for num_gpus in (1, 8):
        assert load_config(THIN, num_gpus=num_gpus) == plain
    assert schedule("SOLVER.IMS_PER_BATCH", "8", num_gpus=1, path=THIN)[1:3] == (
        plain.SOLVER.BASE_LR,
        plain.SOLVER.MAX_ITER,
    )


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"IMS_PER_BATCH 16 does not divide by .*WORLD_SIZE 3"):
        load_config(PROTOCOL, {"SOLVER.REFERENCE_WORLD_SIZE": "3"}, num_gpus=1)
    with pytest.raises(UserError, match="IMS_PER_BATCH 0: give at least 1"):
        load_config(PROTOCOL, {"SOLVER.IMS_PER_BATCH": "0"}, num_gpus=1)


def test_table() -> None:
    protocol = load_config(PROTOCOL)
    table = schedule_table(protocol, load_config(PROTOCOL, num_gpus=1), 1)
    rows = {line[:34].strip(): line[34:].split("  ") for line in table.splitlines()}
    cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in rows.items()}
    assert cells[""] == ["protocol, 8 GPUs", "here, 1 GPU"]
    assert cells["pictures per batch"] == ["16", "2"]
    assert cells["pictures per batch-norm statistic"] == ["16", "2"]
    assert cells["learning rate"] == ["0.02", "0.0025"]
    assert cells["learning rate drops at"] == ["18000, 22000", "144000, 176000"]
    assert cells["pictures in all"] == ["384000", "384000"]
    assert cells["pictures for precise batch norm"] == ["3200", "3200"]


def test_command_prints_the_table_and_trains_the_scaled_schedule(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made for four GPUs and 4 pictures; the tiny overrides say 2 pictures and 3 iterations."""
    assert train("random", "--num-gpus", "1", "SOLVER.REFERENCE_WORLD_SIZE", "4") == 0
    out = capsys.readouterr().out
    assert "protocol, 4 GPUs  here, 1 GPU" in out
    assert "0.06              0.03" in out, "half the batch, half the learning rate"
    settings = json.loads((tmp_path / "out/seed-0/run.json").read_text())["settings"]
    assert settings["SOLVER.REFERENCE_WORLD_SIZE"] == settings["num_gpus"] == 1
    assert settings["SOLVER.IMS_PER_BATCH"] == 2
    assert settings["SOLVER.BASE_LR"] == pytest.approx(0.03)
    assert settings["SOLVER.MAX_ITER"] == 3
    assert train("random", "--num-gpus", "auto", out="plain") == 0
    assert "protocol" not in capsys.readouterr().out, "a config that names no number of GPUs"


def test_a_protocol_with_a_pyramid_trains_at_a_tiny_size(
    train: Callable[..., int], tmp_path: Path
) -> None:
    options = "DATALOADER.NUM_WORKERS 0 MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 16"
    config = "voc0712_R18_FPN_24k.yaml"
    assert train("random", *options.split(), config=config) == 0
    result = json.loads((tmp_path / "out/seed-0/result.json").read_text())
    assert result["iterations"] == 3
    assert 0 <= result["AP"] <= 100
