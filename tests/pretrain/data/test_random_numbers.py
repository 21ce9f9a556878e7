from typing import Any

import numpy as np
import pytest

from pretrain.data.random_numbers import draw_uniforms, stable_hash, uniforms


@pytest.mark.parametrize(
    ("one", "other"), [(("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((1, 23), (12, 3)), ((), ("",))]
)
def test_encoding_of_parts_is_unambiguous(one: tuple, other: tuple) -> None:
    assert stable_hash(*one) != stable_hash(*other)


HASHES = np.arange(1000)


def drawn(hashes: np.ndarray = HASHES, **changes: Any) -> np.ndarray:
    arguments = {"repeats": 0, "seed": 0, "view_index": 0, "purpose": "test"} | changes
    return draw_uniforms(sample_hashes=hashes, num_draws=3, **arguments)


def test_draws_depend_on_seed_repeat_hash_view_and_purpose_alone() -> None:
    one = drawn()
    np.testing.assert_array_equal(drawn(HASHES[::-1])[:, ::-1], one)
    np.testing.assert_array_equal(drawn(HASHES[17:18])[:, 0], one[:, 17])
    for change in (
        {"seed": 1}, {"repeats": 1}, {"repeats": -1}, {"view_index": 1}, {"purpose": "other"},
        {"hashes": HASHES + 10**6},
    ):  # fmt: skip
        assert (drawn(**change) == one).mean() < 0.01


def test_each_sample_is_drawn_by_its_own_repeat_index() -> None:
    repeats = HASHES % 3 - 1
    mixed = drawn(repeats=repeats)
    for repeat in (-1, 0, 1):
        rows = repeats == repeat
        np.testing.assert_array_equal(mixed[:, rows], drawn(repeats=repeat)[:, rows])


def test_fewer_draws_are_the_first_of_more() -> None:
    whole = uniforms(HASHES, 7, 10)
    for num in (1, 6, 9):
        np.testing.assert_array_equal(uniforms(HASHES, 7, num), whole[:num])


def test_uniform_numbers_are_uniform_and_independent() -> None:
    keys = np.arange(20_000)  # the worst case: neighbouring keys
    draws = uniforms(keys, 99, 10)
    assert draws.min() >= 0
    assert draws.max() < 1
    for row in draws:
        counts = np.histogram(row, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 96  # 49 degrees of freedom, 1 in 10,000
    correlations = np.corrcoef(np.vstack([draws, np.roll(draws, 1, axis=1)]))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(len(keys))
