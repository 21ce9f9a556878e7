"""The training command: results, exact repetition, resume, refusals."""

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.engine.hooks import PeriodicWriter
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image

from common import threads
from common.annotations.record import read_set
from common.files import read_json as read
from detection.training.config import load_config, parse_overrides
from detection.training.data import BoxMapper, build_train_loader, register, to_detectron2
from detection.training.run import ArmSettings, prepare
from detection.training.trainer import Trainer
from detection.training.weights import calibrate_frozen_norms
from tests.detection.tiny_detection import CLASSES, CONFIGS, make_coco, make_official
from tests.locks import holding
from tools import train_voc as command

RESULT_KEYS = {
    *("arm", "seed", "AP", "AP50", "AP75", "per_class", "per_class_AP50", "iterations", "seconds"),
    *("weights", "frozen", "metric_year", "peak_memory_bytes"),
}


def final_model(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_same_training(one: Path, two: Path, *, but: str = "nothing") -> None:
    a, b = final_model(one), final_model(two)
    assert [name for name in a if not torch.equal(a[name], b[name]) and but not in name] == []
    assert read(one / "result.json")["per_class"] == read(two / "result.json")["per_class"]
    losses = [
        [row["total_loss"] for row in map(json.loads, lines) if "total_loss" in row]
        for lines in ((folder / "metrics.json").read_text().splitlines() for folder in (one, two))
    ]  # fmt: skip
    assert losses[0][-1] == losses[1][-1]


def test_results_have_the_agreed_shape(train, thin_weights, tmp_path):
    words = ("--seeds", "0,3", "--eval-every", "2", "SOLVER.CHECKPOINT_PERIOD=1")
    assert train(str(thin_weights), *words) == 0
    for seed in (0, 3):
        folder = tmp_path / "out" / f"seed-{seed}"
        result = read(folder / "result.json")
        assert set(result) >= RESULT_KEYS
        assert (result["arm"], result["seed"], result["iterations"]) == ("pretrained", seed, 3)
        assert set(result["per_class"]) <= set(CLASSES)
        assert result["peak_memory_bytes"] > 1e8
        assert result["classes"] == list(CLASSES)
        assert set(result["coco"]) >= {"AP", "AP50", "AP75", "per_class"}
        curves = read(folder / "pr.json")
        assert len(curves["recall"]) == 101
        assert set(curves["classes"]) == set(result["per_class"])
        curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        assert [point["iteration"] for point in curve] == [2, 3]
        assert curve[-1]["AP50"] == result["AP50"]
        errors = read(folder / "errors.json")
        assert errors["AP50"] == pytest.approx(result["AP50"], abs=1e-9)
        assert set(errors["classes"]) == set(CLASSES)
        shown = read(folder / "detections.json")
        assert {key for row in shown for found in row["detections"] for key in found} <= {
            *("class", "score", "box", "kind")
        }
        assert [row["file_name"] for row in shown] == [
            f"VOC2007/JPEGImages/{index:06d}.jpg" for index in range(8, 12)
        ]
        labels = read(folder / "labels.json")
        counts = {row["use"]: (row["num_pictures"], row["num_objects"]) for row in labels["lists"]}
        assert counts == {"training": (8, 8), "test": (4, 4)}
        assert all(sum(row["sizes"]) == row["num_objects"] for row in labels["lists"])
        assert sorted(labels["lists"][0]["objects"].values()) == [2, 3, 3]
        assert [row["file_name"][-10:] for row in labels["samples"]] == [
            f"{place:06d}.jpg" for place in (0, 1, 2, 4, 5, 6)
        ]
        assert (folder / "config.yaml").is_file()
        assert sorted(path.name for path in folder.glob("*.pth")) == ["model_final.pth"]
    summary = read(tmp_path / "out" / "summary.json")
    assert (summary["n"], summary["seeds"]) == (2, [0, 3])
    assert set(summary["mean"]) == set(summary["std"]) == {"AP", "AP50", "AP75"}
    assert set(summary["coco"]) == {"AP", "AP50", "AP75"}


class Killed(BaseException):
    """Not an Exception: nothing in the loop may catch it, as nothing catches SIGKILL."""


def close_files(trainer: Trainer) -> None:
    for hook in trainer._hooks:
        for writer in hook._writers if isinstance(hook, PeriodicWriter) else ():
            writer.close()


@contextlib.contextmanager
def killed_at(iteration: int) -> Iterator[None]:
    """Training within ends before an iteration, and does nothing else."""
    run_step = Trainer.run_step

    def die(self: Trainer) -> None:
        if self.iter == iteration:
            raise Killed
        run_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_step", die)
        patch.setattr(Trainer, "after_train", close_files)
        with pytest.raises(Killed):
            yield


def test_interrupted_run_ends_as_the_uninterrupted_one(train, tmp_path):
    schedule = ("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "2")
    assert train("random", *schedule, out="whole") == 0
    with killed_at(3):
        train("random", *schedule, out="killed")
    folder = tmp_path / "killed" / "seed-0"
    assert not (folder / "result.json").exists()
    (folder / "model_0000009.pth.77.partial").write_text("half a checkpoint")
    (folder / "curve.jsonl").write_text("")  # killed between checkpoint and evaluation
    assert train("random", *schedule, "--seeds", "0,1", out="killed") == 0
    assert_same_training(tmp_path / "whole" / "seed-0", folder)
    a, b = (final_model(tmp_path / "killed" / f"seed-{seed}") for seed in (0, 1))
    assert not torch.equal(a["backbone.stem.conv1.weight"], b["backbone.stem.conv1.weight"])
    curve = tmp_path / "whole" / "seed-0" / "curve.jsonl"
    assert curve.read_text() == (folder / "curve.jsonl").read_text()
    assert not list(folder.glob("*.partial"))
    assert "resuming after iteration 2" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_a_finished_seed_trains_on_as_if_it_had_been_longer_from_the_start(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    schedule = ("SOLVER.STEPS=(2,)", "SOLVER.WARMUP_ITERS=1", "SOLVER.CHECKPOINT_PERIOD=2")
    longer = (*schedule[1:], "SOLVER.STEPS=(2,3)", "SOLVER.MAX_ITER=6")
    assert train("random", *longer, out="whole") == 0
    assert train("random", *schedule) == 0
    folder = tmp_path / "out" / "seed-0"
    result, state = read(folder / "result.json"), final_model(folder)
    for words, message in {
        ("SOLVER.MAX_ITER=6", "SOLVER.WARMUP_ITERS=1"): r"2 had 0.1 times .* has 1 there; give "
        r"SOLVER.STEPS=\[2\], too \(STEPS may have more, from 3 on\), or choose another --out",
        (*longer, "SOLVER.LR_SCHEDULER_NAME=WarmupCosineLR"): "made with other settings",
        (*longer, "SOLVER.BASE_LR=0.5"): "made with other settings",
        (*schedule, "SOLVER.MAX_ITER=2", "SOLVER.STEPS=(1,)"): "made with other settings",
    }.items():
        assert train("random", *words) == 2
        assert re.search(message, capsys.readouterr().err)
    assert read(folder / "result.json") == result

    # Killed on its way, it goes on from the later checkpoint, not from the end of the shorter one.
    with killed_at(5):
        train("random", *longer)
    assert not (folder / "result.json").exists()
    assert all(torch.equal(value, state[name]) for name, value in final_model(folder).items())
    assert train("random", *longer) == 0
    log = (folder / "log.txt").read_text()
    assert "resuming after iteration 3 of 6" in log
    assert "resuming after iteration 4 of 6" in log
    # Precise batch norm measured once more, at the end of the shorter one; only it counts that.
    assert_same_training(tmp_path / "whole" / "seed-0", folder, but="num_batches_tracked")


def test_a_cosine_cannot_be_made_longer(train, capsys):
    cosine = ("SOLVER.LR_SCHEDULER_NAME=WarmupCosineLR", "SOLVER.WARMUP_ITERS=1")
    assert train("random", *cosine, "SOLVER.MAX_ITER=2") == 0
    assert train("random", *cosine, "SOLVER.MAX_ITER=6") == 2
    message = capsys.readouterr().err
    assert re.search(r"cannot go on to SOLVER.MAX_ITER 6: .*WarmupCosineLR.*; choose", message)


def test_finished_seed_is_kept_and_changed_settings_are_refused(train, tmp_path, capsys):
    folder = tmp_path / "out" / "seed-0"
    assert train("random") == 0
    result = folder / "result.json"
    # A kill during the last evaluation costs only the evaluation.
    figures, state = read(result), final_model(folder)
    result.unlink()
    (folder / "curve.jsonl").unlink()
    assert train("random") == 0
    assert read(result)["per_class"] == figures["per_class"]
    assert json.loads((folder / "curve.jsonl").read_text())["iteration"] == 3
    assert all(torch.equal(value, state[name]) for name, value in final_model(folder).items())
    before = result.stat().st_mtime_ns
    assert train("random") == 0
    assert result.stat().st_mtime_ns == before
    assert train("random", "SOLVER.BASE_LR", "0.5") == 2
    message = capsys.readouterr().err
    assert re.search(r"SOLVER\.BASE_LR: \S+ -> 0\.5", message)
    assert "--overwrite" in message
    assert train("random", "--overwrite", "SOLVER.BASE_LR", "0.001") == 0
    assert result.stat().st_mtime_ns != before


def test_what_a_power_loss_leaves_of_a_seed_is_mended_or_named(
    train, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("common.files.HOLD_SECONDS", 0.2)
    folder = tmp_path / "out" / "seed-0"
    assert train("random", "SOLVER.MAX_ITER", "2") == 0
    figures, state = read(folder / "result.json"), final_model(folder)
    shutil.copy(folder / "model_final.pth", folder / "model_0000000.pth")
    for content in (b"", b"[]"):  # more kinds of damage: common/test_files.py
        (folder / "result.json").write_bytes(content)
        (folder / "last_checkpoint").write_bytes(content)
        (folder / "curve.jsonl").write_bytes(content + b'\n{"AP": 1}\n')
        (folder / "model_final.pth").write_bytes(content)  # the one before it is whole
        assert train("random", "SOLVER.MAX_ITER", "2") == 0
        printed = "".join(capsys.readouterr())
        assert "result.json is damaged; the seed is evaluated again" in printed
        assert "curve.jsonl has 2 damaged lines, left out: 1, 2" in printed
        assert "model_final.pth: not a readable PyTorch checkpoint" in printed
        assert read(folder / "result.json")["per_class"] == figures["per_class"]
        assert all(torch.equal(value, state[name]) for name, value in final_model(folder).items())
        shutil.copy(folder / "model_final.pth", folder / "model_0000000.pth")
        (folder / "run.json").rename(folder / "kept")
        (folder / "run.json").write_bytes(content)
        assert train("random", "SOLVER.MAX_ITER", "2") == 2
        assert "seed-0: run.json, which tells its settings, is missing or damaged" in (
            capsys.readouterr().err
        )
        (folder / "kept").rename(folder / "run.json")
    (folder / ".lock").touch()  # of a holder that was killed
    assert train("random", "SOLVER.MAX_ITER", "2") == 0
    with holding(folder / ".lock") as other:
        assert train("random", "SOLVER.MAX_ITER", "2") == 2
        assert f"seed-0: process {other.pid} on " in capsys.readouterr().err
    assert not (folder / ".lock").exists()


def test_frozen_arms_are_calibrated_and_do_not_train(train, thin_weights, tmp_path, voc_root):
    path = voc_root / "VOC2007/Annotations/000000.xml"
    path.write_text(re.sub(r"<xmin>\d+<", "<xmin>0<", path.read_text()))
    assert train(str(thin_weights), "--freeze") == 0
    folder = tmp_path / "out" / "seed-0"
    assert read(folder / "result.json")["arm"] == "pretrained_frozen"
    assert read(folder / "result.json")["frozen"] is True
    log = (folder / "log.txt").read_text()
    assert "43 frozen batch norms: statistics measured" in log
    assert f"{voc_root}: 1 boxes up to 1 pixel outside their picture: clipped\n" in log
    given, state = pickle.loads(thin_weights.read_bytes())["model"], final_model(folder)
    for name, value in given.items():
        if name.startswith("res5"):
            continue
        same = torch.equal(state[f"backbone.{name}"], torch.from_numpy(value))
        assert same != name.endswith(("running_mean", "running_var")), name


def test_calibration_measures_what_a_training_forward_sees(voc_root: Path) -> None:
    """One batch: the calibrated frozen network equals a trainable one in training mode."""
    voc = read_set(voc_root)
    networks = []
    for freeze_at in (4, 0):
        overrides = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", str(freeze_at)]
        cfg = load_config(CONFIGS / "thin_R50_C4.yaml", parse_overrides(overrides))
        cfg.DATASETS.TRAIN = register(voc)[0]
        torch.manual_seed(0)
        networks.append(build_model(cfg))
    frozen, free = networks
    batch = next(iter(build_train_loader(cfg)))
    with torch.no_grad():
        before = frozen.backbone(frozen.preprocess_image(batch).tensor)["res4"]
        assert calibrate_frozen_norms(frozen, [batch], 1) == 43
        after = frozen.backbone(frozen.preprocess_image(batch).tensor)["res4"]
        expected = free.train().backbone(free.preprocess_image(batch).tensor)["res4"]
    assert torch.allclose(after, expected, atol=2e-2 * expected.abs().max())
    assert not torch.allclose(before, expected, atol=2e-2 * expected.abs().max())
    kinds = {type(module) for name, module in frozen.backbone.named_modules() if "norm" in name}
    assert kinds == {FrozenBatchNorm2d}
    assert frozen.training


def test_training_positions_do_not_depend_on_where_one_starts(voc_root: Path) -> None:
    cfg = load_config(CONFIGS / "thin_R50_C4.yaml", {"MODEL.DEVICE": "cpu"})
    cfg.DATASETS.TRAIN, cfg.SEED = register(read_set(voc_root))[0], 7

    def batches(start: int) -> list[list[tuple[str, int]]]:
        stream = iter(build_train_loader(cfg, start_iteration=start))
        return [[(item["image_id"], int(item["image"].sum())) for item in next(stream)]
                for _ in range(6 - start)]  # fmt: skip

    whole = batches(0)
    assert batches(2) == whole[2:]
    epoch = [image_id for batch in whole[:2] for image_id, _ in batch]
    assert len(set(epoch)) == 8  # each picture once an epoch


@pytest.mark.parametrize("colours", ["RGB", "BGR"])
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("orientation", [1, 4, 6])
def test_examples_are_those_of_detectron2s_mapper(colours, is_train, orientation, tmp_path):
    """And pictures that it reads wrongly come out right: 16 bits."""
    cfg = load_config(CONFIGS / "thin_R50_C4.yaml", {"MODEL.DEVICE": "cpu"})
    cfg.INPUT.FORMAT = colours
    exif, pixels = Image.Exif(), np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    exif[0x112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    width, height = (50, 70) if orientation == 6 else (70, 50)
    box = {"category_id": 1, "bbox": [3.0, 4.0, 30.0, 44.0], "bbox_mode": BoxMode.XYXY_ABS}
    picture = {"file_name": str(tmp_path / "a.jpg"), "width": width, "height": height}
    picture["annotations"] = [box]
    kinds: list[Any] = [BoxMapper, DatasetMapper]
    mappers = [kind(cfg, is_train=is_train) for kind in kinds]
    examples = []
    for mapper in mappers:
        np.random.seed(4)  # noqa: NPY002
        examples.append(mapper(picture))
    ours, theirs = examples
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    if is_train:
        boxes = [example["instances"].gt_boxes.tensor for example in examples]
        assert torch.equal(*boxes)
    Image.fromarray(pixels[..., 0].astype(np.uint16) << 8).save(tmp_path / "a.png")
    picture |= {"file_name": str(tmp_path / "a.png"), "width": 70, "height": 50}
    assert 100 < mappers[0](picture)["image"].float().mean() < 155


def test_mixed_precision_on_a_cpu_learns_nearly_the_same(train, tmp_path):
    # bfloat16 takes ten times as long as float32 where the processor lacks it: few ROIs.
    few = ("SOLVER.IMS_PER_BATCH=1", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=2")
    few += ("MODEL.RPN.POST_NMS_TOPK_TEST=2",)
    losses = []
    for number, words in enumerate(([], ["SOLVER.AMP.ENABLED=True"])):
        assert train("random", *few, *words, out=str(number)) == 0
        metrics = tmp_path / str(number) / "seed-0/metrics.json"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses.append(next(row["total_loss"] for row in rows if "total_loss" in row))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.3)


def test_coco_trains_and_its_own_metric_is_the_result(tmp_path, tiny_overrides):
    options = ["random", "--config", str(CONFIGS / "thin_R50_C4.yaml"), "--out",
               str(tmp_path / "out"), "--data", str(make_coco(tmp_path / "coco"))]  # fmt: skip
    assert command.main([*options, *tiny_overrides]) == 0
    result = read(tmp_path / "out/seed-0/result.json")
    assert result["metric_year"] is None
    assert result["AP"] == result["coco"]["AP"]
    assert set(result["per_class_AP75"]) == set(result["coco"]["per_class"])
    assert command.main([*options, "--metric-year", "2007", *tiny_overrides]) == 2


def test_retinanet_trains_with_as_many_classes_as_the_set_has(train, tmp_path):
    retinanet = {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": "['res3','res4','res5']",
        "MODEL.FPN.IN_FEATURES": "['res3','res4','res5']",
        "MODEL.FPN.OUT_CHANNELS": "16",
        "MODEL.RETINANET.NUM_CONVS": "1",
    }
    assert train("random", *(f"{key}={value}" for key, value in retinanet.items())) == 0
    bias = final_model(tmp_path / "out/seed-0")["head.cls_score.bias"]
    assert len(bias) == 9 * len(CLASSES)  # nine anchors


def test_a_config_says_which_lists_of_a_devkit_count(tmp_path: Path) -> None:
    root = make_official(tmp_path / "VOCdevkit")
    arm = prepare(ArmSettings(None, CONFIGS / "voc0712_R50_C4_24k.yaml", root))
    assert [split.folder.name for split in arm.data.train] == ["VOC2007", "VOC2012"]
    assert prepare(ArmSettings(None, CONFIGS / "thin_R50_C4.yaml", root)).data.num_train == 1


def test_a_seed_that_goes_on_has_as_many_threads_as_before(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads are only set: to compute with them would take three times as long."""
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(threads, "free_cores", lambda: 1.0)
    chosen = [1]
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    assert train("random") == 0
    assert read(tmp_path / "out/seed-0/run.json")["num_threads"] == 1
    monkeypatch.setattr(threads, "free_cores", lambda: 2.0)  # idle now
    assert train("random", "SOLVER.MAX_ITER=4", "SOLVER.STEPS=[2]") == 0
    assert read(tmp_path / "out/seed-0/run.json")["num_threads"] == 1
    assert read(tmp_path / "out/seed-0/result.json")["num_threads"] == 1
    assert train("random", "--seeds", "1") == 0
    assert read(tmp_path / "out/seed-1/result.json")["num_threads"] == 2


def test_a_protocol_is_scaled_to_one_gpu(train: Callable[..., int], tmp_path: Path) -> None:
    """Made for four GPUs and 4 pictures; the tiny overrides say 2 pictures and 3 iterations."""
    assert train("random", "--num-gpus", "auto", "SOLVER.REFERENCE_WORLD_SIZE", "4") == 0
    settings = read(tmp_path / "out/seed-0/run.json")["settings"]
    assert settings["SOLVER.REFERENCE_WORLD_SIZE"] == settings["num_gpus"] == 1
    assert settings["SOLVER.IMS_PER_BATCH"] == 2
    assert settings["SOLVER.BASE_LR"] == pytest.approx(0.03)
    assert settings["SOLVER.MAX_ITER"] == 3


def test_same_annotations_as_detectron2_reads(voc_root: Path) -> None:
    voc = read_set(voc_root)
    ours = to_detectron2(voc.train[0], voc.classes)
    theirs = load_voc_instances(str(voc_root / "VOC2007"), "train", CLASSES)
    assert [{**row, "image_id": str(row["image_id"])} for row in theirs] == ours
    for _ in range(2):  # a second time in the same process changes nothing
        train, test = register(voc)
    assert DatasetCatalog.get(train[0]) == ours
    assert MetadataCatalog.get(test).thing_classes == list(CLASSES)


REFUSALS = {
    "no such weights": (["none.pkl"], "no such weights"),
    "seeds": (["random", "--seeds", "0,0"], "different integers"),
    "large seed": (["random", "--seeds", "4294967296"], "below 2^32"),
    "gpus": (["random", "--num-gpus", "64"], "this machine has"),
    "key": (["random", "SOLVER.LR", "1"], "unknown key SOLVER.LR"),
    "step": (["random", "--check", "MODEL.PIXEL_MEAN=[1.0,2.0]"], "Detectron2 cannot train"),
    "augmentation": (
        ["random", "--check", "INPUT.CROP.ENABLED=True", "INPUT.CROP.SIZE=[1,2,3]"],
        "Detectron2 cannot train",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_end_with_one_line(case, train, capsys):
    arguments, message = REFUSALS[case]
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_picture_that_does_not_decode_is_named(train, voc_root, capsys):
    for index in range(8):
        file = voc_root / "VOC2007" / "JPEGImages" / f"{index:06d}.jpg"
        file.write_bytes(file.read_bytes()[:700])
    assert train("random") == 2
    assert ".jpg: does not decode" in capsys.readouterr().err
    assert train("random", "--check") == 2
    assert "--max-left-out 8 leaves out all 8" in capsys.readouterr().err


def test_pictures_that_do_not_decode_are_left_out(
    train: Callable[..., int], voc_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    num_all = read_set(voc_root).num_train
    file = read_set(voc_root).train[0].pictures[0].file
    file.write_bytes(file.read_bytes()[:700])
    assert train("random", "--max-left-out", "1", "--check", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["num_train"] == num_all - 1
    assert f"{file.name}: does not decode" in told["notes"][-1]


def test_diverging_training_is_no_users_mistake(train, capsys):
    assert train("random", "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0") == 1
    assert "error: Predicted boxes or scores contain Inf/NaN" in capsys.readouterr().err


SMALL = ["R18_C4.yaml", "R18_FPN.yaml", "R50_C4.yaml", "voc0712_R18_FPN_24k.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("config", SMALL)
def test_every_small_detector_trains(config, train, tmp_path):
    assert train("random", "DATALOADER.NUM_WORKERS", "0", config=config) == 0
    assert (tmp_path / "out" / "summary.json").is_file()
