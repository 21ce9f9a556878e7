"""Whole evaluations: the published protocol, the cached sweep, kNN; exact resume; what selects."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from common import checkpoints
from common.backbone import parse_preprocessing
from common.config import read_settings
from common.errors import UserError
from common.network import ResNet
from common.resnet import Arch
from pretrain.config import DataConfig
from pretrain.data.loader import Loader, ViewDataset
from pretrain.data.policy import Crop, ViewPolicy
from pretrain.data.shards import ShardIndex
from pretrain.engine import checkpoint
from pretrain.evaluation.linear import run
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.features import FrozenBackbone
from pretrain.evaluation.linear.heads import LinearHeads
from pretrain.evaluation.linear.run import Evaluation, table
from pretrain.evaluation.probe import extract_features, knn_grid
from tests.ranks import assert_well, run_group
from tools import linear_eval

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
CONFIG = LinearConfig(
    image_size=32, num_workers=0, epochs=3, batch_size=8, num_lrs=3, device="cpu", seed=1
)
FULL = replace(CONFIG, protocol="full", lrs=[30.0, 1.0])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small ResNet-18 in torchvision's layout; not to be changed."""
    torch.manual_seed(3)
    backbone = ResNet(Arch(18, 8, 8, 8))
    with torch.no_grad():
        backbone.train()(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(backbone.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def val(make_shards):
    """24 labelled pictures of the classes of ``shards``; not to be changed."""
    return make_shards("val", num=24)


@pytest.fixture(scope="module")
def opened():
    """`FrozenBackbone`, but each one is made once: half the time of an evaluation this small."""
    networks = {}

    def once(source, config, **options):
        key = (source, config.image_size, config.precision, config.seed, *options.items())
        if key not in networks:
            networks[key] = FrozenBackbone(source, config, **options)
        return networks[key]

    return once


@pytest.fixture
def evaluate(weights, shards, val, opened, tmp_path, monkeypatch):
    """A factory of results: evaluate(config, "out", resume=True)."""
    monkeypatch.setattr(run, "FrozenBackbone", opened)

    def run_one(config, out="out", **options):
        places = str(weights), str(shards), str(val), tmp_path / out
        return Evaluation(config, *places, **options).run()

    return run_one


@pytest.fixture(scope="module")
def frozen(weights):
    return FrozenBackbone(str(weights), CONFIG, branch="online", device=CPU)


def heads_of(folder):
    """Weight, bias, momentum and counts of the last checkpoint."""
    return checkpoints.read(folder / checkpoint.NAME)["heads"]


def central_features(frozen, folder):
    return extract_features(frozen.model, ShardIndex.open(folder), DataConfig(image_size=32), CPU)


def test_full_equals_pytorchs_own_training_on_the_same_crops(evaluate, frozen, tmp_path, shards):
    """An independent loop: nn.Linear, cross_entropy, SGD, on crops that the loader gives."""
    config = replace(FULL, lrs=[3.0], momentum=0.8, crop_scale=(0.2, 0.9), schedule="cosine_epochs")
    result = evaluate(config)
    views = (ViewPolicy(crop=Crop((0.2, 0.9))),)
    dataset = ViewDataset(ShardIndex.open(shards), image_size=32, views=views, seed=1)
    linear = nn.Linear(frozen.model.output_dim, 2)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    rate = 3.0 * 8 / 256
    optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.8)
    loader = Loader(dataset, batch_size=8, shuffle_window=config.shuffle_window)
    curve = []
    for epoch in range(3):
        num_right = 0
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + np.cos(np.pi * epoch / 3))
        for batch in loader.epoch(epoch):
            logits = linear(frozen(batch.views[0]))
            num_right += int((logits.argmax(dim=1) == batch.labels).sum())
            optimizer.zero_grad()
            functional.cross_entropy(logits, batch.labels).backward()
            optimizer.step()
        curve.append([pytest.approx(num_right / 40)])
    assert result["training_top1"] == curve
    weight, bias, *_ = heads_of(tmp_path / "out")
    torch.testing.assert_close(weight[0], linear.weight.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(bias[0], linear.bias.detach(), atol=1e-5, rtol=0)
    assert result["preprocessing"]["training"]["random_resized_crop"] == [0.2, 0.9]
    assert result["selection"] is None


def test_val_accuracy_is_that_of_the_trained_classifier_on_central_crops(
    weights, shards, frozen, tmp_path, val
):
    """And the backbone stays as it was, bit for bit."""
    evaluation = Evaluation(FULL, str(weights), str(shards), str(val), tmp_path / "out")
    model = evaluation.backbone.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluation.run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    features, labels = central_features(frozen, val)
    weight, bias, *_ = heads_of(tmp_path / "out")
    for number, row in enumerate(result["rates"]):
        predicted = (features @ weight[number].T + bias[number]).argmax(1)
        assert row["val_top1"] == pytest.approx((predicted == labels).double().mean().item())
        if number == result["chosen"]:
            assert result["top1"] == row["val_top1"]
            for label, name in enumerate(("class-0", "class-1")):
                right = (predicted == labels)[labels == label].double().mean().item()
                assert result["per_class"][name] == pytest.approx(right)
    assert result["n"] == 24


class Killed(Exception):
    """Stands for a process that is gone."""


@pytest.mark.parametrize(
    ("config", "step"), [(FULL, 3), (FULL, 8), (CONFIG, 9)],
)  # fmt: skip
def test_training_goes_on_bit_for_bit_from_its_last_checkpoint(
    evaluate, tmp_path, monkeypatch, config, step
):
    """Steps since the checkpoint are lost and done again; the last case dies in the sweep."""
    config = replace(config, checkpoint_every_steps=2)
    whole = evaluate(config, "whole")
    train_step = LinearHeads.step

    def until(self, batch, position, **options):
        if position.step == step:
            raise Killed
        return train_step(self, batch, position, **options)

    monkeypatch.setattr(LinearHeads, "step", until)
    with pytest.raises(Killed):
        evaluate(config, "parts")
    monkeypatch.undo()
    saved = checkpoints.read(tmp_path / "parts" / checkpoint.NAME)["position"]
    assert saved["step"] == step // 2 * 2
    parts = evaluate(config, "parts", resume=True)
    assert parts["training_top1"] == whole["training_top1"]
    if config.protocol == "full":
        assert [len(top1) for top1 in parts["training_top1"]] == [2, 2, 2]
    assert all(map(torch.equal, heads_of(tmp_path / "whole"), heads_of(tmp_path / "parts")))
    assert (parts["rates"], parts["top1"]) == (whole["rates"], whole["top1"])


@pytest.mark.parametrize("content", [b"", b'{"a', b"[]"])
def test_damaged_files_are_made_again_or_named(evaluate, tmp_path, capsys, content):
    out = tmp_path / "out"
    top1 = evaluate(CONFIG)["top1"]
    assert not (out / ".lock").exists()
    (out / "linear.json").write_bytes(content)
    for path in (out / checkpoint.NAME, *(out / "features").iterdir()):
        path.write_bytes(content)
    assert evaluate(CONFIG, resume=True)["top1"] == top1
    printed = capsys.readouterr().err
    assert f"{out / 'linear.json'} is damaged, and is made again" in printed
    assert "These classifiers are trained from the start" in printed
    (out / "linear.json").write_bytes(content)
    (out / "identity.json").write_bytes(content)
    with pytest.raises(UserError, match=r"identity\.json: is damaged; remove .*out and start"):
        evaluate(CONFIG, resume=True)


def test_the_size_of_pretraining_may_be_given_by_its_number(evaluate, tmp_path):
    """What counts is the size that was used; 0 is 224 for weights that say none."""
    config = replace(CONFIG, protocol="knn", image_size=0)
    result = evaluate(config)
    assert evaluate(replace(config, image_size=224), resume=True) == result
    assert "image_size" not in result["identity"]["config"]
    result["identity"]["config"]["image_size"] = 0  # as earlier versions wrote it
    (tmp_path / "out/linear.json").write_text(json.dumps(result))
    assert evaluate(config, resume=True) == result
    with pytest.raises(UserError, match=r"evaluation: view.image_size: 224 -> 32\. Restore"):
        evaluate(replace(config, image_size=32), resume=True)


def test_a_refit_goes_on_without_another_sweep(evaluate, tmp_path, monkeypatch):
    config = replace(CONFIG, checkpoint_every_steps=2)
    whole = evaluate(config, "whole")
    train_step, steps = LinearHeads.step, []

    def until(self, batch, position, **options):
        steps.append((len(self.weight), position.step))
        if steps.count((1, 7)) == 1 and steps[-1] == (1, 7):
            raise Killed
        return train_step(self, batch, position, **options)

    monkeypatch.setattr(LinearHeads, "step", until)
    with pytest.raises(Killed):
        evaluate(config, "parts")
    steps_before, steps[:] = steps[:], [(1, 7)]
    parts = evaluate(config, "parts", resume=True)
    assert steps_before[-1] == (1, 7)
    assert steps[1:4] == [(1, 6), (1, 7), (1, 8)]
    assert (parts["rates"], parts["top1"]) == (whole["rates"], whole["top1"])


def test_a_checkpoint_of_another_evaluation_is_refused(evaluate, tmp_path):
    with pytest.raises(UserError, match="36 samples do not fill one batch of 64"):
        evaluate(replace(FULL, batch_size=64), "none")
    evaluate(FULL)
    (tmp_path / "out" / "linear.json").unlink()
    with pytest.raises(UserError, match=r"another evaluation: config.momentum: 0.9 -> 0.5"):
        evaluate(replace(FULL, momentum=0.5), resume=True)
    evaluate(replace(FULL, checkpoint_every_steps=9), resume=True)  # that changes nothing


def test_other_pixels_are_another_evaluation(shards, val, tmp_path):
    """Of a network whose file does not say them."""
    weights, out = tmp_path / "weights.pth", tmp_path / "out"
    torch.save(ResNet(Arch(18, 8, 8, 8)).state_dict(), weights)

    def evaluated(pixels: str, *, resume: bool):
        reading = {"preprocessing": parse_preprocessing(pixels), "resume": resume}
        return Evaluation(CONFIG, str(weights), str(shards), str(val), out, **reading).run()

    evaluated("imagenet", resume=False)
    with pytest.raises(UserError, match=r"another evaluation: view.mean: \[.*-> \[0.5, 0.5, 0.5\]"):
        evaluated("half", resume=True)


def test_a_knn_result_without_the_usual_k_is_kept(evaluate, capsys, monkeypatch):
    config = replace(CONFIG, protocol="knn", knn_k=(1, 5))
    first = evaluate(config)
    assert first["top1"] is None
    monkeypatch.setattr(run, "extract", None)  # it would fail
    assert evaluate(config, resume=True) == json.loads(json.dumps(first))
    assert "damaged" not in capsys.readouterr().err


def test_cached_chooses_on_the_held_out_part_alone(evaluate, monkeypatch):
    """With other labels in the validation set the same rate is chosen: it never decides."""
    config = replace(CONFIG, num_lrs=6, init_std=1.0, epochs=20, holdout=0.3, refit=False)
    first = evaluate(config, "first")
    held_out = [row["held_out_top1"] for row in first["rates"]]
    assert len(set(held_out)) > 1
    assert first["rates"][first["chosen"]]["held_out_top1"] == max(held_out)
    assert first["top1"] == first["rates"][first["chosen"]]["val_top1"]
    labels = ShardIndex.labels.fget
    assert labels is not None

    def turned(index):
        own = labels(index)
        return 1 - own if len(own) == 24 else own

    monkeypatch.setattr(ShardIndex, "labels", property(turned))
    second = evaluate(config, "second")
    assert [row["held_out_top1"] for row in second["rates"]] == held_out
    assert second["chosen"] == first["chosen"]
    for a, b in zip(first["rates"], second["rates"], strict=True):
        assert a["val_top1"] == pytest.approx(1 - b["val_top1"])


def test_a_refit_is_a_training_on_all_labels_at_the_chosen_rate(evaluate):
    config = replace(CONFIG, holdout=0.3)
    refitted = evaluate(config, "refitted")
    assert refitted["refitted"]
    assert refitted["selection"]["n"] == 12
    rate = refitted["chosen_base_lr"]
    alone = evaluate(replace(config, lrs=[rate], holdout=0.0), "alone")
    assert not alone["refitted"]
    assert alone["selection"] is None
    assert (alone["top1"], alone["per_class"]) == (refitted["top1"], refitted["per_class"])


def test_a_fraction_is_written_down_and_can_be_named_again(evaluate, tmp_path):
    first = evaluate(replace(CONFIG, fraction=0.5), "first")
    assert first["data"]["train"]["num_used"] == 20
    names = (tmp_path / "first" / "subset.txt").read_text().split()
    assert len(names) == 20
    listed = replace(CONFIG, subset_list=str(tmp_path / "first" / "subset.txt"))
    assert evaluate(listed, "second")["rates"] == first["rates"]
    evaluate(CONFIG, "whole")
    assert not (tmp_path / "whole" / "subset.txt").exists()


def test_knn_grid_equals_the_probes_knn_in_each_cell(evaluate, frozen, shards, val):
    config = replace(CONFIG, protocol="knn", knn_k=[1, 7, 20], knn_temperature=[0.05, 0.07, 1.0])
    result = evaluate(config)
    bank, queries = (central_features(frozen, folder) for folder in (shards, val))
    knn = result["knn"]
    for row, k in zip(knn["top1"], knn["ks"], strict=True):
        for value, temperature in zip(row, knn["temperatures"], strict=True):
            assert [[value]] == knn_grid(*bank, *queries, ks=[k], temperatures=[temperature])
    assert result["top1"] == knn["top1"][2][1]  # k = 20, temperature 0.07
    assert result["rates"] == []


def test_a_finished_evaluation_is_given_back_and_not_run_again(evaluate, monkeypatch, tmp_path):
    first = evaluate(CONFIG)
    shared = tmp_path / "out" / "features"
    with monkeypatch.context() as patched:
        patched.setattr(FrozenBackbone, "__call__", None)  # nothing passes the network again
        evaluate(replace(CONFIG, epochs=2), "other", features=shared)
        evaluate(replace(CONFIG, protocol="knn"), "knn", features=shared)
    with pytest.raises(UserError, match=r"holds an evaluation already: .*--resume"):
        evaluate(CONFIG)
    monkeypatch.setattr(run, "extract", None)  # it would fail
    assert evaluate(CONFIG, resume=True) == json.loads(json.dumps(first))
    with pytest.raises(UserError, match=r"another evaluation: config.epochs: 3 -> 4"):
        evaluate(replace(CONFIG, epochs=4), resume=True)


def test_the_result_says_what_it_was_made_of(evaluate, weights, tmp_path):
    result = evaluate(CONFIG)
    on_disk = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert on_disk == result
    assert result["format"] == "fa-linear-1"
    description = result["checkpoint"]
    assert description["name"] == "tiny.pth"
    assert len(description["file_sha256"]) == 64
    assert result["preprocessing"]["image_size"] == 32
    assert result["peak_memory_bytes"] > 50e6
    assert set(result["seconds"]) == {
        "open", "extract_train", "extract_val", "sweep", "evaluate", "refit",
    }  # fmt: skip
    text = table(result)
    assert "40 of 40 labels, 24 validation pictures, 2 classes" in text
    assert f"top-1 {100 * result['top1']:.2f} %" in text
    for number, is_end in ((0, True), (1, False), (2, True)):
        changed = result | {"chosen_base_lr": result["rates"][number]["base_lr"]}
        assert ("that is an end of the sweep" in table(changed)) == is_end


CHANGES = {
    "seed": 2, "image_size": 40, "fraction": 0.5, "holdout": 0.4, "num_lrs": 2, "lr_min": 0.1,
    "lr_max": 5.0, "lrs": [0.7, 0.1], "epochs": 2, "batch_size": 16, "optimizer": "lars",
    "momentum": 0.5, "nesterov": True, "weight_decay": 0.3, "init_std": 0.3,
    "schedule": "cosine_epochs", "passes": 1, "refit": False,
    "precision": "bf16",
}  # fmt: skip
FULL_CHANGES = {
    "crop_scale": (0.9, 1.0), "flip_probability": 0.0, "last_batch": "pad", "shuffle_window": 4,
}  # fmt: skip
FULL_BATCHES = replace(FULL, batch_size=11, epochs=2)
ELSEWHERE = {
    "protocol": "all tests here", "subset_list": "test_a_fraction_is_written_down..",
    "milestones": "test_linear_heads.py", "gamma": "test_linear_heads.py",
    "lars_eta": "test_linear_heads.py", "knn_k": "test_knn_grid..",
    "knn_temperature": "test_knn_grid..", "checkpoint_every_steps": "test_training_goes_on..",
    "num_workers": "test_linear_features.py", "device": "pretrain.collectives",
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(weights, shards, val, tmp_path_factory):
    """Weights of the classifiers without a change, by protocol; and the folder of features."""
    found, features = {}, tmp_path_factory.mktemp("features")
    for config in (CONFIG, FULL_BATCHES):
        out = tmp_path_factory.mktemp(config.protocol)
        Evaluation(config, str(weights), str(shards), str(val), out, features=features).run()
        found[config.protocol] = heads_of(out)[0]
    return found, features


def test_every_key_is_covered():
    assert {key.name for key in fields(LinearConfig)} == {*CHANGES, *FULL_CHANGES, *ELSEWHERE}


@pytest.mark.parametrize("key", [*CHANGES, *FULL_CHANGES])
def test_every_key_changes_the_classifiers(evaluate, unchanged, tmp_path, key):
    config = CONFIG if key in CHANGES else FULL_BATCHES
    a, features = unchanged[0][config.protocol], unchanged[1]
    evaluate(replace(config, **{key: (CHANGES | FULL_CHANGES)[key]}), "b", features=features)
    is_refitted = (tmp_path / "b" / "refit").exists()
    b = heads_of(tmp_path / "b")[0]
    assert a.shape != b.shape or not torch.equal(a, b) or (key == "refit" and not is_refitted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction=0.0: must be above 0, at most 1"),
        ({"fraction": 0.1, "subset_list": "x"}, "both choose the training samples"),
        ({"holdout": 0.0}, r"holdout=0 leaves nothing to select one of 10 rates with"),
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"lr_min": 2.0, "lr_max": 1.0}, "lr_max=1.0: must be at least lr_min=2.0"),
        ({"lrs": [0.1, 0.1]}, r"lrs=\[0.1, 0.1\]: must be some different numbers above 0"),
        ({"knn_temperature": [0.0]}, r"knn_temperature=\[0.0\]: must be some different numbers"),
        ({"milestones": [3]}, "milestones go with schedule=step"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov=true needs optimizer=sgd and momentum"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale=.* must be 0 < low <= high <= 1"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LinearConfig(**options)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "linear").glob("*.yaml")), ids=str)
