import json
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from torch import nn

from common.config import dotted
from common.errors import UserError
from detection.training.config import (
    add_keys,
    check_device,
    load_config,
    parse_overrides,
    scale_schedule,
)
from detection.training.heads import Res5ROIHeadsExtraNorm
from tests.detection.tiny_detection import CONFIGS

THIN = CONFIGS / "thin_R50_C4.yaml"
ALL = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def plain_keys(cfg: CfgNode) -> dict[str, object]:
    """Dotted keys; tuples as lists."""
    return json.loads(json.dumps(dotted(cfg)))


def test_the_published_protocol_value_by_value() -> None:
    cfg = load_config(CONFIGS / "voc0712_R50_C4_24k.yaml")
    expected = {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "naiveSyncBN",
        "MODEL.RESNETS.OUT_FEATURES": ["res4"],
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
        "MODEL.ROI_HEADS.NUM_CLASSES": 20,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
        "INPUT.FORMAT": "RGB",
        "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        "INPUT.MIN_SIZE_TEST": 800,
        "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
        "DATASETS.TEST": ["voc_2007_test"],
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.MAX_ITER": 24000,
        "SOLVER.STEPS": [18000, 22000],
        "SOLVER.WARMUP_ITERS": 100,
        "TEST.PRECISE_BN.ENABLED": True,
    }
    flat = plain_keys(cfg)
    assert {key: flat[key] for key in expected} == expected
    # And nothing else: Detectron2's defaults with these changes are the whole file, but for keys
    # that change no result on eight GPUs.
    stock = get_cfg()
    add_keys(stock)
    stock.MODEL.DEVICE = cfg.MODEL.DEVICE
    for key, value in expected.items():
        stock.merge_from_list([key, value])
    plain = plain_keys(stock)
    assert {key for key in flat if flat[key] != plain[key]} == {
        "MODEL.BACKBONE.CALIBRATE_BN_BATCHES",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.REFERENCE_WORLD_SIZE",
    }


def test_schedule_is_scaled_with_max_iter() -> None:
    solver = load_config(THIN).SOLVER
    twice = str(2 * solver.MAX_ITER)
    steps = tuple(2 * step for step in solver.STEPS)
    cfg = load_config(THIN, {"SOLVER.MAX_ITER": twice})
    assert steps == cfg.SOLVER.STEPS
    assert cfg.SOLVER.WARMUP_ITERS == 2 * solver.WARMUP_ITERS
    cfg = load_config(THIN, {"SOLVER.MAX_ITER": twice, "SOLVER.WARMUP_ITERS": "7"})
    assert steps == cfg.SOLVER.STEPS
    assert cfg.SOLVER.WARMUP_ITERS == 7
    for last in (1, 2, 3, 5):  # runs of a few iterations, for tests
        assert all(
            0 < s < last for s in load_config(THIN, {"SOLVER.MAX_ITER": str(last)}).SOLVER.STEPS
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("SOLVER.MAX_ITER 100 SOLVER.STEPS (75,225)", r"STEPS \(75, 225\) reaches beyond .*100"),
        ("SOLVER.MAX_ITER 0", r"MAX_ITER 0: give at least 1"),
        ("SOLVER.CHECKPOINT_PERIOD 0", r"CHECKPOINT_PERIOD 0: give at least 1"),
        ("SOLVER.WARMUP_ITERS 9999", r"WARMUP_ITERS 9999 leaves nothing"),
        ("SOLVER.BSAE_LR 0.1", r"unknown key SOLVER.BSAE_LR; did you mean SOLVER.BASE_LR\?"),
        ("SOLVER.BASE_LR fast", r"SOLVER.BASE_LR"),
        ("SOLVER.BASE_LR", r"SOLVER.BASE_LR: this key has no value"),
        ("MODEL.WEIGHTS x.pkl", r"MODEL.WEIGHTS: give the weights as the first argument"),
        ("SEED 3", r"SEED: use --seeds"),
        ("INPUT.MIN_SIZE_TRAIN ()", r"INPUT.MIN_SIZE_TRAIN is empty"),
        ("INPUT.MIN_SIZE_TRAIN (-4,)", r"is \(-4,\); give at least 1"),
        ("MODEL.PIXEL_STD [1.0,0.0,1.0]", r"MODEL.PIXEL_STD is .*; give at least 1e-06"),
        ("SOLVER.LR_SCHEDULER_NAME Fast", r"unknown .* Fast; known are WarmupCosineLR"),
        ("INPUT.CROP.TYPE relativ", r"unknown INPUT.CROP.TYPE relativ; did you mean relative\?"),
        ("MODEL.META_ARCHITECTURE=PanopticFPN", "PanopticFPN is not supported; GeneralizedRCNN"),
        ("MODEL.META_ARCHITECTURE=Nonsense", "Nonsense is not supported"),
        ("DATALOADER.SAMPLER_TRAIN=RepeatFactorTrainingSampler", "mean TrainingSampler"),
        ("TEST.AUG.ENABLED=True", "the evaluation here has none; set False"),
        ("TEST.NUM_SAVED_IMAGES=-1", "NUM_SAVED_IMAGES is -1; give at least 0"),
        ("MODEL.MASK_ON=True", "sets here hold no masks"),
        ("MODEL.LOAD_PROPOSALS=True", "hold no files of proposals"),
        ("MODEL.PROPOSAL_GENERATOR.NAME=PrecomputedProposals", "give RPN"),
        ("MODEL.RESNETS.DEPTH=18 MODEL.RESNETS.RES2_OUT_CHANNELS=16", "ResNet-18 with 64; give 64"),
        ("MODEL.RETINANET.NUM_CLASSES=3", "follows from the data set's class list"),
        # On a CPU:
        ("MODEL.RESNETS.NORM SyncBN", r"MODEL.RESNETS.NORM SyncBN: runs on GPUs only.*naiveSyncBN"),
    ],
)
def test_override_that_cannot_train_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_device(load_config(THIN, parse_overrides(["MODEL.DEVICE=cpu", *overrides.split()])))


