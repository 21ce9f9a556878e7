import pickle
from pathlib import Path

import pytest
import yaml

from common.config import read_settings, to_plain
from common.errors import UserError
from pretrain.config import DataConfig
from pretrain.data.augmentations.jitter import Jitter
from pretrain.data.policy import PRESETS, AugmentationPolicy, Crop, preset_view


def policy(*overrides: str, path: Path | None = None) -> AugmentationPolicy:
    return read_settings(DataConfig, path, overrides).augmentation


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_by_their_names(preset: str, tmp_path: Path) -> None:
    named = policy(f"augmentation={preset}")
    assert named == AugmentationPolicy.of(preset) == pickle.loads(pickle.dumps(named))
    written = tmp_path / "data.yaml"
    written.write_text(yaml.safe_dump({"augmentation": to_plain(named)}))
    assert policy(path=written) == named


def test_presets_are_those_of_the_papers() -> None:
    one, two = AugmentationPolicy.of("asymmetric").views  # BYOL
    assert AugmentationPolicy().views == (one, two)
    probabilities = [{op.name: op.probability for op in view.operations} for view in (one, two)]
    common = {"jitter": 0.8, "grey": 0.2}
    assert probabilities == [common | {"blur": 1.0}, common | {"blur": 0.1, "solarize": 0.2}]
    for view in (one, two):
        assert view.operations[0] == Jitter(0.8, 0.4, 0.4, 0.2, 0.1)
        assert (view.crop.scale, view.flip.probability) == ((0.08, 1.0), 0.5)
    moco, other = AugmentationPolicy.of("moco_v2").views
    assert moco == other
    assert moco.crop == Crop(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    assert [(op.name, op.probability) for op in moco.operations] == [
        ("jitter", 0.8), ("grey", 0.2), ("blur", 0.5),
    ]  # fmt: skip
    assert moco.operations[0] == Jitter(0.8, 0.4, 0.4, 0.4, 0.1)
    (crops, _) = AugmentationPolicy.of("crops").views
    assert (crops.operations, crops.crop.scale) == ([], (0.2, 1.0))
    assert preset_view(0, "asymmetric_strong") == preset_view(0, "symmetric_weak")


def test_single_settings_change_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("augmentation: {preset: moco_v2, view2: {blur: {sigma: [1, 3]}}}\n")
    read = policy("augmentation.view2.solarize.probability=0.3", path=file)
    assert read.view1 == preset_view(0, "moco_v2")
    one, two = ({op.name: op for op in view.operations} for view in read.views)
    assert (two["blur"].probability, two["blur"].sigma) == (0.5, (1.0, 3.0))  # type: ignore[attr-defined]
    assert two["solarize"].probability == 0.3
    assert [*two] == ["jitter", "grey", "blur", "solarize"]
    assert one["jitter"] == two["jitter"]
    # Without a preset's name: the default one.
    assert policy("augmentation.view2.flip.probability=0").view1 == preset_view(0)
    assert policy("augmentation=crops", path=file) == AugmentationPolicy.of("crops")


def test_small_crops_are_made_as_view_1_but_for_the_scale_unless_told_otherwise() -> None:
    assert policy().small_crops.num == 0
    small = policy("augmentation=moco_v2", "augmentation.small_crops.num=6").small_crops
    assert (small.num, small.image_size, small.crop) == (6, 96, Crop(scale=(0.05, 0.14)))
    assert small.operations == preset_view(0, "moco_v2").operations
    changed = policy(
        "augmentation.view1={crop: {scale: [0.14, 1], interpolation: bicubic}, grey: {probability: "
        "0.3}, flip: {probability: 0}}",
        "augmentation.small_crops={image_size: 64, crop: {ratio: [1, 1]}}",
        "augmentation.small_crops.blur.probability=0.2",
    )
    small = changed.small_crops
    assert (small.image_size, small.flip.probability) == (64, 0)
    assert small.crop == Crop((0.05, 0.14), ratio=(1, 1), interpolation="bicubic")
    own, first = ({op.name: op.probability for op in view.operations}
                  for view in (small, changed.view1))  # fmt: skip
    assert own == first | {"blur": 0.2}
    assert own["grey"] == 0.3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augmentation=symetric_weak", "unknown preset .*; did you mean symmetric_weak"),
        ("augmentation.view1.blurr.sigma=1", r"did you mean augmentation\.view1\.blur"),
        ("augmentation.view1.crop.scale=[0.5,0.1]", r"crop\.scale .* 0 < low <= high <= 1"),
        ("augmentation.view1.crop.scale=[0,1]", r"crop\.scale .* 0 < low <= high <= 1"),
        ("augmentation.view1.crop.ratio=[2,1]", r"crop\.ratio .* 0 < low <= high"),
        ("augmentation.view1.crop.interpolation=nearest", "interpolation"),
        ("augmentation.view2.flip.probability=2", r"flip\.probability must be in \[0, 1\]"),
        ("augmentation.small_crops.num=-1", r"small_crops\.num must be >= 0, got -1"),
        ("augmentation.small_crops.image_size=8", r"small_crops\.image_size must be >= 16, got 8"),
        ("augmentation.small_crops.number=6", r"did you mean augmentation\.small_crops\.num"),
        ("augmentation.small_crops.crop.scale=[0,1]", r"crop\.scale .* 0 < low <= high <= 1"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        policy(override)
