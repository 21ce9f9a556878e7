"""A study's stage on a real SLURM of this machine: preempted, queued again, the same figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.pipeline.test_study import write_study
from tests.slurm.test_slurm import PATIENCE, cluster  # noqa: F401  (a fixture)
from tests.slurm.tiny_run import ROOT, last_step, run_undisturbed, wait_until, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("REQUIRE_SLURM") != "1",
        reason="starts a SLURM, as root (apt-get install slurm-wlm munge): asked for with "
        "REQUIRE_SLURM=1",
    ),
]


def test_a_preempted_stage_is_queued_again(cluster: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    config = write_config(tmp_path, optim={"epochs": 12}, eval={"knn_every_epochs": 12})
    words = write_study(tmp_path, tmp_path / "shards", yaml.safe_load(config.read_text()))
    command = [sys.executable, str(ROOT / "tools/ablate.py"), *words, "--only", "none",
               "--cluster", "slurm", "--cpus-per-run", "2"]  # fmt: skip
    out = tmp_path / "out"
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(command, env=cluster, stdout=log, stderr=log)

    def run() -> Path:
        return next(iter(out.glob("pretrain/*/seed-0")), out)

    def is_training() -> bool:
        assert program.poll() is None, (tmp_path / "log").read_text()
        return last_step(run()) >= 3

    wait_until(is_training, PATIENCE, "the third step")
    (job,) = (path.name for path in (out / "submitit").iterdir() if path.name.isdigit())
    subprocess.run(["scancel", "--signal=USR1", job], env=cluster, check=True)
    assert program.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    shown = subprocess.run(
        ["scontrol", "show", "job", job], env=cluster, capture_output=True, text=True, check=True
    )
    assert re.search(r"Restarts=(\d+)", shown.stdout)[1] == "1"
    log_text = next(iter(out.glob("logs/pretrain/*/seed-0.log"))).read_text()
    # SLURM signals the command as well as the job, which passes SIGTERM on: one request.
    assert len(re.findall(r"stopped by SIG(?:TERM|USR1) after step", log_text)) == 1, log_text
    (table,) = json.loads((out / "results.json").read_text())["tables"]
    figures = {row["label"]: row["values"] for row in table["rows"]}
    calm = run_undisturbed(config, tmp_path / "calm", "fa.method=none", "seed=0", num_processes=1)
    knn = json.loads((calm / "summary.json").read_text())["knn_top1"]
    assert figures["none"] == {"0": 100 * knn}
