"""The data of a study: pictures, nested parts of the pool, what is refused."""

import gzip
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from common.errors import UserError
from pipeline.grid import data
from pipeline.grid.data import CLASSES, read_idx
from tests.pipeline.grid.stub import make_index


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
    monkeypatch.setattr(data, "SYSTEM", tmp_path)
    return arrays


def test_fashion_mnist_as_pictures(package: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    data.write_pictures(out, num_pool=50, num_probe_train=30, num_probe_val=20)
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


def test_more_than_there_is_is_refused(package: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_pool is 61; give 10 to 60"):
        data.write_pictures(tmp_path / "p", num_pool=61, num_probe_train=1)


@pytest.mark.parametrize("cut", [slice(0, -3), slice(1, None), slice(0, 3)])
def test_damaged_files_are_refused(cut: slice) -> None:
    raw = gzip.decompress(idx(np.zeros((4, 5, 6), np.uint8)))
    assert read_idx(gzip.compress(raw)).shape == (4, 5, 6)
    with pytest.raises(UserError, match="damaged"):
        read_idx(gzip.compress(raw[cut]))
    with pytest.raises(UserError, match="damaged"):
        read_idx(raw)


def test_the_pool_is_split_into_nested_shares(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for number in range(40):
        (pool / f"{number:03d}.png").touch()
    data._split_pool(pool)
    parts = [{p.name for p in (tmp_path / f"pool-{k}").iterdir()} for k in range(3)]
    assert [len(part) for part in parts] == [4, 6, 30]
    assert len(set.union(*parts)) == 40
    numbers = sorted(int(name[:3]) for name in parts[0])
    assert numbers == [0, 10, 20, 30]  # spread over the whole


@pytest.mark.slow
def test_data_are_made_once_and_other_options_refused(
    package: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {
        "recipe": "fashion_mnist", "num_pool": 40, "num_probe_train": 20, "num_probe_val": 10,
        "overrides": {"data.image_size": 28},
    }  # fmt: skip
    out = tmp_path / "data"
    made = data.prepare("fm", options, out)
    assert list(made.pools) == [0.1, 0.25, 1.0]
    counts = [
        sum(json.loads((path / "index.json").read_text())["num_samples"] for path in paths)
        for paths in made.pools.values()
    ]
    assert counts == [4, 10, 40]
    assert json.loads((made.probe_val / "index.json").read_text())["classes"] == sorted(CLASSES)
    assert made.overrides == {"data.image_size": 28}
    assert not (out / "pictures").exists()
    capsys.readouterr()
    assert data.prepare("fm", options, out).digest == made.digest
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="made with other options; choose another --out"):
        data.prepare("fm", options | {"num_pool": 41}, out)


def test_own_shards_in_parts(tmp_path: Path) -> None:
    a, b, t, v = (str(make_index(tmp_path / name, name)) for name in "abef")
    options = {"recipe": "shards", "pool": {0.1: a, 1: [a, b]}, "probe_train": t, "probe_val": v}
    found = data.prepare("own", options, tmp_path)
    assert found.pools == {0.1: (Path(a),), 1.0: (Path(a), Path(b))}
    assert found.check_pool(0.1, "g") == 0.1
    with pytest.raises(UserError, match=r"grid g: data own has no pool 0\.25; it has 0\.1, 1\.0"):
        found.check_pool(0.25, "g")
    (tmp_path / "a/index.json").unlink()
    with pytest.raises(UserError, match=r"a/index\.json: missing"):
        data.prepare("own", options, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "cifar"}, "no recipe 'cifar'; known are fashion_mnist, photos, shards"),
        ({"recipe": "photos", "pool": 3}, "recipe photos: unknown key pool; did you mean num_pool"),
        ({"recipe": "shards", "pool": "x"}, "recipe shards: probe_train is missing"),
    ],
)
def test_mistakes_are_named(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        data.prepare("d", options, tmp_path)