def test_every_config_loads_and_is_a_published_protocol(path):
    config = read_settings(LinearConfig, path, [])
    assert config.protocol == "full"
    assert config.weight_decay == 0
    head = path.read_text().split("\nprotocol")[0]
    for word in ("Source:", "Command:", "Expected:", "GPU-hours:"):
        assert word in head


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("protocol", ["full", "cached"])
def test_two_processes_get_what_one_gets(weights, shards, val, tmp_path, protocol):
    """Also where one process finishes features that two had begun."""
    options = [
        str(weights), "--train", str(shards), "--val", str(val), "image_size=32", "num_workers=0",
        "epochs=2", "batch_size=8", "lrs=[3.0,0.1]", "device=cpu", "--protocol", protocol,
        *(["schedule=cosine", "milestones=null"] if protocol == "full" else []),
    ]  # fmt: skip
    assert linear_eval.main([*options, "--out", str(tmp_path / "one")]) == 0
    options += ["--out", str(tmp_path / "two")]
    assert_well(run_group(linear_eval.main, (options,)))
    one, two = (
        json.loads((tmp_path / name / "linear.json").read_text()) for name in ("one", "two")
    )
    assert one["rates"] == two["rates"]
    if protocol == "full":
        a, b = (heads_of(tmp_path / name)[0] for name in ("one", "two"))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    else:
        a, b = (
            {f.name: f.read_bytes() for f in (tmp_path / name / "features").glob("*.npy")}
            for name in ("one", "two")
        )
        assert a == b
        assert len(a) == 2
