"""Linear-evaluation and kNN figures of a fixed network on small labelled sets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.network import ResNet
from common.resnet import Arch
from tests.golden.gate import check
from tests.golden.pictures import labelled_shards
from tests.golden.training import fill_weights
from tools.linear_eval import main as linear_eval

NUM_TRAIN, NUM_VAL = 60, 45
COMMON = ["seed=1", "image_size=32", "num_workers=0", "device=cpu", "batch_size=12"]
PROTOCOLS = {
    "cached": ["epochs=8", "num_lrs=4", "holdout=0.2", "momentum=0.8"],
    "cached-crops": ["passes=2", "epochs=4", "lrs=[1,30]", "fraction=0.5", "optimizer=lars",
                     "weight_decay=0.001", "holdout=0.2"],
    "full": ["epochs=3", "lrs=[0.3,3,30]", "holdout=0.2", "crop_scale=[0.3,1]", "nesterov=true",
             "schedule=cosine_epochs"],
    "knn": ["knn_k=[1,5,20]"],
}  # fmt: skip
FIGURES = (
    "rates", "chosen", "top1", "top5", "n", "per_class", "training_top1", "knn", "refitted", "data",
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 in torchvision's layout whose BN layers have seen some noise."""
    backbone = ResNet(Arch(18, 8, 8, 8)).train()
    fill_weights(backbone)
    noise = np.random.default_rng(5).standard_normal((32, 3, 32, 32), dtype=np.float32)
    with torch.no_grad():
        for _ in range(10):
            backbone(torch.from_numpy(noise))
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(backbone.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    train = labelled_shards(tmp_path_factory.mktemp("train"), num=NUM_TRAIN, seed=1)
    return train, labelled_shards(tmp_path_factory.mktemp("val"), num=NUM_VAL, seed=2)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_figures(name: str, weights: Path, sets: tuple[Path, Path], tmp_path: Path) -> None:
    protocol = name.removesuffix("-crops")
    train, val = map(str, sets)
    command = [str(weights), *COMMON, *PROTOCOLS[name], "--train", train, "--val", val]
    if protocol == "full":
        (tmp_path / "plain.yaml").write_text("protocol: full\n")
        command += ["--config", str(tmp_path / "plain.yaml")]
    assert linear_eval([*command, "--protocol", protocol, "--out", str(tmp_path / "out")]) == 0
    result: dict[str, Any] = json.loads((tmp_path / "out" / "linear.json").read_text())
    figures = {key: result[key] for key in FIGURES}
    for part in ("train", "val"):  # where the sets lie differs, and encoders may
        figures["data"][part] = {
            k: v for k, v in figures["data"][part].items() if k.startswith("num_")
        }
    check(f"linear-{name}", figures, rtol=1e-9, atol=1.01 / NUM_VAL)  # one picture of the set
