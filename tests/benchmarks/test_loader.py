"""The loader's benchmark: contract of its JSON, rivals in processes of their own, honest ratios."""

import json
import statistics
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import harness, loader
from benchmarks.peers import transform_recipes
from common.errors import UserError

TINY = ["--num-photos", "16", "--batch-size", "16", "--num-rounds", "1"]
FAKE_LIGHTLY = """
import time
import torch
class BYOLView1Transform:
    def __init__(self, input_size): self.size = input_size
BYOLView2Transform = BYOLView1Transform
class BYOLTransform:
    def __init__(self, one, two): self.size = one.size
    def __call__(self, image):
        assert image.mode == "RGB" and image.size == (500, 375)
        print("chatter that must not reach the protocol")
        end = time.process_time() + {seconds}
        while time.process_time() < end: pass
        return [torch.zeros(3, self.size, self.size)] * 2
"""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def fake_environment(folder, monkeypatch, seconds):
    """A library that calls itself lightly and needs `seconds` for a picture."""
    package = folder / f"peers-{seconds}" / "lightly"
    (package / "transforms").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.0.fake'\n")
    (package / "transforms" / "__init__.py").write_text("")
    transform = FAKE_LIGHTLY.replace("{seconds}", str(seconds))
    (package / "transforms" / "byol_transform.py").write_text(transform)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def test_figures_keep_the_contract_and_fit_together(tmp_path, monkeypatch):
    fake_environment(tmp_path, monkeypatch, 0.02)
    out = tmp_path / "loader.json"
    assert loader.main([*TINY, "--json", str(out), "--peers", sys.executable]) == 0
    figures = json.loads(out.read_text())
    assert figures["ceiling"] == max(figures["decoders"].values()) > 0
    assert set(figures["decoders"]) >= {"simplejpeg, fast DCT and upsampling", "OpenCV", "Pillow"}
    own, peers = figures["ours"], figures["peers"]
    assert figures["loader_share"] == pytest.approx(
        own["two crops, uint8, 224 px"] / figures["ceiling"]
    )
    whole = own["whole recipe, uint8 in the loader, 224 px"]
    assert figures["cpu_vs_pil"] == pytest.approx(whole / peers["torchvision v1 on Pillow, 224 px"])
    own_blur = peers["torchvision v1 on Pillow, its own blur, 224 px"]
    assert figures["cpu_vs_pil_own_blur"] == pytest.approx(whole / own_blur)
    assert figures["cpu_vs_lightly"] == pytest.approx(whole / peers["lightly, 224 px"])
    assert peers["lightly, 224 px"] == pytest.approx(1 / 0.02, rel=0.3)  # 20 ms and a decoding
    assert peers["lightly, 224 px"] < 50
    assert figures["versions"]["lightly"] == "0.0.fake"
    assert "torchvision v2 on tensors, 64 px" in peers
    assert set(figures["left_out"]) == {"dali", "ffcv"}
    assert "nvidia" in figures["left_out"]["dali"]


def test_without_peers_their_ratios_are_null():
    own = {name.format(px): [2.0] for name in (loader.CROPS, loader.WHOLE) for px in (224, 64)}
    figures = loader.result({"decoders": {"any": [4.0]}, "ours": own, "peers": {}})
    assert (figures["loader_share"], figures["cpu_vs_lightly"]) == (0.5, None)


def test_a_peer_that_breaks_is_told_with_its_last_words(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    peer = harness.Peer(sys.executable, "torchvision", tmp_path)
    assert peer.missing is None
    assert peer.version
    turn = peer.candidate("torchvision v1 on Pillow", 32)
    with (
        closing(peer),
        pytest.raises(UserError, match=r"torchvision ended with status 1: .*cannot identify"),
    ):
        turn()


def test_an_interpreter_that_is_none(tmp_path, capsys):
    assert loader.main([*TINY, "--peers", str(tmp_path / "python")]) == 2
    assert "cannot be started (No such file" in capsys.readouterr().err


def test_the_pillow_recipe_does_what_it_says():
    """Both views: all operations happen, as often as the documented settings say."""
    flat = Image.fromarray(np.full((64, 64, 3), (200, 60, 90), np.uint8))
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (transform_recipes.MEAN, transform_recipes.STD)
    )
    first, second = transform_recipes.pillow_views(32)
    made = torch.stack([first(flat) for _ in range(300)]) * std + mean
    gray = (made.amax(1) - made.amin(1)).amax((1, 2)) < 1e-3
    assert 0.12 < gray.float().mean() < 0.28  # 0.2
    unchanged = ((made - torch.tensor([200, 60, 90]).view(3, 1, 1) / 255).abs() < 3e-3).all(3)
    assert 0.1 < unchanged.all(2).all(1).float().mean() < 0.23  # no jitter, not grey: 0.2 * 0.8
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sharp = [_roughness(first(Image.fromarray(noise))) for _ in range(40)]
    sharp2 = [_roughness(second(Image.fromarray(noise))) for _ in range(40)]
    assert statistics.median(sharp) < 0.5 * statistics.median(sharp2)  # the first is blurred always


def _roughness(view):
    return float((view[:, 1:] - view[:, :-1]).abs().mean())


def test_wall_rates_through_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "WALL_SIZE", 32)
    files = harness.write_files(harness.encoded_photos(2), tmp_path / "files")
    found = loader.worker_rates(files, tmp_path / "epoch", 1, 70, 1)
    assert found["num_workers"] == 1
    assert found["num_pictures"] == 64  # a whole batch
    assert set(found["images_per_second"]) == {
        "ours, uint8 in the workers", "ours, float in batches", loader.TORCHVISION,
    }  # fmt: skip
    assert min(found["images_per_second"].values()) > 0
