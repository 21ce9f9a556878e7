"""Frozen networks, and their features on the disk."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common.backbone import Preprocessing, parse_preprocessing
from common.errors import UserError
from common.files import DiskFullError
from common.network import ResNet
from common.resnet import NAMED, Arch, detectron2_name
from pretrain.config import DataConfig
from pretrain.data.loader import ViewDataset
from pretrain.data.order import OrderedSamples
from pretrain.data.policy import Crop, Flip, ViewPolicy
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint
from pretrain.evaluation.linear import features as stored
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.features import FrozenBackbone, extract
from pretrain.evaluation.probe import extract_features
from pretrain.model.backbones.resnet import ResNetBackbone
from tests.pretrain.data.picture_helpers import damage

CPU = torch.device("cpu")
TINY = Arch(18, 8, 8, 8)
CONFIG = LinearConfig(image_size=32, num_workers=0)
BLOCK_ROWS, NUM_REST = 32, 10


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_ROWS", BLOCK_ROWS)


@pytest.fixture
def weights(tmp_path):
    """A small ResNet-18 in torchvision's layout, with statistics that BN would change."""
    backbone = ResNet(TINY)
    with torch.no_grad():
        backbone.train()(torch.randn(16, 3, 32, 32))
    path = tmp_path / "tiny.pth"
    torch.save(backbone.state_dict(), path)
    return path


@pytest.fixture
def our_checkpoint(tmp_path, make_model):
    """A checkpoint of ours as far as an evaluation reads it, and its model."""
    model = make_model("byol", arch=ResNetBackbone(**asdict(TINY)))
    with torch.no_grad():
        next(model.ema.parameters()).add_(1.0)
    state: dict = dict.fromkeys(checkpoint.FIELDS)
    state |= {
        "format": checkpoint.FORMAT, "arch": asdict(model.online.backbone.arch),
        "preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "order": "RGB"},
        "model": model.online.state_dict(), "ema": model.ema.state_dict(),
        "config": {"data": {"image_size": 48}, "objective": {"name": "byol"}},
    }  # fmt: skip
    checkpoint.save(state, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth", model


def load(source, branch="online", **options):
    return FrozenBackbone(str(source), LinearConfig(**options), branch=branch, device=CPU)


def test_our_checkpoint_gives_either_branch(our_checkpoint):
    path, model = our_checkpoint
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    hashes = set()
    for branch, own in (("online", model.online), ("ema", model.ema)):
        network = load(path, branch)
        pixels = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).normalise(images)
        assert torch.equal(network(images), own.backbone.eval()(pixels))
        assert (network.description["kind"], network.description["branch"]) == (
            "checkpoint",
            branch,
        )
        assert network.view["image_size"] == 48
        hashes.add(network.description["weights_hash"])
    assert len(hashes) == 2


@pytest.mark.parametrize("layout", ["torchvision", "moco"])
def test_other_layouts_give_torchvisions_features(tmp_path, layout):
    model = torchvision.models.resnet18(num_classes=7).eval()
    prefix = "module.encoder_q." if layout == "moco" else ""
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "r18.pth")
    network = load(tmp_path / "r18.pth")
    assert network.model.arch == NAMED["R18"]
    assert not any(p.requires_grad for p in network.model.parameters())
    assert (network.description["kind"], network.view["image_size"]) == (layout, 224)
    setattr(model, "fc", nn.Identity())  # noqa: B010
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network.model(images), model(images).detach())


def test_what_conversion_takes_is_taken(tmp_path):
    """Weights of Detectron2 without a card, with the same options; ours without a config."""
    state = ResNet(TINY).state_dict()
    model = {n: v.numpy() for n, v in state.items()}
    named = {detectron2_name(name): value for name, value in model.items()}
    (tmp_path / "d2.pkl").write_bytes(pickle.dumps({"model": named}))
    with pytest.raises(UserError, match="give --preprocessing"):
        load(tmp_path / "d2.pkl")
    network = FrozenBackbone(
        str(tmp_path / "d2.pkl"), LinearConfig(), branch="online", device=CPU, layout="detectron2",
        preprocessing=parse_preprocessing("half"), stride_in_1x1=False,
    )  # fmt: skip
    assert network.view["mean"] == [0.5, 0.5, 0.5]
    assert torch.equal(network.model.state_dict()["conv1.weight"], state["conv1.weight"])
    ours = {"format": checkpoint.FORMAT, "arch": asdict(TINY), "preprocessing": None,
            "model": {f"backbone.{n}": torch.from_numpy(v) for n, v in model.items()}}  # fmt: skip
    torch.save(ours, tmp_path / "ours.pth")
    assert load(tmp_path / "ours.pth").view["image_size"] == 224


def test_random_weights_are_those_of_their_seed():
    name = "thin_R50"
    before = torch.get_rng_state()
    a, b, c = (load(f"random:{name}", seed=s).description for s in (1, 1, 2))
    assert a["weights_hash"] == b["weights_hash"] != c["weights_hash"]
    assert a["arch"] == asdict(NAMED[name])
    assert a["file_sha256"] is None
    assert torch.equal(torch.get_rng_state(), before)


class Counting(FrozenBackbone):
    """Counts the pictures that pass through the network; stops after some blocks."""

    num_pictures, left, instead = 0, None, None

    def __call__(self, images):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.num_pictures += len(images)
        return super().__call__(images) if self.instead is None else self.instead


