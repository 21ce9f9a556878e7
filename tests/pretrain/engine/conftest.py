"""The config file of a test module, its command line run in this process, and its runs."""

import contextlib

import pytest
import torch
import yaml

from pretrain.__main__ import main
from pretrain.config import load_config
from pretrain.engine.trainer import Trainer
from pretrain.run import make_trainer


@pytest.fixture
def config_file(request, tmp_path):
    """A YAML file of the test module's `BASE`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(request.module.BASE))
    return path


@pytest.fixture
def start(config_file, shards, tmp_path, capsys):
    """Run the command line in this process: start("name", "key=value", ..).

    Returns exit status, the run's folder and what was printed to stderr.
    """

    def run(name, *arguments, config=config_file):
        folder = tmp_path / name
        options = [f"out={folder}", *arguments]
        if not any(a.startswith("data.shards=") for a in arguments):
            options.append(f"data.shards={shards}")
        capsys.readouterr()
        status = main([str(config), *options])
        return status, folder, capsys.readouterr().err

    return run


@pytest.fixture
def make_run(config_file, shards, tmp_path):
    """Build a `Trainer` without training: make_run("key=value", .., name="run", resume=False)."""

    def make(*overrides, name="run", resume=False):
        options = [f"out={tmp_path / name}", f"data.shards={shards}", *overrides]
        trainer = make_trainer(load_config(config_file, options), resume=resume)
        at_end.callback(trainer.batches.close)
        return trainer

    with contextlib.ExitStack() as at_end:
        yield make


@pytest.fixture
def disturb(monkeypatch):
    """disturb({3: "gradient", 5: "picture"}): what is not finite in which step, from 1 on.

    Returns the batches that were seen, by step.
    """
    original = Trainer.step

    def install(kinds):
        seen = {}

        def disturbed(self, batch):
            number = self.position.step + 1
            seen[number], kind = batch, kinds.get(number)
            if kind == "picture":
                batch.views[0, 1, 2, 3, 4] = torch.nan
            factor = torch.inf if kind == "gradient" else 1.0
            weight = self.task.model.online.projector[0].weight
            handle = weight.register_hook(lambda gradient: gradient * factor)
            result = original(self, batch)
            handle.remove()
            return result

        monkeypatch.setattr(Trainer, "step", disturbed)
        return seen

    return install
