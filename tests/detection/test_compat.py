"""Each patch is needed where it acts, does nothing elsewhere, and the guards hold."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common import checkpoints
from common.errors import UserError
from detection import compat


@pytest.fixture
def fake_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the patches take for the installed package."""
    monkeypatch.setattr(compat, "require_detectron2", lambda: tmp_path)
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_patches_are_installed_once_and_named() -> None:
    assert "safe-pickle" in compat.install_patches()
    assert compat.install_patches() == compat.install_patches()
    assert all(patch.__doc__ for patch in compat.PATCHES.values())


def test_missing_detectron2_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; run `bash tools/setup\.sh`"):
        compat.require_detectron2()


def test_compiled_operators_are_seen(fake_detectron2: Path) -> None:
    assert not compat.has_compiled_operators()
    write(fake_detectron2, "_C.cpython-311-x86_64-linux-gnu.so", "")
    assert compat.has_compiled_operators()


def test_pillow_linear_is_mended_only_for_old_sources(
    fake_detectron2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Image, "LINEAR", raising=False)
    assert not compat.patch_pillow_linear()  # no such file
    write(fake_detectron2, "data/transforms/transform.py", "x = Image.BILINEAR")
    assert not compat.patch_pillow_linear()
    assert not hasattr(Image, "LINEAR")
    write(fake_detectron2, "data/transforms/transform.py", "x = Image.LINEAR")
    monkeypatch.setattr(Image, "LINEAR", None, raising=False)
    assert not compat.patch_pillow_linear()  # an old Pillow still has it
    monkeypatch.delattr(Image, "LINEAR")
    assert compat.patch_pillow_linear()
    assert getattr(Image, "LINEAR", None) == Image.Resampling.BILINEAR
    monkeypatch.delattr(Image, "LINEAR")


def test_numpy_aliases_are_mended_only_for_old_sources(
    fake_detectron2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(fake_detectron2, "data/datasets/pascal_voc.py", "np.loadtxt(f, dtype=str)")
    assert not compat.patch_numpy_aliases()
    write(fake_detectron2, "data/datasets/pascal_voc.py", "np.loadtxt(f, dtype=np.str)")
    assert compat.patch_numpy_aliases()
    assert getattr(np, "str", None) is str
    assert not compat.patch_numpy_aliases()
    monkeypatch.delattr(np, "str")


def checkpointer() -> tuple[Any, torch.nn.Linear]:
    from detectron2.checkpoint import DetectionCheckpointer

    model = torch.nn.Linear(2, 2)
    return DetectionCheckpointer(model), model


def test_checkpointer_reads_plain_pkl(tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    state = {"weight": np.full((2, 2), 3, np.float32), "bias": np.zeros(2, np.float32)}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "test"}))
    reader, model = checkpointer()
    reader.load(str(path))
    assert model.weight.tolist() == [[3, 3], [3, 3]]


def test_checkpointer_runs_nothing_from_a_pkl(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (tmp_path / "made").mkdir, ()

    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {}, "__author__": "test", "trap": Trap()}))
    checkpointer()[0].load(str(path))
    assert not (tmp_path / "made").exists()


def test_damaged_pkl_is_a_user_error_in_the_checkpointer(tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"weights\.pkl: not a readable pickle"):
        checkpointer()[0].load(str(path))


def test_unknown_checkpointer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.checkpoint import detection_checkpoint

    monkeypatch.delattr(detection_checkpoint, "pickle")
    with pytest.raises(UserError, match="does not know"):
        compat.patch_safe_pickle()


def test_unmended_checkpointer_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.checkpoint import detection_checkpoint

    monkeypatch.setattr(detection_checkpoint, "pickle", pickle)
    assert compat.patch_safe_pickle()
    assert detection_checkpoint.__dict__["pickle"].load is checkpoints.load