@pytest.fixture(scope="module")
def many(make_shards):
    """A set of several blocks; not to be changed."""
    return ShardIndex.open(make_shards("many", num=2 * BLOCK_ROWS + NUM_REST, per_shard=30))


def features_of(index, weights, folder, *, passes=0, stop_after=None, instead=None, **options):
    """The features of a set, and how many pictures passed through the network for them."""
    config = replace(CONFIG, **options)
    backbone = Counting(str(weights), config, branch="online", device=CPU)
    backbone.left, backbone.instead = stop_after, instead
    return extract(backbone, index, "train", config, folder, passes=passes), backbone.num_pictures


def test_features_are_those_of_the_central_crops(many, weights, tmp_path):
    file, _ = features_of(many, weights, tmp_path)
    network = load(weights)
    expected, labels = extract_features(network.model, many, DataConfig(image_size=32), CPU)
    torch.testing.assert_close(torch.from_numpy(file.values), expected)
    assert file.labels.tolist() == labels.tolist()
    chosen = np.array([70, 3, 3, 47])
    assert np.array_equal(file.read(chosen), file.values[chosen])
    assert np.array_equal(np.load(file.path), file.values)


def test_passes_are_random_crops_that_differ(many, weights, tmp_path):
    options = {"seed": 4, "crop_scale": (0.3, 0.9), "flip_probability": 1.0}
    file, _ = features_of(many, weights, tmp_path, passes=2, **options)
    n = many.num_samples
    assert len(file.values) == 2 * n
    assert np.abs(file.values[:n] - file.values[n:]).max(axis=1).min() > 0
    policy = ViewPolicy(crop=Crop((0.3, 0.9)), flip=Flip(1.0))
    dataset = ViewDataset(many, image_size=32, views=(policy,), seed=4)
    ids = np.array([5, 60])
    for repeat in (0, 1):
        images = dataset[OrderedSamples(ids, np.full(2, repeat))].batch.views[0]
        torch.testing.assert_close(file.read(repeat * n + ids), load(weights)(images))


def test_a_kill_costs_the_block_that_was_computed(many, weights, tmp_path):
    whole, _ = features_of(many, weights, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        features_of(many, weights, tmp_path / "parts", stop_after=2)
    file, num_pictures = features_of(many, weights, tmp_path / "parts")
    assert num_pictures == NUM_REST
    assert file.path.read_bytes() == whole.path.read_bytes()
    assert features_of(many, weights, tmp_path / "parts")[1] == 0


def test_a_file_that_another_process_writes_is_left_alone(many, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.HOLD_SECONDS", 0.1)
    path = features_of(many, weights, tmp_path)[0].path
    script = (
        "import sys, pathlib; from common.files import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", script, str(path.with_suffix(".lock"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match=r"train-\w+: .*wait for it, stop it"):
            features_of(many, weights, tmp_path)
        other.stdin.close()
    assert features_of(many, weights, tmp_path)[1] == 0


def test_the_file_has_its_size_where_fallocate_is_missing(many, weights, tmp_path, monkeypatch):
    expected = features_of(many, weights, tmp_path / "a")[0].path.read_bytes()
    monkeypatch.delattr(os, "posix_fallocate")
    assert features_of(many, weights, tmp_path / "b")[0].path.read_bytes() == expected


def test_what_is_damaged_is_computed_again(many, weights, tmp_path):
    file, _ = features_of(many, weights, tmp_path)
    good = file.path.read_bytes()
    damaged = bytearray(good)
    damaged[-(NUM_REST + 10) * 64 * 4] ^= 1  # in the last whole block
    for content, expected in ((damaged, BLOCK_ROWS), (good[:-1], many.num_samples)):
        file.path.write_bytes(content)
        again, num_pictures = features_of(many, weights, tmp_path)
        assert num_pictures == expected
        assert again.path.read_bytes() == good


def test_other_weights_shards_or_sizes_have_a_file_of_their_own(many, shards, weights, tmp_path):
    def name(index=many, **options):
        return features_of(index, weights, tmp_path, **options)[0].path.name

    names = [name(), name(ShardIndex.open(shards)), name(image_size=40)]
    names += [name(passes=1), name(passes=1, seed=1), name(passes=1, flip_probability=0.1)]
    names.append(name(passes=1, crop_scale=(0.1, 1.0)))
    torch.save(ResNet(TINY).state_dict(), weights)
    names.append(name())
    assert len(set(names)) == len(names)
    assert name(seed=1) == names[-1]  # nothing that central crops depend on


def test_features_that_are_not_finite_are_refused(many, weights, tmp_path):
    features = torch.full((BLOCK_ROWS, 64), torch.nan)
    with pytest.raises(UserError, match="rows 0 to 31 are not finite: the weights are damaged"):
        features_of(many, weights, tmp_path, instead=features)


def test_a_full_disk_is_reported_before_anything_is_computed(many, weights, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored.os, "posix_fallocate", refuse)
    with pytest.raises(DiskFullError, match="or give another --features DIR"):
        features_of(many, weights, tmp_path, stop_after=0)


def test_a_bad_picture_is_named(shards, weights, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "bad")
    damage(folder, 3)
    with pytest.raises(UserError, match=r"sample 3 .*repair or remove it and make the"):
        features_of(ShardIndex.open(folder), weights, tmp_path, passes=1)
