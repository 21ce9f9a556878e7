"""Two programs in one folder: the second is told who is there, before it looks or writes."""

import os
from pathlib import Path

import pytest
import yaml

from common import files
from common.resnet import Arch
from pretrain import __main__ as pretrain
from tests.detection.tiny_weights import our_checkpoint, save, torchvision_state
from tests.locks import holding
from tests.pretrain.engine.run_helpers import SMALL
from tools import convert_to_d2, linear_eval, make_dataset, make_shards


def words_of(program, folder: Path) -> list[str]:
    """A call that works on ``folder/out``."""
    out = str(folder / "out")
    if program is pretrain:
        (folder / "tiny.yaml").write_text(yaml.safe_dump(SMALL))
        return [str(folder / "tiny.yaml"), f"out={out}", f"data.shards={folder}"]
    if program is convert_to_d2:
        arch = Arch(18, 8, 8, 8)
        save(our_checkpoint(torchvision_state(arch, 1), arch), folder / "in.pth")
        return [str(folder / "in.pth"), f"{out}/backbone.pkl", "--preprocessing", "half"]
    if program is make_shards:
        (folder / "pictures").mkdir()
        (folder / "pictures/a.png").touch()
        return [str(folder / "pictures"), out, "--num-workers", "0"]
    if program is make_dataset:
        return ["procedural", out]
    return ["x.pth", "--train", "t", "--val", "v", "--out", out]


@pytest.mark.parametrize(
    ("program", "lock", "kind"),
    # Held by the other kind of lock than the program takes: as by a pipeline in a run's folder.
    [(pretrain, "out/.lock", "file"), (linear_eval, "out/.lock", "file"),
     (convert_to_d2, "out/backbone.pkl.lock", "file"), (make_shards, "out/.lock", "process"),
     (make_dataset, "out.lock", "process")],
)  # fmt: skip
def test_the_second_program_is_told_who_holds_the_folder(
    tmp_path, monkeypatch, capsys, program, lock, kind
):
    monkeypatch.setattr(files, "HOLD_SECONDS", 0.2)
    monkeypatch.setattr("pipeline.datasets.sets.LOCK_WAIT_SECONDS", 0.2)
    (tmp_path / "out").mkdir()
    words = words_of(program, tmp_path)
    with holding(tmp_path / lock, kind) as other:
        assert program.main(words) == 2
        message = capsys.readouterr().err
        assert f": process {other.pid} on " in message
        assert "is at work here since 2" in message
        other.kill()
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == ([Path(lock).name] if lock.startswith("out/") else [])
    assert files.lock_file(os.open(tmp_path / lock, os.O_RDWR), tmp_path), "free at once"
