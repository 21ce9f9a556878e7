from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.pretrain.data.picture_helpers import smooth_picture
from tools.augmentation_sheet import COLUMNS, ROWS, in_float, in_pillow, in_uint8, main, sheet


def test_sheet_has_a_row_per_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = tmp_path / "a.png", tmp_path / "new" / "sheet.png"
    cv2.imwrite(str(picture), smooth_picture(0, 90, 120))
    assert main([str(picture), str(out), "--size", "32"]) == 0
    page = cv2.imread(str(out))
    assert page.shape == (24 + len(ROWS) * 36, 150 + len(COLUMNS) * 36, 3)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_three_ways_agree_and_change_the_picture(name: str) -> None:
    image = smooth_picture(1, 64, 64)
    results = [way(image, ROWS[name]) for way in (in_pillow, in_uint8, in_float)]
    assert np.abs(results[1] - results[0]).mean() < 3
    assert np.abs(results[1] - results[2]).mean() < 1.5
    assert np.abs(results[1] - image).mean() > 1


def test_difference_columns_are_sixteenfold() -> None:
    image = smooth_picture(2, 32, 32)
    page, _ = sheet(image)
    row = list(ROWS).index("hue 0.1")
    top, left = 24 + row * 36, 150 + 4 * 36
    values = ROWS["hue 0.1"]
    expected = np.abs(in_uint8(image, values) - in_float(image, values)) * 16
    got = np.asarray(page)[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(got, np.clip(np.rint(expected), 0, 255))


@pytest.mark.parametrize("kind", ["missing", "no picture"])
def test_what_is_no_picture(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jpg"
    if kind == "no picture":
        path.write_bytes(b"hello")
    assert main([str(path), str(tmp_path / "b.jpg")]) == 2
    assert "a.jpg" in capsys.readouterr().err
