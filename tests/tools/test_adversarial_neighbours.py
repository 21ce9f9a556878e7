"""The study of fooled neighbours, from a real run's checkpoint to JSON and table."""

import json

import pytest
import torch

from pretrain.config import load_config
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint
from pretrain.evaluation import neighbour_attack
from pretrain.evaluation.neighbour_attack import NeighbourStudy
from pretrain.run import make_trainer
from tests.pretrain.data.picture_helpers import pack_pictures
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
    folder = tmp_path_factory.mktemp("robustness")
    shards = pack_pictures(folder, NUM, per_shard=NUM)
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    overrides = [f"out={folder / 'run'}", f"data.shards={shards}"]
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


def test_the_figure_equals_its_definition(study, monkeypatch):
    monkeypatch.setattr(neighbour_attack, "BATCH_SIZE", 5)
    with torch.no_grad():
        clean = study.network.project(study.images)
        attacked = study.network.project(study.changed(study.images, 8.0, 3))
    bank = study.queue.features
    before = (torch.nn.functional.normalize(clean, dim=1) @ bank.T).argmax(dim=1)
    after = (torch.nn.functional.normalize(attacked, dim=1) @ bank.T).argmax(dim=1)
    assert study.flips(8.0, 3) == pytest.approx((before != after).double().mean().item())
    assert study.flips(0.0, 1) == 0


def test_the_attack_lowers_the_similarity_to_a_neighbour_in_the_queue(study):
    assert int(study.is_query.sum()) == len(study.images) == 8
    assert study.queue.num_entries == NUM - 8
    entries = study.queue.features[study.nearest(study.images)]
    generator = torch.Generator().manual_seed(0)
    moved = (study.changed(study.images, 8.0, 5), study.changed(study.images, 8.0, 1, generator))
    with torch.no_grad():
        attacked, control = (
            torch.nn.functional.cosine_similarity(study.network.project(x), entries).mean()
            for x in moved
        )
        own = torch.nn.functional.normalize(study.network.project(study.images), dim=1)
    assert attacked < control
    assert float((own @ study.queue.features.T).max()) < 1 - 1e-6  # no query is in the queue


def test_pictures_stay_within_the_bound(study):
    std = torch.tensor(study.pixels.std).view(1, 3, 1, 1)
    for steps, generator in ((4, None), (1, torch.Generator().manual_seed(0))):
        change = (study.changed(study.images, 4.0, steps, generator) - study.images) * std
        assert 0 < change.abs().max() <= 4 / 255 + 1e-5


def test_too_many_queries_are_refused(work, capsys):
    assert call(work, "--num", "32") == 2
    assert "32 queries of 32 samples leave 0 for the queue" in capsys.readouterr().err
