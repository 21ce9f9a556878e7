import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference

from common.errors import UserError
from pretrain.data.augmentations import jitter
from pretrain.data.augmentations.jitter import ORDERS, Jitter
from tests.pretrain.data.augmentations.ways import (
    PICTURES,
    check_uint8,
    close,
    floats,
    in_float,
    on_uint8,
)

NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "order": 0.0}
REFERENCES = {name: getattr(reference, f"adjust_{name}") for name in NEUTRAL if name != "order"}
FACTORS = [0.0, 0.2, 0.7, 1.4, 1.8]
HUES = [-0.5, -0.2, -0.03, 0.1, 0.45]
UINT8 = {
    "brightness": (FACTORS, (0.55, 0.26, 1, 0.6)),
    "contrast": (FACTORS, (0.6, 0.5, 1, 0.65)),
    "saturation": (FACTORS, (0.9, 0.3, 2, 0.8)),
    "hue": (HUES, (11, 1.0, 20, 2.5)),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", UINT8)
def test_floats_equal_torchvision(name: str) -> None:
    values = [NEUTRAL[name], *UINT8[name][0]]
    theirs = [REFERENCES[name](x, v) for x, v in zip(floats(), values, strict=True)]
    ours = getattr(jitter, f"adjust_{name}")(floats(), torch.tensor(values))
    close(ours, torch.stack(theirs))


@pytest.mark.parity
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (vs, _) in UINT8.items() for v in vs])
def test_uint8_is_close_to_both_references(name: str, value: float) -> None:
    bounds = UINT8[name][1]
    check_uint8(
        Jitter(), lambda image: REFERENCES[name](image, value), NEUTRAL | {name: value}, bounds
    )


def test_both_ways_keep_the_order() -> None:
    values = {"brightness": 1.8, "contrast": 0.4, "saturation": 1.7, "hue": 0.2}
    results = set()
    for number in range(24):
        ours = on_uint8(Jitter(), PICTURES[0], **values, order=float(number))
        exact = in_float(Jitter(), PICTURES[0], **values, order=float(number))
        assert np.abs(ours - exact).mean() < 1
        results.add(ours.tobytes())
    assert len(results) > 12
    assert len(set(ORDERS)) == 24


def test_settings_decide_what_is_drawn() -> None:
    operation = Jitter(probability=0.6, brightness=0.3, contrast=1.5, saturation=0.1, hue=0.2)
    drawn = operation.draw(np.random.default_rng(0).random((6, 20_000)))
    is_changed = drawn["brightness"] != 1
    assert is_changed.mean() == pytest.approx(0.6, abs=0.015)
    for name, low, high in (
        ("brightness", 0.7, 1.3), ("contrast", 0, 2.5), ("saturation", 0.9, 1.1),
        ("hue", -0.2, 0.2),
    ):  # fmt: skip
        values = drawn[name][is_changed]
        assert (drawn[name][~is_changed] == NEUTRAL[name]).all()
        assert values.min() == pytest.approx(low, abs=0.01 * (high - low))
        assert values.max() == pytest.approx(high, abs=0.01 * (high - low))
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert np.bincount(drawn["order"].astype(int), minlength=24).min() > 700


@pytest.mark.parametrize("wrong", [{"hue": 0.6}, {"brightness": -0.1}, {"contrast": float("nan")}])
def test_impossible_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"jitter\.{next(iter(wrong))} must be in"):
        Jitter(**wrong)
