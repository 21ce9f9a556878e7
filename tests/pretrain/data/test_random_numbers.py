from typing import Any

import numpy as np
import pytest

from pretrain.data.random_numbers import counter_rng, draw_uniforms, stable_hash, uniforms


def test_generator_keeps_its_values_from_version_to_version() -> None:
    assert stable_hash("order", 1, 2).hex() == "88a4a6cb4cb599d07316e91da6da797e"
    assert counter_rng("order", 1, 2).integers(0, 10**6, 3).tolist() == [895967, 223312, 452357]


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


def test_a_draw_can_be_made_alone() -> None:
    whole = uniforms(HASHES, 7, 10)
    for first, num in ((0, 6), (6, 1), (7, 2), (9, 1)):
        np.testing.assert_array_equal(uniforms(HASHES, 7, num, first), whole[first : first + num])


def test_draws_keep_their_values_from_version_to_version() -> None:
    values = uniforms(np.array([0, -1, 2**62]), 12345, 2)
    np.testing.assert_allclose(
        values,
        [
            [0.4988858903732927, 0.8667438760137676, 0.2750324310396237],
            [0.4581311898914051, 0.241001349737475, 0.5160745385112253],
        ],
        rtol=0,
        atol=1e-15,
    )


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
