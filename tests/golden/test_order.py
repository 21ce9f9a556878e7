"""Golden gate: the order of samples over two epochs, for every number of ranks and every resume."""

import itertools

import numpy as np
import pytest

from pretrain.data.loader import Loader, RequestSampler, ViewDataset
from pretrain.data.order import LastBatch, SourceSizes
from pretrain.data.policy import AugmentationPolicy
from pretrain.data.shards import open_samples
from tests.golden.gate import check, digest
from tests.golden.pictures import pixels, png, write_tar

SEED = 11
SMALL = SourceSizes([10, 7, 13, 10])  # 40
MIDDLE = SourceSizes([97 + 13 * i % 71 for i in range(40)])  # about 5,000
LARGE = SourceSizes([1000] * 1281 + [167])  # as many as ImageNet-1k's training set
SOURCES = {
    "small": ([SMALL], 12, 1024),
    "middle": ([MIDDLE], 96, 500),
    "large": ([LARGE], 3072, 16384),
    "mixture of 1, 2.5, 0.3": (
        [SMALL, SourceSizes([9, 9, 9], 2.5), SourceSizes([500, 311], 0.3)], 12, 64,
    ),
    "mixture of equal weights": ([MIDDLE, SMALL], 24, 256),
}  # fmt: skip


def epochs_of(
    name: str, *, rank: int = 0, world_size: int = 1, last_batch: LastBatch = "drop",
    start: tuple[int, int] = (0, 0),
) -> list[np.ndarray]:  # fmt: skip
    """int64 [steps, 2, batch of the rank] for epochs 0 and 1: numbers and repeats of the samples.

    `start` is the epoch and step that a resumed run begins with.
    """
    sources, batch_size, window = SOURCES[name]
    sampler = RequestSampler(
        sources=sources, seed=SEED, batch_size=batch_size, rank=rank, world_size=world_size,
        window=window, last_batch=last_batch,
    )  # fmt: skip
    epochs = []
    for epoch in range(start[0], 2):
        sampler.epoch, sampler.start_step = epoch, start[1] if epoch == start[0] else 0
        requests = [np.stack([one.sample_ids, one.repeats]) for one in sampler]
        epochs.append(np.array(requests, dtype="<i8"))
    return epochs


@pytest.mark.parametrize("last_batch", ["drop", "pad"])
@pytest.mark.parametrize("name", SOURCES)
def test_order(name: str, last_batch: LastBatch) -> None:
    whole = epochs_of(name, last_batch=last_batch)
    measured = {
        f"epoch {number}": {
            "steps": len(epoch),
            "numbers": digest(epoch[:, 0].tobytes()),
            "visits": digest(epoch[:, 1].tobytes()),
            "first numbers": epoch[:, 0].ravel()[:20].tolist(),
            "last numbers": epoch[:, 0].ravel()[-20:].tolist(),
            "last visits": epoch[:, 1].ravel()[-20:].tolist(),
        }
        for number, epoch in enumerate(whole)
    }
    check(f"order_{name.replace(' ', '_').replace(',', '')}_{last_batch}", measured)

    for world_size in (3, 4):
        ranks = [
            epochs_of(name, rank=rank, world_size=world_size, last_batch=last_batch)
            for rank in range(world_size)
        ]
        for number, epoch in enumerate(whole):
            joined = np.concatenate([own[number] for own in ranks], axis=2)
            np.testing.assert_array_equal(joined, epoch)

    middle = len(whole[0]) // 2
    resumed = epochs_of(
        name, rank=1, world_size=3, last_batch=last_batch, start=(0, middle)
    )  # with another number of ranks, too
    share = whole[0].shape[2] // 3
    np.testing.assert_array_equal(resumed[0], whole[0][middle:, :, share : 2 * share])
    np.testing.assert_array_equal(resumed[1], whole[1][:, :, share : 2 * share])


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tars of 18 and 10 pictures."""
    folders = []
    for number, num in enumerate((18, 10)):
        folder = tmp_path_factory.mktemp(f"set-{number}")
        names = [f"picture-{i:02d}" for i in range(num)]
        data = {f"{name}.png": png(pixels(i, 24, 24)) for i, name in enumerate(names)}
        write_tar(folder / "first.tar", dict(list(data.items())[:7]))
        write_tar(folder / "second.tar", dict(list(data.items())[7:]))
        folders.append(str(folder))
    return folders


def test_batches_of_the_loader(two_sets: list[str]) -> None:
    """The loader follows that order: numbers and keys, over ranks, after a resume."""

    def batches(rank: int, world_size: int, epoch: int, start_step: int = 0) -> list[list]:
        samples = open_samples({two_sets[0]: 1.0, two_sets[1]: 1.5})
        dataset = ViewDataset(
            samples, image_size=16, views=AugmentationPolicy.of("crops").views, seed=SEED
        )
        loader = Loader(
            dataset, batch_size=12, rank=rank, world_size=world_size, shuffle_window=16,
            last_batch="pad",
        )  # fmt: skip
        made = loader.epoch(epoch, start_step)
        return [[b.sample_ids.tolist(), b.repeats.tolist(), b.sample_hashes.tolist()] for b in made]

    measured = {}
    for epoch in (0, 1):
        whole = batches(0, 1, epoch)
        measured[f"epoch {epoch}"] = [
            {"numbers": numbers, "visits": repeats, "keys": keys}
            for numbers, repeats, keys in whole
        ]
        for world_size in (3, 4):
            ranks = [batches(rank, world_size, epoch) for rank in range(world_size)]
            for step, batch in enumerate(whole):
                parts = zip(*(own[step] for own in ranks), strict=True)
                assert [[*itertools.chain(*part)] for part in parts] == batch
        assert batches(0, 1, epoch, start_step=2) == whole[2:]
    check("order_of_the_loader", measured)
