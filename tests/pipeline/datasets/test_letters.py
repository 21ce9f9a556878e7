"""Letters of fonts: matplotlib's stand in for those of the packages."""

import shutil
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest

from common.annotations.record import SetChoice, read_set
from common.errors import UserError
from pipeline.datasets import letters
from pipeline.datasets.sets import SetOptions
from tests.pipeline.datasets.package_fixture import run

FONTS = Path(matplotlib.__file__).parent / "mpl-data/fonts/ttf"
COUNTS = {"pool": 60, "train": 4, "test": 4, "probe-train": 26, "probe-val": 52}
SIZES = [f"--num-{part}={count}" for part, count in COUNTS.items()]


@pytest.fixture(scope="module")
def fonts(tmp_path_factory) -> letters.Fonts:
    return letters.open_fonts(FONTS, None, tmp_path_factory.mktemp("cache"))


def test_fonts_that_are_none_are_left_out_with_the_reason(tmp_path: Path):
    for number, name in enumerate(
        ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "cmr10", "cmss10")
    ):
        shutil.copy(FONTS / f"{name}.ttf", tmp_path / f"{number}.ttf")
    shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / "again.ttf")
    shutil.copy(FONTS / "cmex10.ttf", tmp_path / "symbols.ttf")  # large brackets
    shutil.copy(FONTS / "STIXSizOneSymReg.ttf", tmp_path / "z.ttf")  # has no letters
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    kept, left_out = letters.check_fonts(sorted(tmp_path.iterdir()))
    assert {path.name for path, _ in kept} == {f"{i}.ttf" for i in range(5)}
    assert dict(kept)[tmp_path / "3.ttf"] == "cmr10"
    assert dict(kept)[tmp_path / "1.ttf"] == "dejavu"
    assert left_out.pop("cannot be drawn") == left_out.pop("the same as another") == 1
    assert sum(left_out.values()) == 2
    with pytest.raises(UserError, match=r"3 families, 5 are needed"):
        letters.open_fonts(tmp_path, None, tmp_path / "cache")


def test_letters_that_look_like_others_are_no_letters(tmp_path: Path, monkeypatch):
    """A font whose Z is drawn as A, its Y as B and so on, among others."""
    original = letters.draw_glyph

    def turned(path: Path, letter: str, size: int) -> np.ndarray:
        swapped = chr(ord("A") + ord("Z") - ord(letter))
        return original(path, swapped if path.stem == "cmr10" else letter, size)

    monkeypatch.setattr(letters, "draw_glyph", turned)
    files = [FONTS / f"{name}.ttf" for name in ("DejaVuSans", "DejaVuSerif", "cmss10", "cmr10")]
    kept, left_out = letters.check_fonts(files)
    assert [path.stem for path, _ in kept] == ["DejaVuSans", "DejaVuSerif", "cmss10"]
    assert left_out == {"no Latin letters": 1}


def test_families_are_not_shared_between_the_parts(fonts: letters.Fonts):
    family = dict(fonts.files)
    parts = letters.split(fonts, 0)
    families = {part: {family[file] for file in files} for part, files in parts.items()}
    assert all(families.values())
    assert not families["pool"] & families["train"]
    assert not families["pool"] & families["test"]
    assert not families["train"] & families["test"]
    assert sum(map(len, parts.values())) == len(fonts.files)
    assert letters.split(fonts, 0) == parts != letters.split(fonts, 1)


def test_a_picture_shows_its_letter_whole_and_moved(fonts: letters.Fonts):
    files = letters.split(fonts, 0)
    source = letters.LetterSource(SetOptions(), ("B", "X"), root=fonts.root, files=files)
    corners = set()
    for index in range(2 * len(files["train"]) + 2):
        picture = source.scene("probe/train", index)
        (item,) = picture.objects
        rows, columns = (np.flatnonzero(picture.image.any(axis=(axis, 2))) for axis in (1, 0))
        assert item.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert item.label == index % 2
        assert picture.image.shape == (40, 40, 3)
        font = fonts.root / files["train"][index // 2 % len(files["train"])]
        glyph = letters.draw_glyph(font, "BX"[index % 2], letters.em_size(font, 28.0))
        shown = picture.image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, 0]
        assert np.array_equal(shown, glyph)
        assert max(glyph.shape) <= 28
        corners.add(item.box[:2])
    assert len(corners) > 5


def test_a_set_on_disk(tmp_path: Path):
    out = tmp_path / "set"
    more = ["--letters", "ABEKX", "--letter-size", "32", "--image-size", "64", "80"]
    options = [*SIZES, *more, "--fonts-dir", str(FONTS), "--cache", str(tmp_path / "cache")]
    assert run("letters", out, *options) == 0
    data = read_set(out, SetChoice())
    assert data.classes == tuple("ABEKX")
    assert len(data.test.pictures) == 4
    assert [len(list((out / "probe/val" / name).iterdir())) for name in "ABEKX"] == [
        11,
        11,
        10,
        10,
        10,
    ]
    assert len(list((out / "pool").iterdir())) == 60
    for path, shape in ((out / "pool/0000007.jpg", (32, 32)), (data.test.pictures[0].file, None)):
        image = cv2.imread(str(path))
        assert (image == image[:, :, :1]).all()
        assert (shape or image.shape[:2]) == image.shape[:2]
    assert run("letters", out, *options) == 0  # kept
    assert run("letters", out, *options, "--seed", "1") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--letters", "A"], "--letters A: give two or more of A to Z"),
        (["--letters", "AAB"], "--letters AAB: give two or more of A to Z"),
        (["--letter-size", "8"], "--letter-size is 8"),
        (["--fonts-dir", "nowhere"], "--fonts-dir nowhere: no such folder"),
        (["--packages-dir", "tests"], "apt-get download fonts-adf-accanthis"),
        (["--fonts-dir", "a", "--packages-dir", "b"], "give one of them"),
    ],
)
def test_bad_options(tmp_path: Path, capsys, arguments, message):
    assert run("letters", tmp_path / "set", *arguments, "--cache", str(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_fonts_out_of_packages(tmp_path: Path):
    """A folder that the packages were unpacked to."""
    share = tmp_path / "root/usr/share"
    shutil.copytree(FONTS, share / "fonts/truetype")
    (share / "doc/fonts-x").mkdir(parents=True)
    (share / "doc/fonts-x/copyright").write_text("terms")
    found = letters.open_fonts(None, tmp_path / "root", tmp_path / "cache")
    assert len({family for _, family in found.files}) >= 5
    assert (found.root / "licences/fonts-x.txt").read_text() == "terms"
    assert len(letters.listed_packages()) == 116
