"""Fashion-MNIST as a data set: pictures out of the package, what is refused."""

import gzip
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.errors import UserError
from pipeline.datasets import fashion
from pipeline.datasets.fashion import CLASSES, read_idx
from tools.make_dataset import main


def idx(array: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([array.ndim])
    return gzip.compress(header + np.array(array.shape, ">u4").tobytes() + array.tobytes())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A made-up package of 60 and 20 pictures; picture i has i in its corner, and class i % 10."""
    arrays = {}
    folder = tmp_path / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        arrays[part] = images
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    monkeypatch.setattr(fashion, "SYSTEM", tmp_path)
    return arrays


def test_fashion_mnist_as_pictures(package: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    words = ["--num-pool", "50", "--num-probe-train", "30", "--num-probe-val", "20"]
    assert main(["fashion", str(out), *words]) == 0
    card = json.loads((out / "dataset.json").read_text())
    assert (card["pool"], card["probe"]) == (50, {"train": 30, "val": 20})
    pool = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in (out / "pool").iterdir()]
    corners = [int(image[0, 0]) for image in pool]
    assert len(set(corners)) == 50
    for corner, image in zip(corners, pool, strict=True):
        assert (image == package["train"][corner]).all()
    for part, source, count in (("train", "train", 30), ("val", "t10k", 20)):
        files = list((out / "probe" / part).rglob("*.png"))
        assert len(files) == count
        for path in files:
            image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            assert (image == package[source][image[0, 0]]).all()
            assert path.parent.name == CLASSES[image[0, 0] % 10]
        per_class = [len(list((out / "probe" / part / name).iterdir())) for name in CLASSES]
        assert per_class == [count // 10] * 10


def test_more_than_there_is_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fashion", str(tmp_path / "p"), "--num-pool", "60001", "--check"]) == 2
    assert "--num-pool is 60001: give 10 to 60,000" in capsys.readouterr().err
    assert main(["fashion", str(tmp_path / "p"), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_pool"] == 60000
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("cut", [slice(0, -3), slice(1, None), slice(0, 3)])
def test_damaged_files_are_refused(cut: slice) -> None:
    raw = gzip.decompress(idx(np.zeros((4, 5, 6), np.uint8)))
    assert read_idx(gzip.compress(raw)).shape == (4, 5, 6)
    with pytest.raises(UserError, match="damaged"):
        read_idx(gzip.compress(raw[cut]))
    with pytest.raises(UserError, match="damaged"):
        read_idx(raw)
