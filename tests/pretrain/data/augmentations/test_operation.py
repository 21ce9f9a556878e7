"""Rules that hold for every registered operation."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from pretrain.data.augmentations.grey import Grey
from pretrain.data.augmentations.operation import Operation
from tests.pretrain.data.augmentations.ways import NOISE, PICTURES

NAMES = Operation.registry.names()


def drawn_of(operation: Operation, num: int = 30) -> dict[str, np.ndarray]:
    return operation.draw(np.random.default_rng(5).random((operation.num_draws, num)))


def test_streams_of_random_numbers_do_not_overlap() -> None:
    draws = []
    for name in NAMES:
        operation = Operation.registry[name]()
        purpose, first = operation.stream
        draws += [(purpose, first + i) for i in range(operation.num_draws)]
    assert len(set(draws)) == len(draws)

    class New(Grey):
        first_draw = None

    assert New().stream == ("augment:test_operation", 0)  # a stream of the module's name
    positions = [Operation.registry[name].position for name in NAMES]
    assert len(set(positions)) == len(positions)


@pytest.mark.parametrize("name", NAMES)
def test_probability_decides_and_both_ways_agree(name: str) -> None:
    images = np.stack([PICTURES[i % 4] for i in range(30)])
    for probability in (0.0, 0.5, 1.0):
        operation = Operation.registry[name](probability=probability)
        drawn = drawn_of(operation)
        assert all(v.dtype == np.float32 and v.shape == (30,) for v in drawn.values())
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        operation.change_batch(batch, drawn)
        batched = batch.permute(0, 2, 3, 1).numpy() * 255
        single = images.copy()
        for picture, steps in zip(single, operation.picture_steps(drawn, 64), strict=True):
            for step in steps:
                step(picture)
        assert np.abs(batched - single).mean() < 1.5
        share = np.mean([(a != b).any() for a, b in zip(single, images, strict=True)])
        assert abs(share - probability) <= (0.3 if probability == 0.5 else 0.15)
        assert probability or share == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_know_its_batch(name: str) -> None:
    operation = Operation.registry[name](probability=0.7)
    drawn = drawn_of(operation)
    steps = operation.picture_steps(drawn, len(NOISE))
    batch = torch.rand(30, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    whole = batch.clone()
    operation.change_batch(whole, drawn)
    memory = np.stack([NOISE] * 3)  # neighbours in memory are left alone
    for rows in ([3], [5, 1, 17]):
        own = {key: values[rows] for key, values in drawn.items()}
        part = batch[rows].clone()
        operation.change_batch(part, own)
        torch.testing.assert_close(part, whole[rows], atol=1e-6, rtol=0)
        for row, alone in zip(rows, operation.picture_steps(own, len(NOISE)), strict=True):
            memory[:] = NOISE
            expected = NOISE.copy()
            for one, other in zip(alone, steps[row], strict=True):
                one(memory[1])
                other(expected)
            np.testing.assert_array_equal(memory, [NOISE, expected, NOISE])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_impossible_probability(name: str, probability: float) -> None:
    with pytest.raises(UserError, match=rf"{name}\.probability must be in \[0, 1\], got"):
        Operation.registry[name](probability=probability)