def test_unreadable_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, message in {
        "VERSION: 2\nSOLVER: {BASE_LRR: 1}": "did you mean SOLVER.BASE_LR",
        "VERSION: 2\nSOLVER: [": "x.yaml: ",
        "VERSION: 2\n_BASE_: none.yaml": "none.yaml: cannot be read",
        "VERSION: 1\nMODEL: {WEIGHT: a}": "VERSION 1: only 2 is read",
        "SEED: 2026-01-01": "SEED",
        "SOLVER: {STEPS: [a]}": r"SOLVER.STEPS is .*; give numbers, not 'a'",
        "SOLVER: {STEPS: [[665]]}": r"SOLVER.STEPS is .*; give numbers, not lists",
        "SOLVER: {BASE_LR: .nan}": "SOLVER.BASE_LR is nan; give finite",
        f"OUTPUT_DIR: '{'-' * 90000}1'": "x.yaml: ",
        f"A: !!python/object/apply:os.mkdir [{tmp_path}/ran]": "tag !!python/object/apply",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(path)
        assert not (tmp_path / "ran").exists()


VOC0712 = sorted(CONFIGS.glob("voc0712_*.yaml"))


@pytest.mark.parametrize("path", VOC0712, ids=lambda path: path.stem)
def test_every_voc0712_config_keeps_the_protocol(path: Path) -> None:
    """What makes rows comparable: sets, pictures, batch, length, norms; only the model differs."""
    cfg, base = load_config(path), load_config(CONFIGS / "voc0712_R50_C4_24k.yaml")
    for part in ("INPUT", "DATASETS", "TEST", "DATALOADER"):
        assert cfg[part] == base[part], part
    usual = dotted(base.SOLVER)
    changed = {key for key, value in dotted(cfg.SOLVER).items() if usual[key] != value}
    is_lars = path.stem.endswith("_lars")
    assert changed == ({"BASE_LR", "WARMUP_ITERS", "WARMUP_FACTOR"} if is_lars else set())
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 8
    assert cfg.MODEL.RESNETS.NORM == "naiveSyncBN"
    if is_lars:
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS) == (0.1, 1000)
        assert pytest.approx(1 / 3) == cfg.SOLVER.WARMUP_FACTOR
        assert cfg.MODEL == base.MODEL


