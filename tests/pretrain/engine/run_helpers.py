"""What tests of whole runs share."""

from pathlib import Path

import torch

import tests.pretrain.model.two_layers  # noqa: F401  a name that configs may say
from common.files import read_json_lines
from pretrain.engine.trainer import Trainer

ROOT = Path(__file__).parents[3]

TINY = {
    "arch": {"depth": 18, "width_per_group": 8, "stem_channels": 8, "res2_channels": 8},
    "data": {"image_size": 32, "batch_size": 8, "num_workers": 0},
    "heads": {"projector_hidden_dim": 24, "predictor_hidden_dim": 24, "output_dim": 12},
    "objective": {"name": "infonce"},
    "fa": {"method": "nn", "queue_size": 32, "min_fill": 16},
    "optim": {"name": "adamw", "epochs": 2, "base_lr": 0.05, "warmup_epochs": 0.5},
    "engine": {
        "device": "cpu",
        "precision": "fp32",
        "log_every_steps": 1,
        "checkpoint_every_steps": 100,
        "num_threads": 1,
    },
    "eval": {"num_pictures": 0, "knn_k": 5},
}  # fmt: skip; a run of a few seconds
SMALL = TINY | {
    "objective": {"name": "byol"},
    "optim": TINY["optim"] | {"name": "lars"},
    "engine": TINY["engine"] | {"watchdog_seconds": 0},
}
"""BYOL, whose single steps may be taken, since no timer is started."""
LIGHT = {"arch": {"name": "two_layers"}}
"""In place of their ResNet, for what does not depend on the network: a fifth of the time."""


def assert_same_state(a, b, where=""):
    """Equal bit for bit, through dicts and lists; `where` says in which part they differ."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def one_step(run, *, is_logged=False):
    """The next step of the run's task on the first batch, without callbacks."""
    batch = next(iter(run.batches.epoch(0)))
    result = run.task.step(batch, run.position, is_logged=is_logged, is_saved=False)
    run.position.step += 1
    return result


def rows_of(folder, kind):
    return [r for r in read_json_lines(folder / "metrics.jsonl") if r["kind"] == kind]


def train_rows(folder):
    return rows_of(folder, "train")


def die_before(patch, step):
    """Let runs end as if killed, before a step, until the patch is undone."""
    step_of = Trainer.step

    def dying(self, batch):
        if self.position.step == step:
            raise KeyboardInterrupt
        return step_of(self, batch)

    patch.setattr(Trainer, "step", dying)


def error_of(result, status):
    """The one line that a refused command prints."""
    assert result[0] == status
    lines = [line for line in result[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result[2]
    return lines[0]
