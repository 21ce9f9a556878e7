"""What a run leaves to look at: at its start of the initial weights, at its end of the last ones.

They are made by the first process alone. None of it moves a random state or the weights: a run
without pictures ends with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pretrain.config import PretrainConfig
from pretrain.data.input_pipeline import Feed
from pretrain.data.mixture import Samples
from pretrain.evaluation import feature_map
from pretrain.evaluation.pictures import AFTER, BEFORE, save_neighbours, save_views
from pretrain.evaluation.probe import Probe

NAMES = (
    feature_map.NAME,
    *(f"pictures/{name}.{kind}" for name in ("views", BEFORE, AFTER) for kind in ("jpg", "json")),
)  # fmt: skip


@dataclass(frozen=True)
class RunPictures:
    """Views, galleries of neighbours before and after, and a picture of the features.

    Attributes:
        folder: Of the run.
        config: Whole; ``eval.num_pictures`` and ``eval.num_map_points`` say how much there is.
        samples: Training pictures; None of a stream.
        probe: Labelled sets, or None: then there is no map.
        device: Where the network is.
    """

    folder: Path
    config: PretrainConfig
    samples: Samples | None
    probe: Probe | None
    device: torch.device

    def at_start(self, backbone: nn.Module, feed: Feed) -> None:
        """Before the first step, never of a run that goes on: its weights have been trained.

        What an earlier run left in the folder goes, so that nothing is taken for this run's.
        """
        for name in NAMES:
            (self.folder / name).unlink(missing_ok=True)
        num = self.config.eval.num_pictures
        if not num:
            return
        first = feed.first_batch()
        save_views(
            self.folder, self.samples, first.batch.sample_ids, first.views,
            min(num, self.config.data.batch_size), self.config.data,
        )  # fmt: skip
        self._neighbours(backbone, BEFORE)

    def at_end(self, backbone: nn.Module) -> None:
        """After the last step, again if a finished run is resumed."""
        if not self.config.eval.num_pictures:
            return
        self._neighbours(backbone, AFTER)
        num_points = self.config.eval.num_map_points
        if self.probe is not None and num_points:
            feature_map.save_map(self.folder, backbone, self.probe, num_points, self.config.seed)

    def _neighbours(self, backbone: nn.Module, name: str) -> None:
        num = self.config.eval.num_pictures
        save_neighbours(
            self.folder, backbone, self.samples, self.probe, num, self.device, self.config.data,
            name=name,
        )  # fmt: skip
