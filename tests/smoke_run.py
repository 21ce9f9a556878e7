"""A finished run of the smoke pipeline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_smoke_run(out: Path) -> Path:
    """The run that FA_SMOKE_RUN names, as .ci/run has just made it, copied; or one of its own.

    Not through run_pipeline.sh, which may install something first.
    """
    if given := os.environ.get("FA_SMOKE_RUN"):
        return Path(shutil.copytree(given, out))
    command = [sys.executable, str(ROOT / "tools/run_pipeline.py"), "smoke", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out
