"""Fixtures of the detection tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.backbone import IMAGENET, read_backbone
from common.resnet import Arch
from detection.convert import convert
from tests.detection.tiny_detection import CONFIGS, make_voc
from tests.detection.tiny_weights import our_checkpoint, save, torchvision_state

_ROOT_KEYS = ("SOLVER", "MODEL", "TEST", "INPUT", "DATALOADER")


@pytest.fixture(scope="session", autouse=True)
def _programs_have_one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    """A fresh tiny set (Detectron2 caches annotations by file name, so never a shared one)."""
    return make_voc(tmp_path / "data")


@pytest.fixture(scope="session")
def tiny_overrides() -> list[str]:
    """KEY VALUE pairs that make three iterations of the thin detector cheap."""
    text = (
        "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 "
        "SOLVER.MAX_ITER 3 "
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 4 MODEL.RPN.POST_NMS_TOPK_TRAIN 8 "
        "MODEL.RPN.POST_NMS_TOPK_TEST 8 TEST.PRECISE_BN.NUM_ITER 1 "
        "MODEL.BACKBONE.CALIBRATE_BN_BATCHES 2 TEST.EVAL_PERIOD 0 SOLVER.CHECKPOINT_PERIOD 100"
    )
    return [str(word) for word in text.split()]


@pytest.fixture(scope="session")
def thin_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted weights of a thin ResNet-50, with their card."""
    folder = tmp_path_factory.mktemp("thin")
    arch = Arch(50, 16, 16, 64)
    state = our_checkpoint(torchvision_state(arch, 1), arch)
    state["preprocessing"] = {"mean": IMAGENET.mean, "std": IMAGENET.std}
    source = read_backbone(save(state, folder / "checkpoint.pth"))
    convert(source, folder / "backbone.pkl", size=96)
    return folder / "backbone.pkl"


@pytest.fixture
def train(voc_root: Path, tmp_path: Path, tiny_overrides: list[str]) -> Callable[..., int]:
    """Run the training command in this process: train("random", "--freeze", ..) -> exit status."""
    from tools.train_voc import main

    def run(weights: str, *more: str, config: str = "thin_R50_C4.yaml", out: str = "out") -> int:
        keys = [i for i, item in enumerate(more) if item.split(".")[0] in _ROOT_KEYS]
        first_key = keys[0] if keys else len(more)
        return main([
            weights, "--config", str(CONFIGS / config), "--data", str(voc_root),
            "--out", str(tmp_path / out), *more[:first_key], *tiny_overrides, *more[first_key:],
        ])  # fmt: skip

    return run
