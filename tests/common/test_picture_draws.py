"""Draws of pictures, intervals from them, and the file between evaluation and report."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.picture_draws import (
    METRICS,
    NUM_DRAWS,
    draw_pictures,
    interval,
    read_draws,
    write_draws,
)


def test_pictures_are_drawn_with_replacement_and_always_the_same() -> None:
    counts = draw_pictures(40)
    assert counts.shape == (NUM_DRAWS, 40)
    assert (counts.sum(axis=1) == 40).all()
    # Poisson with mean 1, nearly: a picture is left out with probability (39/40)^40 = 0.363.
    assert (counts == 0).mean() == pytest.approx(0.363, abs=0.01)
    assert counts.mean(axis=0) == pytest.approx(np.ones(40), abs=0.15)
    raw = (11749869230777074271, 4976686463289251617, 755828109848996024)  # PCG64's, seed 0
    assert draw_pictures(3)[0].tolist() == [[n % 3 for n in raw].count(i) for i in range(3)]
    assert draw_pictures(1).shape == (0, 1)


def test_the_interval_of_a_mean_is_that_of_the_bootstrap() -> None:
    """Two models on the same pictures: the interval is of their mean, and pairs what they share."""
    generator = np.random.default_rng(1)
    first = generator.normal(50, 8, 400)
    second = first + 2 + generator.normal(0, 1, 400)
    counts = draw_pictures(400) / 400
    figures = [counts @ first, counts @ second]
    low, high = interval(figures) or []
    middle, half = (first + second).mean() / 2, 1.96 * 8 / 20
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.1)
    low, high = interval([figures[1] - figures[0]]) or []
    assert (low, high) == pytest.approx((2 - 1.96 / 20, 2 + 1.96 / 20), abs=0.1)
    figures[0][:100] = np.nan  # left out
    assert interval(figures) == interval([values[100:] for values in figures])
    assert interval([np.full(NUM_DRAWS, np.nan)]) is None
    assert interval([]) is None


def test_draws_are_read_for_their_own_result_only(tmp_path: Path) -> None:
    path = tmp_path / "eval-on-x-draws.json"
    result = {"data_sha256": "d", "model_sha256": "m", "num_test_images": 3}
    draws = {metric: np.arange(NUM_DRAWS) / 7 for metric in METRICS}
    draws["AP75"][5] = np.nan
    assert read_draws(path, result) is None
    write_draws(path, draws, result)
    found = read_draws(path, result)
    assert found is not None
    for metric in METRICS:
        np.testing.assert_array_equal(found[metric], draws[metric])
    for other in ({"model_sha256": "n"}, {"data_sha256": None}, {"num_test_images": 4}):
        assert read_draws(path, result | other) is None
    content = json.loads(path.read_text())
    for change in ({"AP": [1.0]}, {"AP": ["x"] * NUM_DRAWS}, {"AP": None}, {"format": "other"}):
        path.write_text(json.dumps(content | change))
        assert read_draws(path, result) is None
