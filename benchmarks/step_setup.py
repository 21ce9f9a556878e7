"""What the benchmarks of a training step start from: shards, and a run of the engine on them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.fa_overhead import Sizes
from benchmarks.pictures import encoded_photos, open_as_shards, write_files
from common.config import to_plain
from pretrain.config import (
    DataConfig,
    EngineConfig,
    EvalConfig,
    FAConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    load_config,
)
from pretrain.engine.train import Run

CPU_SIZES = Sizes(batch_size=32)
BATCHES_PER_EPOCH = 8
_NUM_PHOTOS, _NEVER = 16, 1 << 40


def make_shards(folder: Path, batch_size: int) -> Path:
    """Shards of generated photographs, 500 x 375, some batches of them."""
    files = write_files(encoded_photos(_NUM_PHOTOS), folder / "files")
    open_as_shards(files, folder / "shards", BATCHES_PER_EPOCH * batch_size).close()
    return folder / "shards"


def build_run(
    folder: Path, sizes: Sizes, device: str, num_workers: int, settings: Sequence[str] = ()
) -> Run:
    """A run of plain BYOL that never saves, probes or draws pictures.

    Args:
        folder: Holds ``shards``; the run gets a folder of its own there.
        sizes: Of the networks and the batch.
        device: ``auto``, ``cpu`` or ``cuda``.
        num_workers: Of the loader.
        settings: ``key=value`` overrides of the config, e.g. ``fa.method=nn``.
    Raises:
        UserError: If a setting is refused.
    """
    kind: Any = device
    number = sum(1 for _ in folder.glob("run-*"))
    config = PretrainConfig(
        out=str(folder / f"run-{number}"),
        arch=sizes.arch(),
        heads=sizes.heads(),
        data=DataConfig(
            shards=str(folder / "shards"), image_size=sizes.image_size,
            batch_size=sizes.batch_size, num_workers=num_workers, shuffle_window=4096,
        ),
        objective=ObjectiveConfig(name="byol"),
        fa=FAConfig(method="none"),
        optim=OptimConfig(epochs=100_000),
        engine=EngineConfig(
            device=kind, checkpoint_every_steps=_NEVER, log_every_steps=50, watchdog_seconds=0,
        ),
        eval=EvalConfig(num_pictures=0),
    )  # fmt: skip
    path = folder / f"run-{number}.yaml"
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    return Run(load_config(path, settings), resume=False)


def random_views(sizes: Sizes, device: torch.device) -> torch.Tensor:
    """[2, n, 3, s, s], normal, seeded: as normalised pictures would be."""
    shape = (2, sizes.batch_size, 3, sizes.image_size, sizes.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def with_sizes(sizes: Sizes, given: dict[str, Any]) -> Sizes:
    """The sizes that were given on the command line, the others as they are."""
    return replace(sizes, **{name: value for name, value in given.items() if value is not None})
