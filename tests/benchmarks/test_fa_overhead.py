"""The benchmark of FA's cost runs at a tiny size and keeps its JSON contract."""

import json

import pytest
import torch

from benchmarks import fa_overhead
from benchmarks.harness import Sizes

TINY = [
    "--device", "cpu", "--width", "4", "--image-size", "32", "--batch-size", "4",
    "--queue-size", "64", "--dim", "8", "--hidden-dim", "8", "--repeats", "2",
    "--fa-repeats", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_figures_and_table(tmp_path):
    out = tmp_path / "fa.json"
    cells = "byol/parallel/nn,byol/parallel/nn@4,infonce/post/mask"
    assert fa_overhead.main([*TINY, "--json", str(out), "--cells", cells]) == 0
    figures = json.loads(out.read_text())
    assert figures["device"] == "cpu"
    assert set(figures["cells"]) == {"byol/parallel/nn", "byol/parallel/nn@4"}
    assert "no gradient reaches" in figures["refused"]["infonce/post/mask"]
    assert figures["baseline_ms"] == figures["baselines"]["byol/parallel"] > 0
    for name, cell in figures["cells"].items():
        assert min(cell["ms"], cell["ratio"], cell["fa_ms"]) > 0
        assert cell["fa_share"] == pytest.approx(cell["fa_ms"] / figures["baseline_ms"])
        assert cell["ratio_range"][0] <= cell["ratio"] <= cell["ratio_range"][1]
        assert cell["num_features"] == (4 if name.endswith("@4") else 1)
    assert figures["sizes"]["queue_size"] == 64
    assert torch.__version__.startswith(figures["versions"]["torch"])
    assert figures["num_threads"] == 1


def test_every_method_makes_its_features():
    torch.manual_seed(0)
    sizes = Sizes(width=4, image_size=32, batch_size=4, queue_size=64, dim=8, hidden_dim=8)
    methods = list(fa_overhead.METHODS)
    group = fa_overhead.Group("byol", "parallel", methods, sizes, torch.device("cpu"))
    for method in methods:
        group.use(method)
        num = fa_overhead.METHODS[method].get("num_features", 1)
        assert group.model.fa.num_features == num
        group.augment()
        group.step()
    entered = group.augmenters["nn"].queue
    assert entered is not None
    assert int(entered.puts) == 3  # filled, FA alone, a step
