"""docs/quickstart.ipynb: its form, and every cell in order in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
OUT = 'OUT = ROOT / "runs/quickstart"'


def test_the_notebook_is_plain_python_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) <= 14
    for cell in NOTEBOOK["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    compile("\n".join(CODE), "quickstart", "exec")  # no ! and no %
    assert "".join(CODE).count(OUT) == 1, "the folder is named once"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    out = tmp_path / "quick"
    cells = [f"{text}\nprint('cell', {i})" for i, text in enumerate(CODE)]
    program = "\n".join([*cells, "print('features', *features.shape)"])
    done = subprocess.run(
        [sys.executable, "-c", program.replace(OUT, f"OUT = Path({str(out)!r})")],
        capture_output=True, text=True, cwd=ROOT / "docs",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("cell ")] == [
        f"cell {i}" for i in range(len(CODE))
    ]
    assert "features 96 512" in lines
    assert (out / "pretrain/checkpoint.pth").is_file()
    assert (out / "detector/seed-0/model_final.pth").is_file()
    for name in ("labels.jpg", "run.png", "neighbours.png", "boxes.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 50
