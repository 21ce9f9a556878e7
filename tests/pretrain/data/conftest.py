"""Small shard sets for the tests of the data side."""

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


@pytest.fixture
def shard_folder(picture_folder: Path, tmp_path: Path) -> Path:
    """A fresh set of 4 shards of 10 samples each, free to be damaged."""
    out = tmp_path / "shards"
    options = ShardOptions(max_samples_per_shard=10)
    write_shards(sources(picture_folder), out, options=options, classes=["class-0", "class-1"])
    return out


@pytest.fixture
def index(shard_folder: Path) -> ShardIndex:
    return ShardIndex.open(shard_folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves an index in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