def norm_classes(model: nn.Module) -> set[str]:
    return {
        type(module).__name__ for module in model.modules() if "BatchNorm" in type(module).__name__
    }


def test_frozen_config_freezes_the_trunk_and_trains_res5() -> None:
    cfg = load_config(CONFIGS / "voc0712_R50_C4_24k_frozen.yaml", {"MODEL.DEVICE": "cpu"})
    model = build_model(cfg)
    assert not any(value.requires_grad for value in model.backbone.parameters())
    assert all(value.requires_grad for value in model.roi_heads.res5.parameters())
    assert norm_classes(model.backbone) == {"FrozenBatchNorm2d"}
    assert norm_classes(model.roi_heads) == {"NaiveSyncBatchNorm"}
    assert isinstance(model.roi_heads, Res5ROIHeadsExtraNorm)


PROTOCOL = CONFIGS / "voc0712_R50_C4_24k.yaml"
Schedule = tuple[object, ...]


def schedule(*overrides: str, num_gpus: int | None, path: Path = PROTOCOL) -> Schedule:
    solver = load_config(path, parse_overrides(overrides), num_gpus=num_gpus).SOLVER
    keys = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS")
    return tuple(solver[key] for key in keys)


PUBLISHED = (16, 0.02, 24_000, (18_000, 22_000), 100)


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "expected"),
    [
        (None, "", PUBLISHED),
        (8, "", PUBLISHED),
        (1, "", (2, 0.0025, 192_000, (144_000, 176_000), 800)),
        (3, "", (6, 0.0075, 64_000, (48_000, 58_667), 267)),
        (1, "SOLVER.IMS_PER_BATCH 16", PUBLISHED),  # one GPU that holds the whole batch
        (8, "SOLVER.IMS_PER_BATCH 64", (64, 0.08, 6_000, (4_500, 5_500), 25)),
        # What is given by hand stays; steps and warm-up follow a number of iterations.
        (1, "SOLVER.BASE_LR 0.1", (2, 0.1, 192_000, (144_000, 176_000), 800)),
        (1, "SOLVER.WARMUP_ITERS 1000", (2, 0.0025, 192_000, (144_000, 176_000), 1000)),
        (4, "SOLVER.MAX_ITER 24000", (8, 0.01, 24_000, (18_000, 22_000), 100)),
        (1, "SOLVER.REFERENCE_WORLD_SIZE 0", PUBLISHED),
        (1, "SOLVER.REFERENCE_WORLD_SIZE 4", (4, 0.005, 96_000, (72_000, 88_000), 400)),
    ],
)
def test_schedule_follows_gpus_and_batch(num_gpus, overrides, expected):
    found = schedule(*overrides.split(), num_gpus=num_gpus)
    assert found == (expected[0], pytest.approx(expected[1]), *expected[2:])


@pytest.mark.parity
@pytest.mark.parametrize("num_gpus", [1, 3, 16])
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


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"IMS_PER_BATCH 16 does not divide by .*WORLD_SIZE 3"):
        load_config(PROTOCOL, {"SOLVER.REFERENCE_WORLD_SIZE": "3"}, num_gpus=1)
    with pytest.raises(UserError, match="IMS_PER_BATCH 0: give at least 1"):
        load_config(PROTOCOL, {"SOLVER.IMS_PER_BATCH": "0"}, num_gpus=1)


def test_results_that_detectron2_expects_do_not_end_a_training(tmp_path: Path) -> None:
    """It would assert behind the last iteration that its own hook had evaluated."""
    config = tmp_path / "quick.yaml"
    config.write_text(f'_BASE_: "{THIN}"\nTEST:\n  EXPECTED_RESULTS: [["bbox", "AP", 38.3, 0.2]]\n')
    assert load_config(config).TEST.EXPECTED_RESULTS == []
