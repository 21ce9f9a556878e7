"""Frozen networks, and their features on the disk."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common.errors import UserError
from common.resnet import NAMED, Arch
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint
from pretrain.evaluation.linear import extract as cache
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.extract import (
    BLOCK_ROWS,
    Blocks,
    Extractor,
    FeatureFile,
    extract,
    load,
)
from pretrain.evaluation.probe import extract_features, normalise
from pretrain.model.backbone import ResNet

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY = Arch(18, 8, 8, 8)
CONFIG = LinearConfig(image_size=32, num_workers=0)


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

    def make(objective="byol"):
        model = make_model(objective)
        if model.ema is not None:
            with torch.no_grad():
                next(model.ema.parameters()).add_(1.0)
        state: dict = dict.fromkeys(checkpoint.FIELDS)
        state |= {
            "format": checkpoint.FORMAT, "arch": asdict(model.online.backbone.arch),
            "preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "order": "RGB"},
            "model": model.online.state_dict(),
            "ema": None if model.ema is None else model.ema.state_dict(),
            "config": {"data": {"image_size": 48}, "objective": {"name": objective}},
        }  # fmt: skip
        checkpoint.save(state, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth", model

    return make


# --- frozen networks


def test_our_checkpoint_gives_either_branch(our_checkpoint):
    path, model = our_checkpoint()
    images = torch.randn(2, 3, 32, 32)
    hashes = set()
    for branch, network in (("online", model.online), ("ema", model.ema)):
        frozen = load(str(path), branch=branch, seed=0)
        expected = network.backbone.eval()(images)
        assert torch.equal(frozen.backbone(images), expected)
        assert (frozen.kind, frozen.branch, frozen.image_size) == ("checkpoint", branch, 48)
        assert frozen.mean == (0.1, 0.2, 0.3)
        assert frozen.std == (0.4, 0.5, 0.6)
        hashes.add(frozen.weights_hash)
    assert len(hashes) == 2


def test_a_branch_that_is_not_there_is_refused(our_checkpoint, weights):
    path, _ = our_checkpoint("simsiam")
    with pytest.raises(UserError, match=r"--branch ema: .* no EMA network \(objective simsiam\)"):
        load(str(path), branch="ema", seed=0)
    with pytest.raises(UserError, match="no checkpoint of ours and has one network"):
        load(str(weights), branch="ema", seed=0)


def test_torchvisions_file_gives_torchvisions_features(tmp_path):
    model = torchvision.models.resnet18(num_classes=7).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "r18.pth")
    frozen = load(str(tmp_path / "r18.pth"), branch="online", seed=0)
    assert frozen.backbone.arch == NAMED["R18"]
    assert (frozen.kind, frozen.image_size) == ("torchvision", 224)
    setattr(model, "fc", nn.Identity())  # noqa: B010
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(frozen.backbone(images), model(images).detach())


@pytest.mark.parametrize("arch", [TINY, Arch(34, 8, 8, 8), Arch(50, 8, 4, 32)])
def test_depth_and_widths_are_read_off_the_tensors(arch, tmp_path):
    torch.save(ResNet(arch).state_dict(), tmp_path / "w.pth")
    assert load(str(tmp_path / "w.pth"), branch="online", seed=0).backbone.arch == arch


def test_the_network_is_frozen(weights):
    frozen = load(str(weights), branch="online", seed=0)
    assert not frozen.backbone.training
    assert not any(p.requires_grad for p in frozen.backbone.parameters())


@pytest.mark.parametrize("name", ["R18", "thin_R50"])
def test_random_weights_are_those_of_their_seed(name):
    before = torch.get_rng_state()
    a, b, c = (load(f"random:{name}", branch="online", seed=s) for s in (1, 1, 2))
    assert a.weights_hash == b.weights_hash != c.weights_hash
    assert a.backbone.arch == NAMED[name]
    assert a.file_sha256 is None
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_of_a_checkpoints_architecture(our_checkpoint):
    path, model = our_checkpoint()
    frozen = load(f"random:{path}", branch="online", seed=1)
    assert frozen.backbone.arch == Arch(**asdict(model.online.backbone.arch))
    assert (frozen.kind, frozen.image_size, frozen.mean) == ("random", 48, (0.1, 0.2, 0.3))
    trained = load(str(path), branch="online", seed=0)
    assert trained.weights_hash != frozen.weights_hash


def without(name, state):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without("layer3.1.bn2.running_var", s), "Missing key.*layer3.1.bn2.running_var"),
        (
            lambda s: {**s, "layer1.0.se.weight": s["bn1.bias"]},
            "Unexpected key.*layer1.0.se.weight",
        ),
        (
            lambda s: {**s, "layer4.1.conv2.weight": torch.zeros(3, 3)},
            r"size mismatch for layer4.1.conv2.weight",
        ),
        (
            lambda s: {**s, "layer3.2.conv1.weight": torch.zeros(1)},
            r"\(2, 2, 3, 2\) blocks per stage",
        ),
        (lambda s: without("conv1.weight", s), "no conv1.weight .* no ResNet"),
        (lambda s: {"model": {"patch_embed": torch.zeros(1)}}, "no ResNet.s state_dict. Give a"),
    ],
)
def test_another_architecture_is_refused(weights, change, message):
    torch.save(change(torch.load(weights)), weights)
    with pytest.raises(UserError, match=message):
        load(str(weights), branch="online", seed=0)


@pytest.mark.parametrize("source", ["random:R19", "random:no/such.pth"])
def test_unknown_random_networks(source):
    with pytest.raises(UserError, match=f"{source}: give random: with R18"):
        load(source, branch="online", seed=0)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "no.pth"), branch="online", seed=0)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="not a readable PyTorch checkpoint"):
        load(str(tmp_path / "text.pth"), branch="online", seed=0)


# --- features on the disk


class Counting(Extractor):
    """Counts the pictures that pass through the network; stops after some blocks."""

    def __init__(self, *arguments, stop_after=None):
        super().__init__(*arguments)
        self.num_pictures, self.left = 0, stop_after

    def __call__(self, images):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.num_pictures += len(images)
        return super().__call__(images)


@pytest.fixture(scope="module")
def many(make_shards):
    """A set of several blocks; not to be changed."""
    return make_shards("many", num=2 * BLOCK_ROWS + 30, per_shard=100)


def features_of(index, weights, folder, *, config=CONFIG, passes=0, stop_after=None):
    extractor = Counting(
        load(str(weights), branch="online", seed=0), config, CPU, stop_after=stop_after
    )
    blocks = Blocks(index, extractor.image_size, passes, config)
    facts = {"passes": passes, "samples": index.fingerprint, "view": extractor.view}
    facts["weights_hash"] = load(str(weights), branch="online", seed=0).weights_hash
    file = FeatureFile(folder, "train", blocks.num_rows, extractor.dim, config.feature_dtype, facts)
    extract(extractor, blocks, file, "train", config.num_workers)
    return file, extractor


def test_features_are_those_of_the_central_crops(many, weights, tmp_path):
    index = ShardIndex.open(many)
    file, _ = features_of(index, weights, tmp_path)
    frozen = load(str(weights), branch="online", seed=0)
    expected, _, ids = extract_features(
        frozen.backbone, index, image_size=32, mean=frozen.mean, std=frozen.std, device=CPU
    )
    assert ids.tolist() == list(range(index.num_samples))
    torch.testing.assert_close(file.read(slice(None)), expected)
    assert np.array_equal(file.whole(), file.read(slice(None)))
    chosen = np.array([200, 3, 3, 77])
    assert np.array_equal(file.read(chosen), file.whole()[chosen])


def test_passes_are_random_crops_that_differ(many, weights, tmp_path):
    index = ShardIndex.open(many)
    config = replace(CONFIG, seed=4, crop_scale=(0.3, 0.9), flip_probability=1.0)
    file, _ = features_of(index, weights, tmp_path, config=config, passes=2)
    n = index.num_samples
    rows = file.whole()
    assert len(rows) == 2 * n
    assert np.abs(rows[:n] - rows[n:]).max(axis=1).min() > 0
    frozen = load(str(weights), branch="online", seed=0)
    from pretrain.data.loader import ViewDataset  # the loader's own crops
    from pretrain.data.order import OrderedSamples
    from pretrain.data.policy import Crop, Flip, ViewPolicy

    dataset = ViewDataset(
        index, image_size=32, views=(ViewPolicy(Crop((0.3, 0.9)), Flip(1.0)),), seed=4
    )
    ids = np.array([5, 250])
    for repeat in (0, 1):
        views = dataset[OrderedSamples(ids, np.full(2, repeat))].batch.views[0]
        expected = frozen.backbone(normalise(views, frozen.mean, frozen.std))
        torch.testing.assert_close(file.read(repeat * n + ids), expected)


def test_an_interrupted_file_is_gone_on_with(many, weights, tmp_path):
    index = ShardIndex.open(many)
    whole, _ = features_of(index, weights, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        features_of(index, weights, tmp_path / "parts", stop_after=2)
    file, extractor = features_of(index, weights, tmp_path / "parts")
    assert extractor.num_pictures == 30
    assert file.num_found == 2 * BLOCK_ROWS
    assert file.path.read_bytes() == whole.path.read_bytes()
    again, extractor = features_of(index, weights, tmp_path / "parts")
    assert extractor.num_pictures == 0
    assert again.num_found == index.num_samples


def test_a_damaged_block_is_computed_again(many, weights, tmp_path, capsys):
    index = ShardIndex.open(many)
    file, _ = features_of(index, weights, tmp_path)
    good = file.path.read_bytes()
    damaged = bytearray(good)
    damaged[BLOCK_ROWS * 64 * 4 + 9] ^= 1
    file.path.write_bytes(damaged)
    again, extractor = features_of(index, weights, tmp_path)
    assert extractor.num_pictures == again.num_damaged == BLOCK_ROWS
    assert again.path.read_bytes() == good
    assert "128 rows are damaged and are computed again" in capsys.readouterr().err


def test_a_journal_cut_by_a_kill_costs_its_last_block(many, weights, tmp_path):
    index = ShardIndex.open(many)
    file, _ = features_of(index, weights, tmp_path)
    (journal,) = tmp_path.glob("*.jsonl")
    journal.write_text(journal.read_text()[:-5])
    for expected in (30, 0, 0):
        _, extractor = features_of(index, weights, tmp_path)
        assert extractor.num_pictures in {expected, 30}  # a line glued to the cut one is lost too
    assert extractor.num_pictures == 0
    assert np.isfinite(file.whole()).all()


def test_other_weights_shards_or_sizes_have_a_file_of_their_own(many, shards, weights, tmp_path):
    index = ShardIndex.open(many)
    names = [features_of(index, weights, tmp_path)[0].path.name]
    names.append(features_of(ShardIndex.open(shards), weights, tmp_path)[0].path.name)
    other_size = replace(CONFIG, image_size=40)
    names.append(features_of(index, weights, tmp_path, config=other_size)[0].path.name)
    state = torch.load(weights)
    state["bn1.running_mean"] += 1
    torch.save(state, weights)
    names.append(features_of(index, weights, tmp_path)[0].path.name)
    assert len(set(names)) == 4


def test_half_precision_is_half_the_size_and_within_its_rounding(many, weights, tmp_path):
    index = ShardIndex.open(many)
    exact, _ = features_of(index, weights, tmp_path)
    half, _ = features_of(index, weights, tmp_path, config=replace(CONFIG, feature_dtype="float16"))
    assert 2 * half.path.stat().st_size == exact.path.stat().st_size
    error = np.abs(half.read(slice(None)).numpy() - exact.whole())
    assert 0 < error.max() <= 2**-11 * np.abs(exact.whole()).max()


def file_of(folder, num_rows=10, dtype="float32"):
    return FeatureFile(folder, "train", num_rows, 4, dtype, {})


def test_values_that_do_not_fit_are_refused(tmp_path):
    file = file_of(tmp_path, dtype="float16")
    with pytest.raises(UserError, match=r"rows 0 to 9 are not finite in float16.*float32"):
        file.write(0, torch.full((10, 4), 1e5))
    with pytest.raises(UserError, match="not finite in float32: the weights are damaged"):
        file_of(tmp_path).write(0, torch.full((10, 4), torch.nan))


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"100,000 pictures need 2 MB, only 1 MB are free"):
        file_of(tmp_path, 100_000)


@pytest.mark.parametrize("passes", [0, 1])
def test_workers_give_the_same_features(many, weights, tmp_path, passes):
    index = ShardIndex.open(many)
    files = [
        features_of(
            index, weights, tmp_path / f"{num}", config=replace(CONFIG, num_workers=num),
            passes=passes,
        )[0]
        for num in (0, 1)
    ]  # fmt: skip
    assert files[0].path.read_bytes() == files[1].path.read_bytes()


@pytest.mark.parametrize("passes", [0, 1])
def test_a_bad_picture_is_named(shards, weights, tmp_path, passes):
    folder = shutil.copytree(shards, tmp_path / "bad")
    row = ShardIndex.open(folder).samples[3]
    with open(folder / "shard-000000.tar", "r+b") as tar:
        tar.seek(int(row["offset"]))
        tar.write(bytes(int(row["size"])))
    with pytest.raises(UserError, match=r"sample 3 .*repair or remove it and make the"):
        features_of(ShardIndex.open(folder), weights, tmp_path, passes=passes)
