"""Detectron2's checkpointer reads .pkl files with the restricted reader, or not at all."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from detection import compat


def test_missing_detectron2_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; run `bash tools/setup\.sh`"):
        compat.require_detectron2()


def checkpointer() -> tuple[Any, torch.nn.Linear]:
    from detectron2.checkpoint import DetectionCheckpointer

    model = torch.nn.Linear(2, 2)
    return DetectionCheckpointer(model), model


def test_checkpointer_reads_a_pkl_and_runs_nothing_from_it(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (tmp_path / "made").mkdir, ()

    path = tmp_path / "weights.pkl"
    state = {"weight": np.full((2, 2), 3, np.float32), "bias": np.zeros(2, np.float32)}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "test", "trap": Trap()}))
    reader, model = checkpointer()
    reader.load(str(path))
    assert model.weight.tolist() == [[3, 3], [3, 3]]
    assert not (tmp_path / "made").exists()


def test_unknown_checkpointer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.checkpoint import detection_checkpoint

    monkeypatch.delattr(detection_checkpoint, "pickle")
    with pytest.raises(UserError, match="does not know"):
        compat.patch_safe_pickle()
