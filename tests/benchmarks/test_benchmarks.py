"""Each benchmark runs at a tiny size and keeps the keys of its JSON; turns are fair."""

import importlib
import io
import json
import statistics
import time

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset
from PIL import Image

from benchmarks import cost_growth, fa_overhead, harness, loader, predict
from common.errors import UserError

TINY = (
    "--device cpu --width 4 --image-size 32 --batch-size 4 --queue-size 64 --dim 8 --hidden-dim 8"
)
STEP = TINY.split()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def figures_of(module, arguments, tmp_path):
    out = tmp_path / "figures.json"
    assert module.main([*arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("detection_step", "--cells R18_FPN", "give CONFIG@PIXELS"),
        ("fa_overhead", f"{TINY} --cells infonce/post/mask", "names nothing that can train"),
        ("fa_overhead", f"{TINY} --cells byol/*/nn,byol/nn,*/up", "'byol/nn', '*/up' names none"),
        ("fa_overhead", "--repeats 0", "--repeats: 0: give 1 or more"),
        ("cost_growth", "--axes sideways", "unknown value 'sideways'"),
        ("loader", "--num-photos 24 --batch-size 16", "multiple of 16, --num-photos of --batch"),
        ("train_step", "--peak-tflops -1", "--peak-tflops -1.0: must be more than 0"),
        ("train_step", "--json no/such/folder/step.json", "its folder does not exist"),
    ],
)
def test_wrong_arguments(name, arguments, message, capsys):
    try:
        status = importlib.import_module(f"benchmarks.{name}").main(arguments.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_slower_candidate_has_a_lower_rate_and_takes_its_turns():
    turns = []

    def candidate(name, seconds):
        return loader.picture_rate(lambda: (turns.append(name), spin(seconds)), 10, 0.0)

    candidates = {"fast": candidate("fast", 0.01), "slow": candidate("slow", 0.03)}
    found = harness.take_turns(candidates, 3)
    assert turns == ["fast", "slow"] * 4  # the first turn of each warms up
    ratio = statistics.median(found["fast"]) / statistics.median(found["slow"])
    assert ratio == pytest.approx(3, rel=0.2)
    # Processor time counts, not waiting.
    rate = loader.picture_rate(lambda: (time.sleep(0.1), spin(0.02)), 1, 0.0)()
    assert 0.02 <= 1 / rate < 0.1


def test_pictures_are_like_real_ones(tmp_path):
    for data in (jpegs := harness.encoded_photos(2)):
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(data)
        assert (height, width, subsampling) == (375, 500, "420")
    assert 45e3 < statistics.mean(map(len, jpegs)) < 60e3
    # Those of a folder are fitted and repeated.
    image = np.zeros((900, 1000, 3), np.uint8)
    image[:, :500] = (250, 10, 10)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(np.full((1000, 500, 3), 90, np.uint8)).save(tmp_path / "b.webp", lossless=True)
    Image.fromarray(image[:300]).save(tmp_path / "too_small.jpg")
    found = loader.photos_of_folder(tmp_path, 3)
    assert found[0] == found[2] != found[1]
    with Image.open(io.BytesIO(found[0])) as picture:
        assert picture.size == (500, 375)
        assert np.abs(np.asarray(picture)[:, :240].astype(int) - (250, 10, 10)).max() < 20
    with pytest.raises(UserError, match="no JPEG, PNG or WebP of at least 500 x 375 pixels"):
        loader.photos_of_folder(tmp_path / "nothing", 1)


@pytest.mark.slow
def test_fa_overhead(tmp_path):
    cells = "byol/parallel/nn@4,infonce/parallel/mask,infonce/post/mask,deepclusterv2/basic/mask"
    arguments = [*STEP, "--repeats", "2", "--fa-repeats", "2", "--cells", cells]
    figures = figures_of(fa_overhead, arguments, tmp_path)
    assert "no gradient reaches" in figures["refused"]["infonce/post/mask"]
    trained = ["byol/parallel/nn@4", "deepclusterv2/basic/mask", "infonce/parallel/mask"]
    assert list(figures["cells"]) == trained
    for name, cell in figures["cells"].items():
        assert min(cell["ms"], cell["fa_ms"], figures["baseline_ms"]) > 0
        assert cell["fa_share"] == pytest.approx(cell["fa_ms"] / cell["baseline_ms"])
        assert cell["ratio_range"][0] <= cell["ratio"] <= cell["ratio_range"][1]
        assert cell["num_features"] == (4 if name.endswith("@4") else 1)
    assert (figures["device"], figures["sizes"]["queue_size"]) == ("cpu", 64)


@pytest.mark.slow
def test_cost_growth(tmp_path, monkeypatch, capsys):
    photos = harness.encoded_photos(2)
    monkeypatch.setattr(harness, "encoded_photos", lambda num: photos[:num])
    figures = figures_of(cost_growth, ["--tiny"], tmp_path)
    costs = {
        axis: {cost["what"]: cost for cost in found["costs"]}
        for axis, found in figures["axes"].items()
    }
    assert list(costs) == ["pictures", "processes", "queue", "features", "epochs"]
    for axis, found in figures["axes"].items():
        for cost in found["costs"]:
            assert len(cost["values"]) == len(found["sizes"]) >= 3
            assert min(cost["values"]) > 0, axis
    # By hand: 4 rows of 8 floats of each process enter the queue, with sample ids and labels.
    gathered = costs["processes"]["BYOL with nn: gathered"]
    of_one = 4 * (8 * 4 + 8 + 8)
    assert [value * 2**20 for value in gathered["values"]] == [of_one, 2 * of_one, 4 * of_one]
    assert gathered["law"]["exponent"] == pytest.approx(1)
    # A queue's entry is 8 floats and three numbers of 8 bytes; beside them stand three numbers.
    memory = costs["queue"]["memory, float32"]["values"]
    assert [value * 2**20 for value in memory] == [56 * n + 24 for n in (100, 200, 400)]
    table = capsys.readouterr().out
    assert "| BYOL with nn: gathered, MiB | " in table
    assert all(f"| **{axis}** | " in table for axis in costs)


def test_law_and_wall():
    cost = cost_growth.Cost(
        "search", "ms", 800, [50.0, 3.0, 12.0, 48.0]
    )  # the first does not count
    law = cost_growth.law([1, 10, 20, 40], cost)
    assert law["exponent"] == pytest.approx(2)
    assert law["off"] == pytest.approx(0, abs=1e-9)
    assert law["wall"] == pytest.approx(40 * (800 / 48) ** 0.5)
    assert cost_growth.law([1, 2, 4], cost_growth.Cost("flat", "s", 9, [1.0] * 3))["wall"] is None
    assert [cost_growth.short(x) for x in (0.0123, 99.6, 8192, 1e8)] == [
        "0.012",
        "100",
        "8192",
        "1e8",
    ]


def test_time_of_help():
    spent = cost_growth.help_seconds(1, "runs.py")
    assert spent.keys() == {"runs", "pretrain"}
    assert 0.01 < min(spent.values()) < max(spent.values()) < 10


@pytest.mark.slow
def test_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(loader, "EPOCHS_OF", 1)
    arguments = ["--num-photos", "16", "--batch-size", "16", "--num-rounds", "1"]
    figures = figures_of(loader, arguments, tmp_path)
    assert figures["ceiling"] == max(figures["decoders"].values()) > 0
    own, peers = figures["ours"], figures["peers"]
    assert figures["loader_share"] == pytest.approx(
        own["two crops, uint8, 224 px"] / figures["ceiling"]
    )
    whole = own["whole recipe, uint8 in the loader, 224 px"]
    assert figures["cpu_vs_pil"] == pytest.approx(whole / peers["torchvision v1 on Pillow, 224 px"])
    own_blur = peers["torchvision v1 on Pillow, its own blur, 224 px"]
    assert figures["cpu_vs_pil_own_blur"] == pytest.approx(whole / own_blur)
    assert figures["cpu_vs_lightly"] is None  # no --peers
    assert figures["versions"]["webdataset"] == webdataset.__version__
    assert 0.5 < peers["webdataset, 224 px"] / peers["torchvision v1 on Pillow, 224 px"] < 2
    stages = figures["stages"]
    assert stages.keys() >= {"decode", "resize", "flip", "jitter", "blur", "normalise", "rest"}
    assert stages["decode"] > stages["flip"] > 0


@pytest.mark.slow
def test_predict_beside_the_default_predictor(tmp_path):
    figures = figures_of(
        predict, ["--pictures", "2", "--rounds", "1", "--batch", "2", "--threads", "1"], tmp_path
    )
    names = {"ours, batch of 1", "ours, batch of 2", "DefaultPredictor"}
    assert figures["pictures_per_second"].keys() == names
    assert all(rate > 0 for rate in figures["pictures_per_second"].values())
    assert figures["times_default_predictor"]["DefaultPredictor"] == 1
