from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from torch import nn

from common.errors import UserError
from detection.training.config import add_keys, check_device, flatten, load_config, parse_overrides
from detection.training.trainer import Res5ROIHeadsExtraNorm
from tests.detection.tiny_detection import CONFIGS

THIN = CONFIGS / "thin_R50_C4.yaml"
ALL = sorted(CONFIGS.rglob("*.yaml"))
COMPLETE = [path for path in ALL if not path.name.startswith("base_")]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_every_complete_config_has_its_heading(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("Source:", "Command", "Time:", "Expected"):
        assert word in head
    assert str(path.relative_to(CONFIGS.parents[1])) in head


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
    flat = flatten(cfg)
    assert {key: flat[key] for key in expected} == expected
    # And nothing else: Detectron2's defaults with these changes are the whole file, but for keys
    # that change no result on eight GPUs.
    stock = get_cfg()
    add_keys(stock)
    for key, value in expected.items():
        stock.merge_from_list([key, value])
    plain = flatten(stock)
    assert {key for key in flat if flat[key] != plain[key]} == {
        "MODEL.BACKBONE.CALIBRATE_BN_BATCHES",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.REFERENCE_WORLD_SIZE",
    }


def test_the_published_protocols_model_builds_and_its_schedule_drops_twice() -> None:
    cfg = load_config(CONFIGS / "voc0712_R50_C4_24k.yaml", {"MODEL.DEVICE": "cpu"})
    model = build_model(cfg)
    assert isinstance(model.roi_heads, Res5ROIHeadsExtraNorm)
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    assert len(norms) == 54  # 53 of the ResNet and the one behind res5
    assert {type(module).__name__ for module in norms} == {"NaiveSyncBatchNorm"}
    assert all(value.requires_grad for value in model.backbone.parameters())
    optimizer = build_optimizer(cfg, model)
    multiplier = vars(build_lr_scheduler(cfg, optimizer))["_multiplier"]
    factors = [multiplier(step / 24000) for step in (0, 100, 17999, 18001, 22001)]
    assert factors == pytest.approx([0.001, 1, 1, 0.1, 0.01])


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
    ],
)
def test_override_that_cannot_train_is_refused(overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(THIN, parse_overrides(overrides.split()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("MODEL.RESNETS.NORM SyncBN", r"MODEL.RESNETS.NORM SyncBN: runs on GPUs only.*naiveSyncBN"),
        ("SOLVER.AMP.ENABLED True", r"mixed precision needs a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu(overrides: str, message: str) -> None:
    cfg = load_config(THIN, parse_overrides(["MODEL.DEVICE", "cpu", *overrides.split()]))
    with pytest.raises(UserError, match=message):
        check_device(cfg)


def test_unreadable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "x.yaml"
    for text, message in {
        "VERSION: 2\nSOLVER: {BASE_LRR: 1}": "did you mean SOLVER.BASE_LR",
        "VERSION: 2\nSOLVER: [": "x.yaml: ",
        "VERSION: 2\nSOLVER: {MAX_ITER: 10, STEPS: [20], WARMUP_ITERS: 1}": "reaches beyond",
        "VERSION: 2\n_BASE_: none.yaml": "x.yaml: ",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(path)


VOC0712 = sorted(CONFIGS.glob("voc0712_*.yaml"))


@pytest.mark.parametrize("path", VOC0712, ids=lambda path: path.stem)
def test_every_voc0712_config_keeps_the_protocol(path: Path) -> None:
    """What makes rows comparable: sets, pictures, batch, length, norms; only the model differs."""
    cfg, base = load_config(path), load_config(CONFIGS / "voc0712_R50_C4_24k.yaml")
    for part in ("INPUT", "DATASETS", "TEST", "DATALOADER"):
        assert cfg[part] == base[part], part
    usual = flatten(base.SOLVER)
    changed = {key for key, value in flatten(cfg.SOLVER).items() if usual[key] != value}
    is_lars = path.stem.endswith("_lars")
    assert changed == ({"BASE_LR", "WARMUP_ITERS", "WARMUP_FACTOR"} if is_lars else set())
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 8
    assert cfg.MODEL.RESNETS.NORM == "naiveSyncBN"
    if is_lars:
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS) == (0.1, 1000)
        assert pytest.approx(1 / 3) == cfg.SOLVER.WARMUP_FACTOR
        assert flatten(cfg.MODEL) == flatten(base.MODEL)


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


@pytest.mark.parametrize(
    ("name", "num_blocks", "num_channels"),
    [("R18", (2, 2, 2, 2), 512), ("R34", (3, 4, 6, 3), 512), ("R50", (3, 4, 6, 3), 2048)],
)
def test_pyramids_build_on_the_whole_resnet(
    name: str, num_blocks: tuple[int, ...], num_channels: int
) -> None:
    cfg = load_config(CONFIGS / f"voc0712_{name}_FPN_24k.yaml", {"MODEL.DEVICE": "cpu"})
    model = build_model(cfg)
    resnet = model.backbone.bottom_up
    assert tuple(len(getattr(resnet, f"res{stage}")) for stage in (2, 3, 4, 5)) == num_blocks
    assert resnet.output_shape()["res5"].channels == num_channels
    assert norm_classes(model) == {"NaiveSyncBatchNorm"}
    assert all(value.requires_grad for value in model.parameters())
