"""The sheet of a data set's pictures."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tools import contact_sheet, make_dataset

COUNTS = {"pool": 5, "train": 6, "test": 1, "probe-train": 10, "probe-val": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    counts = [word for name, n in COUNTS.items() for word in (f"--num-{name}", str(n))]
    assert make_dataset.main(["procedural", str(out), "--image-size", "48", *counts]) == 0
    return out


@pytest.mark.parametrize("part", ["train", "pool", "probe/train"])
@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_the_sheet_has_the_asked_width(data, tmp_path, part, ending):
    out = tmp_path / "new" / f"sheet{ending}"
    assert contact_sheet.main([str(data), str(out), "--part", part, "--width", "500"]) == 0
    sheet = cv2.imread(str(out))
    assert sheet is not None
    assert sheet.shape[1] == 500
    assert sheet.std() > 20


def test_boxes_are_drawn(data, tmp_path):
    sheets = []
    for name in ("with", "without"):
        out = tmp_path / f"{name}.png"
        assert contact_sheet.main([str(data), str(out), "--height", "48"]) == 0
        sheets.append(cv2.imread(str(out)))
        for path in (data / "VOC2007/Annotations").iterdir():
            path.write_text(re.sub(r"(?s)<object>.*</object>", "", path.read_text()))
    assert (sheets[0] != sheets[1]).any()


def test_tiles_keep_their_order_in_full_rows():
    tiles = [Image.new("RGB", (30, 20), (10 * i, 0, 0)) for i in range(1, 8)]
    sheet = contact_sheet.arrange(tiles, 100)
    assert sheet.size == (100, 2 * (20 + 4))  # the seventh is alone in its row
    assert np.asarray(sheet)[[5, 29]][:, [5, 39, 73], 0].tolist() == [[10, 20, 30], [40, 50, 60]]
    for width in (500, 10):
        assert contact_sheet.arrange(tiles[:1], width).width == width


def test_mistakes_are_named(data, tmp_path, capsys):
    assert contact_sheet.main([str(tmp_path), str(tmp_path / "a.jpg")]) == 2
    assert "no train pictures there" in capsys.readouterr().err
    assert contact_sheet.main([str(data), str(tmp_path / "a.gif")]) == 2
    assert "ends in .jpg or .png" in capsys.readouterr().err
