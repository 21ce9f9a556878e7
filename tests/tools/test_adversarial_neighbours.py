"""The study of fooled neighbours, from a real run's checkpoint to JSON, table and picture."""

import json

import cv2
import numpy as np
import pytest
import torch

from pretrain.config import load_config
from pretrain.data.pack.plan import SourcePicture
from pretrain.data.pack.writer import write_shards
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint
from pretrain.evaluation import robustness
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
    """A folder with ``shards``, ``plain`` (without labels) and ``run/checkpoint.pth``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("robustness")
    pictures = []
    for i in range(NUM):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / f"{i:03d}.png"
        cv2.imwrite(str(path), cv2.resize(coarse, (48, 40), interpolation=cv2.INTER_CUBIC))
        pictures.append(SourcePicture(str(path), path.name, i % 2))
    write_shards(pictures, folder / "shards", classes=["even", "odd"])
    write_shards([SourcePicture(p.path, p.name) for p in pictures], folder / "plain")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    overrides = [f"out={folder / 'run'}", f"data.shards={folder / 'shards'}"]
    make_trainer(load_config(config, overrides), resume=False).train()
    return folder


@pytest.fixture
def study(work):
    state = checkpoint.load(work / "run" / "checkpoint.pth")
    return robustness.prepare(
        state, ShardIndex.open(work / "shards"), num_queries=8, device=torch.device("cpu"),
        batch_size=5,
    )  # fmt: skip


def call(work, *options, shards="shards"):
    arguments = [str(work / "run" / "checkpoint.pth"), str(work / shards), "--device", "cpu"]
    return tool.main([*arguments, *options])


def test_json_table_and_picture(work, tmp_path, capsys):
    out, picture = tmp_path / "r.json", tmp_path / "r.jpg"
    options = ["--num", "8", "--epsilon", "1,16", "--json", str(out), "--picture", str(picture)]
    assert call(work, *options) == 0
    figures = json.loads(out.read_text())
    assert (figures["num_queries"], figures["num_entries"]) == (8, NUM - 8)
    assert [row["epsilon"] for row in figures["rows"]] == [1, 16]
    for row in figures["rows"]:
        for kind in ("control", "attack"):
            found = row[kind]
            assert set(found["cosine"]) == set(robustness.MITIGATIONS)
            assert set(found["neighbour_flip"]) == set(robustness.DISTANCES)
            assert all(0 <= value <= 1 for value in found["neighbour_flip"].values())
            assert all(0 <= value <= 1 for value in found["label_flip"].values())
            assert all(-1.001 <= value <= 1.001 for value in found["cosine"].values())
    printed = capsys.readouterr().out
    assert "8 queries, 24 entries in the queue, FGSM" in printed
    assert all(name in printed for name in robustness.MITIGATIONS)
    sheet = cv2.imread(str(picture))
    assert sheet.shape == (6 * 100 - 4, 5 * 100 - 4, 3)


def test_without_labels_there_is_no_label_flip(work, tmp_path):
    out = tmp_path / "r.json"
    options = ["--num", "4", "--epsilon", "2", "--json", str(out)]
    assert call(work, *options, shards="plain") == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["attack"]["label_flip"] == {"cosine": None, "truncated": None}


def test_attack_moves_further_than_the_control(study):
    seen, control = (
        robustness.look(study, 8.0, num_steps=5, is_control=which) for which in (False, True)
    )
    assert seen.cosine["identity"].mean() < control.cosine["identity"].mean()


def test_figures_equal_their_definition(study):
    seen = robustness.look(study, 8.0, num_steps=3)
    with torch.no_grad():
        clean = study.network.project(study.clean(slice(None)))
        attacked = study.network.project(seen.images)
    bank = study.queue.features
    before = (torch.nn.functional.normalize(clean, dim=1) @ bank.T).argmax(dim=1)
    after = (torch.nn.functional.normalize(attacked, dim=1) @ bank.T).argmax(dim=1)
    figures = robustness.summary(study, seen)
    flip = (before != after).double().mean().item()
    assert figures["neighbour_flip"]["cosine"] == pytest.approx(flip)
    found = torch.nn.functional.cosine_similarity(bank[before], bank[after]).mean().item()
    assert figures["cosine"]["nn"] == pytest.approx(found, abs=1e-5)
    assert figures["neighbour_cosine"]["cosine"] == pytest.approx(found, abs=1e-5)
    labels = study.queue.labels
    label_flip = (labels[before] != labels[after]).double().mean().item()
    assert figures["label_flip"]["cosine"] == pytest.approx(label_flip)


def test_queries_are_not_in_the_queue(work, study):
    assert set(study.query_ids.tolist()).isdisjoint(study.queue.sample_ids.tolist())
    index = ShardIndex.open(work / "shards")
    for ids, labels in (
        (study.query_ids, study.labels),
        (study.queue.sample_ids, study.queue.labels),
    ):
        assert labels.tolist() == index.labels[ids.numpy()].tolist()


def test_pictures_stay_within_the_bound(study):
    seen = robustness.look(study, 4.0, num_steps=4)
    std = torch.tensor(study.std).view(1, 3, 1, 1)
    change = ((seen.images - study.clean(slice(None))) * std).abs()
    assert 0 < change.max() <= 4 / 255 + 1e-5


def test_same_draws_give_the_same_features(study):
    """Without a change of the picture every mitigation makes the same of it twice."""
    seen = robustness.look(study, 1e-6, num_steps=1)
    for name, cosine in seen.cosine.items():
        torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-3, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "30"], "30 queries of 32 samples leave 2 for the queue"),
        (["--num", "0"], "--num 0: give at least 1"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--picture", "r.gif"], "ends in .jpg or .png"),
        (["--json", "no/such/r.json"], "its folder does not exist"),
    ],
)
def test_wrong_arguments(work, options, message, capsys):
    assert call(work, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_epsilon_that_is_no_number(work, capsys):
    with pytest.raises(SystemExit) as caught:
        call(work, "--epsilon", "1,-2")
    assert caught.value.code == 2
    assert "--epsilon" in capsys.readouterr().err


def test_missing_checkpoint(work, tmp_path, capsys):
    assert tool.main([str(tmp_path / "no.pth"), str(work / "shards")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_checkpoint_of_another_version(work, tmp_path, capsys):
    state = checkpoint.load(work / "run" / "checkpoint.pth")
    state["config"]["heads"]["bottleneck"] = 3
    del state["checksum"]  # as in checkpoints of older versions
    torch.save(state, tmp_path / "old.pth")
    assert tool.main([str(tmp_path / "old.pth"), str(work / "shards"), "--num", "8"]) == 2
    assert "does not fit this version" in capsys.readouterr().err
