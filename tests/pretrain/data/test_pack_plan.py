"""Sizes of shards, and keys."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pretrain.data.index import key_and_suffix
from pretrain.data.pack import ShardOptions, make_keys, make_plan, split_evenly
from tests.pretrain.data.picture_helpers import seeded, sources


def shard_sizes(stored: np.ndarray, options: ShardOptions) -> tuple[list[int], list[int]]:
    """Samples and bytes of each shard."""
    bounds = split_evenly(stored, options)
    assert bounds[0] == 0
    assert bounds[-1] == len(stored)
    parts = [stored[start:end] for start, end in itertools.pairwise(bounds)]
    return [len(part) for part in parts], [int(part.sum()) for part in parts]


@settings(seeded, max_examples=60)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(500, 20_000),
)
def test_no_shard_is_empty_or_over_a_limit(sizes: list[int], most: int, limit: int) -> None:
    options = ShardOptions(max_samples_per_shard=most, shard_size_mb=limit / 1e6)
    counts, totals = shard_sizes(np.array(sizes), options)
    assert sum(totals) == sum(sizes)
    for count, total in zip(counts, totals, strict=True):
        assert 1 <= count <= most
        assert total <= limit or count == 1


@settings(seeded, max_examples=60)
@given(st.integers(1, 5000), st.integers(1, 700))
def test_equal_pictures_are_spread_like_cards(num: int, most: int) -> None:
    """numpy's array_split into as few shards as the limit allows is the reference."""
    counts, _ = shard_sizes(np.full(num, 5000), ShardOptions(max_samples_per_shard=most))
    expected = [len(part) for part in np.array_split(np.arange(num), -(-num // most))]
    assert sorted(counts) == sorted(expected)


def test_giants_get_shards_that_hold_them() -> None:
    stored = np.full(1000, 1000)
    stored[[10, 500, 501]] = [150_000, 60_000, 60_000]
    options = ShardOptions(max_samples_per_shard=10**6, shard_size_mb=0.1)
    counts, totals = shard_sizes(stored, options)
    assert [total for count, total in zip(counts, totals, strict=True) if total > 1e5] == [150_000]
    assert len(counts) < 40


def test_plan_is_the_same_however_the_pictures_are_listed(picture_folder: Path) -> None:
    pictures = sources(picture_folder)
    shuffled = random.Random(3).sample(pictures, len(pictures))
    options = ShardOptions(shard_size_mb=0.03)
    assert make_plan(pictures, options) == make_plan(shuffled, options)


path_parts = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40
)
file_names = st.lists(path_parts, min_size=1, max_size=4).map("/".join)


@settings(seeded, max_examples=60)
@given(st.lists(file_names, unique=True, max_size=20))
def test_keys_are_unique_safe_and_short(names: list[str]) -> None:
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    for key in keys:
        assert key_and_suffix(f"{key}.jpg") == (key, "jpg")
        assert f"{key}.jpg".isascii()
        assert len(key) <= 92
        assert not key.startswith("/")
        assert ".." not in key


def test_plain_names_stay_readable() -> None:
    assert make_keys(["n01/a_1.JPEG", "n01/a-2.jpg"]) == ["n01/a_1", "n01/a-2"]
    both = make_keys(["a.jpg", "a.png"])
    assert all(key.startswith("a-") for key in both)
    with pytest.raises(UserError, match=r"a.jpg: listed twice"):
        make_keys(["a.jpg", "a.jpg"])
