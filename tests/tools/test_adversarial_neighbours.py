"""The study of fooled neighbours, from a real run's checkpoint to JSON and table."""

import json

import cv2
import numpy as np
import pytest
import torch

from pretrain.config import load_config
from pretrain.data.pack import write_shards
from pretrain.data.pack_plan import SourcePicture
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint
from pretrain.evaluation import robustness
from pretrain.evaluation.robustness import NeighbourStudy
from pretrain.run import make_trainer
from tools import adversarial_neighbours as tool

CONFIG = """\
data: {image_size: 32, batch_size: 16, num_workers: 0}
arch: {depth: 18, width_per_group: 4, stem_channels: 4, res2_channels: 4}
heads: {projector_hidden_dim: 16, predictor_hidden_dim: 16, output_dim: 8}
fa: {method: nn, queue_size: 64, min_fill: 16}
optim: {epochs: 1, warmup_epochs: 0}
engine: {device: cpu, precision: fp32, num_threads: 1}
eval: {num_pictures: 0}
"""
NUM = 32


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with ``shards`` and ``run/checkpoint.pth``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("robustness")
    pictures = []
    for i in range(NUM):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / f"{i:03d}.png"
        cv2.imwrite(str(path), cv2.resize(coarse, (48, 40), interpolation=cv2.INTER_CUBIC))
        pictures.append(SourcePicture(str(path), path.name, i % 2))
    write_shards(pictures, folder / "shards", classes=["even", "odd"])
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    overrides = [f"out={folder / 'run'}", f"data.shards={folder / 'shards'}"]
    make_trainer(load_config(config, overrides), resume=False).train()
    return folder


@pytest.fixture
def study(work):
    state = checkpoint.load(work / "run" / "checkpoint.pth")
    index = ShardIndex.open(work / "shards")
    return NeighbourStudy(state, index, 8, torch.device("cpu"))


def call(work, *options):
    arguments = [str(work / "run" / "checkpoint.pth"), str(work / "shards"), "--device", "cpu"]
    return tool.main([*arguments, *options])


def test_json_and_table(work, tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ["--num", "8", "--steps", "5", "--epsilon", "1,16", "--json", str(out)]
    assert call(work, *options) == 0
    figures = json.loads(out.read_text())
    assert (figures["num_queries"], figures["num_entries"]) == (8, NUM - 8)
    weak, strong = figures["neighbour_flip"]
    assert (weak["epsilon"], strong["epsilon"]) == (1, 16)
    assert weak["attack"] <= strong["attack"]
    assert 0 <= strong["control"] < strong["attack"] <= 1
    assert f"{strong['attack']:.1%}" in capsys.readouterr().out
    assert call(work, *options) == 0
    assert json.loads(out.read_text()) == figures


def test_the_figure_equals_its_definition(study, monkeypatch):
    monkeypatch.setattr(robustness, "BATCH_SIZE", 5)
    with torch.no_grad():
        clean = study.network.project(study.images)
        attacked = study.network.project(study.changed(study.images, 8.0, 3))
    bank = study.queue.features
    before = (torch.nn.functional.normalize(clean, dim=1) @ bank.T).argmax(dim=1)
    after = (torch.nn.functional.normalize(attacked, dim=1) @ bank.T).argmax(dim=1)
    assert study.flips(8.0, 3) == pytest.approx((before != after).double().mean().item())
    assert study.flips(0.0, 1) == 0


def test_the_attack_lowers_the_similarity_to_the_neighbour_more_than_the_control(study):
    entries = study.queue.features[study.nearest(study.images)]
    generator = torch.Generator().manual_seed(0)
    moved = (study.changed(study.images, 8.0, 5), study.changed(study.images, 8.0, 1, generator))
    with torch.no_grad():
        attacked, control = (
            torch.nn.functional.cosine_similarity(study.network.project(x), entries).mean()
            for x in moved
        )
    assert attacked < control


def test_queries_are_not_in_the_queue(work, study):
    assert int(study.is_query.sum()) == len(study.images) == 8
    assert study.queue.num_entries == NUM - 8
    own = torch.nn.functional.normalize(study.network.project(study.images), dim=1)
    assert float((own @ study.queue.features.T).max()) < 1 - 1e-6


def test_pictures_stay_within_the_bound(study):
    std = torch.tensor(study.std).view(1, 3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    for moved in (
        study.changed(study.images, 4.0, 4),
        study.changed(study.images, 4.0, 1, generator),
    ):
        change = ((moved - study.images) * std).abs()
        assert 0 < change.max() <= 4 / 255 + 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "32"], "32 queries of 32 samples leave 0 for the queue"),
        (["--num", "0"], "0 queries of 32 samples"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--json", "no/such/r.json"], "no such folder"),
        (["--epsilon", "1,-2"], "argument --epsilon"),
    ],
)
def test_wrong_arguments(work, options, message, capsys):
    try:
        status = call(work, *options)
    except SystemExit as caught:
        status = caught.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_checkpoint_that_is_missing_or_of_another_version(work, tmp_path, capsys):
    assert tool.main([str(tmp_path / "no.pth"), str(work / "shards")]) == 2
    assert "does not exist" in capsys.readouterr().err
    state = checkpoint.load(work / "run" / "checkpoint.pth")
    state["config"]["heads"]["bottleneck"] = 3
    del state["checksum"]  # as in checkpoints of older versions
    torch.save(state, tmp_path / "old.pth")
    assert tool.main([str(tmp_path / "old.pth"), str(work / "shards"), "--num", "8"]) == 2
    assert "does not fit this version" in capsys.readouterr().err
