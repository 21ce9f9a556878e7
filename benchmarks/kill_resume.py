"""Kill a run with SIGKILL at random moments, resume it, compare it bit for bit with a whole one.

Two processes under torchrun train a small BYOL with nearest-neighbour FA on generated pictures.
Each trial starts anew, is killed with all its processes in one of three phases (between steps,
while a checkpoint is written, in the kNN probe), is resumed, and must end with the same loss at
every step and the same weights, EMA, optimiser state and queue as a run that nobody disturbed.

Example:
  .venv/bin/python benchmarks/kill_resume.py --kills 20 --json kill.json
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

from benchmarks import harness
from common.checkpoints import checksum
from common.errors import RunFailed
from common.files import read_json_lines
from pretrain.data.pack import write_shards
from pretrain.data.pack_plan import ShardOptions, SourcePicture
from pretrain.engine import checkpoint

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("training", "checkpoint", "evaluation")
NUM_PICTURES, BATCH, EPOCHS = 96, 16, 4
STEPS_PER_EPOCH = NUM_PICTURES // BATCH
COMPARED = ("model", "ema", "optimizer", "queue", "negatives", "schedule", "position")
TIME_LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Trial:
    """What one kill came to."""

    phase: str
    killed_after_step: int
    resumed: bool
    identical: bool


def config() -> dict[str, Any]:
    """A run of seconds that has everything a checkpoint must hold."""
    return {
        "arch": {"depth": 50, "width_per_group": 8, "stem_channels": 8, "res2_channels": 32},
        "data": {"image_size": 32, "batch_size": BATCH, "num_workers": 1, "shuffle_window": 32},
        "heads": {"projector_hidden_dim": 64, "predictor_hidden_dim": 64, "output_dim": 32},
        "objective": {"name": "byol"},
        "fa": {"method": "nn", "queue_size": 48, "min_fill": 16},
        "optim": {"name": "lars", "epochs": EPOCHS, "base_lr": 1.0, "warmup_epochs": 1.0},
        "engine": {
            "device": "cpu", "precision": "fp32", "log_every_steps": 1, "num_threads": 1,
            "checkpoint_every_steps": 2,
        },
        "eval": {"knn_every_epochs": 1, "knn_k": 5, "num_pictures": 2},
    }  # fmt: skip


def make_shards(folder: Path) -> Path:
    """Labelled pictures of two kinds of soft structure."""
    pictures = []
    for i in range(NUM_PICTURES):
        coarse = np.random.default_rng(i).integers(0, 256, (4 + 4 * (i % 2), 6, 3), dtype=np.uint8)
        path = folder / f"{i:03d}.png"
        cv2.imwrite(str(path), cv2.resize(coarse, (48, 40), interpolation=cv2.INTER_CUBIC))
        pictures.append(SourcePicture(str(path), path.name, i % 2))
    options = ShardOptions(max_samples_per_shard=20)
    write_shards(pictures, folder / "shards", options=options, classes=["even", "odd"])
    return folder / "shards"


class Job:
    """A run under torchrun with all the processes that it started."""

    def __init__(self, config_path: Path, shards: Path, out: Path, *, resume: bool) -> None:
        self.out = out
        self.log = out.with_suffix(".log")
        arguments = [f"out={out}", f"data.shards={shards}", f"eval.probe_train={shards}",
                     f"eval.probe_val={shards}", *(["--resume"] if resume else [])]  # fmt: skip
        with open(self.log, "a") as stream:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "tools" / "pretrain.sh"), str(config_path), *arguments],
                env=os.environ | {"NPROC": "2", "OMP_NUM_THREADS": "1"},
                stdout=stream, stderr=stream, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL to every process of the run at once, torchrun's children included."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def last_step(self) -> int:
        """The last step in the log of the run."""
        rows = read_json_lines(self.out / "metrics.jsonl")
        return max((row["step"] for row in rows if row["kind"] == "train"), default=0)

    def wait(self) -> bool:
        """Until the run has ended; true if it ended well."""
        try:
            return self.process.wait(TIME_LIMIT_SECONDS) == 0
        except subprocess.TimeoutExpired:
            self.kill()
            return False


def descendants(pid: int) -> list[int]:
    """A process and all below it, from the top."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def wait_for_moment(job: Job, phase: str, moment: random.Random) -> bool:
    """Return in the middle of the phase; false if the run has ended before."""
    step = moment.randrange(1, EPOCHS * STEPS_PER_EPOCH - 2)
    if phase == "evaluation":
        step = STEPS_PER_EPOCH * moment.randrange(1, EPOCHS)
    while job.last_step() < step:
        if job.process.poll() is not None:
            return False
        time.sleep(0.005)
    if phase == "checkpoint":
        while not list(job.out.glob("checkpoint.pth.*.partial")):
            if job.process.poll() is not None:
                return False
    else:
        time.sleep(moment.uniform(0.0, 0.15))
    return job.process.poll() is None


def identical(one: Path, other: Path) -> bool:
    """Whether two runs ended in the same state after the same losses, bit for bit."""
    states, curves = [], []
    for folder in (one, other):
        state = checkpoint.load(folder / "checkpoint.pth")
        state["position"].pop("train_seconds")
        states.append(state)
        rows = read_json_lines(folder / "metrics.jsonl")
        curves.append([(row["step"], row["loss"]) for row in rows if row["kind"] == "train"])
    return curves[0] == curves[1] and all(
        checksum({"part": states[0][part]}) == checksum({"part": states[1][part]})
        for part in COMPARED
    )


def trial(number: int, seed: int, scratch: Path, config_path: Path, shards: Path) -> Trial:
    """One run: started, killed, resumed, compared with the whole one."""
    moment = random.Random(f"{seed} {number}")
    phase = PHASES[number % len(PHASES)]
    for attempt in range(5):  # a run may be faster than the look at it
        out = scratch / f"trial-{number}-{attempt}"
        job = Job(config_path, shards, out, resume=False)
        if wait_for_moment(job, phase, moment):
            job.kill()
            break
        job.wait()
    else:
        raise RuntimeError(f"five runs ended before they could be killed: see {job.log}")
    step = job.last_step()
    resumed = Job(config_path, shards, out, resume=True).wait()
    return Trial(phase, step, resumed, resumed and identical(scratch / "whole", out))


def run(num_kills: int, seed: int) -> dict[str, Any]:
    """Kill and compare; the figures for JSON.

    Raises:
        RunFailed: If the run that nobody disturbs fails.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shards = make_shards(scratch)
        config_path = scratch / "config.yaml"
        config_path.write_text(yaml.safe_dump(config()))
        whole = Job(config_path, shards, scratch / "whole", resume=False)
        if not whole.wait():
            raise RunFailed(f"the undisturbed run failed:\n{whole.log.read_text()}")
        trials = []
        for number in range(num_kills):
            trials.append(trial(number, seed, scratch, config_path, shards))
            print(f"{number + 1:3d}  {trials[-1]}", flush=True)
    return {
        "kills": len(trials),
        "resumed": sum(t.resumed for t in trials),
        "identical": sum(t.identical for t in trials),
        "trials": [asdict(t) for t in trials],
        "seconds": time.monotonic() - started,
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 also if a run was not identical."""
    counts = (("kills", 20, 1, "runs that are killed"), ("seed", 0, 0, "of the moments"))
    options = harness.make_parser(__doc__, counts).parse_args(arguments)
    return harness.run_and_report(
        lambda: run(options.kills, options.seed),
        options.json,
        is_success=lambda figures: figures["identical"] == figures["kills"],
    )


if __name__ == "__main__":
    sys.exit(main())
