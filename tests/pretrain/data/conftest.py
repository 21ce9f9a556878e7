"""Small shard sets for the tests of the data side."""

import shutil
from pathlib import Path

import pytest

from pretrain.data.pack import ShardOptions, write_shards
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import sources, write_pictures


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def packed(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 shards of 10 samples each; not to be changed."""
    out, options = tmp_path_factory.mktemp("packed"), ShardOptions(max_samples_per_shard=10)
    write_shards(sources(picture_folder), out, options=options, classes=["class-0", "class-1"])
    return out


@pytest.fixture
def shard_folder(packed: Path, tmp_path: Path) -> Path:
    """A fresh copy of the set, free to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


@pytest.fixture
def index(shard_folder: Path) -> ShardIndex:
    return ShardIndex.open(shard_folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves an index in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
