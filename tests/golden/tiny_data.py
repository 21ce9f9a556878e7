"""Small shard sets whose pictures are the same everywhere."""

from pathlib import Path

import cv2
import numpy as np

from tools.make_shards import main as make_shards

CLASSES = ("blue", "green", "red")
CLASS_SHARE = 0.25  # how much of a picture its class decides: neither all nor none is recognised


def labelled_shards(folder: Path, *, num: int, seed: int) -> Path:
    """Pack `num` pictures of three classes, by tools/make_shards.py, 10 in a tar."""
    random = np.random.default_rng(seed)
    for i in range(num):
        height, width = 40 + i % 20, 60 - i % 20
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
        colour = np.eye(3)[i % 3] * 255
        picture = (1 - CLASS_SHARE) * picture + CLASS_SHARE * colour
        path = folder / "pictures" / CLASSES[i % 3] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), picture.round().astype(np.uint8))
    shards = folder / "shards"
    options = ["--max-samples-per-shard", "10", "--num-workers", "1"]
    assert make_shards([str(folder / "pictures"), str(shards), *options]) == 0
    return shards
