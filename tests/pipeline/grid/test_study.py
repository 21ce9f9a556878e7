"""Which command measures what, and where the figure is read."""

from pathlib import Path

import pytest

from pipeline.grid.data import StudyData
from pipeline.grid.grid import Cell
from pipeline.grid.study import make_work, read_metrics
from tests.pipeline.report.run_fixture import dump, dump_lines
from tools import linear_eval

DATA = StudyData("s", {1.0: (Path("/pool"),)}, Path("/train"), Path("/val"), "d", {})


def test_figures_are_read_where_they_stand(tmp_path: Path) -> None:
    dump(tmp_path / "run/summary.json", {"knn_top1": 0.625})
    dump(tmp_path / "linear/linear.json", {"top1": 0.75})
    rows = [{"kind": "train", "online_top1": 0.1}, {"online_top1": 0.25}, {"kind": "knn"}]
    dump_lines(tmp_path / "run/metrics.jsonl", rows)
    found = read_metrics(("knn", "linear", "online"), tmp_path)
    assert found == {"knn": 62.5, "linear": 75.0, "online": 25.0}


@pytest.mark.parametrize("content", [{}, {"knn_top1": None}, {"knn_top1": "high"}, []])
def test_a_missing_figure_is_an_error(tmp_path: Path, content: object) -> None:
    dump(tmp_path / "run/summary.json", content)
    with pytest.raises(ValueError, match="knn: "):
        read_metrics(("knn",), tmp_path)


def test_percent_where_a_share_belongs_is_an_error(tmp_path: Path) -> None:
    dump(tmp_path / "run/summary.json", {"knn_top1": 62.5})
    with pytest.raises(ValueError, match=r"62\.5 is no share of 1"):
        read_metrics(("knn",), tmp_path)


def test_linear_evaluation_takes_the_words_that_it_is_given(tmp_path: Path) -> None:
    settings = {"config": {"data": {"num_workers": 3}}, "pool": 1.0}
    cell = Cell("f" * 64, settings, {"grid": {"FA": "mask"}})
    words = (cell, 0, tmp_path, Path("/repo"), DATA)
    work = make_work(*words, ("knn", "linear"))
    step = work.steps[1]
    options = linear_eval.build_parser().parse_intermixed_args(list(step.command[2:]))
    assert options.checkpoint == str(work.folder / "run/checkpoint.pth")
    assert (options.train, options.val, options.protocol) == ("/train", "/val", "cached")
    assert options.out / "linear.json" == step.product
    assert (options.overrides, options.resume) == (["num_workers=3"], True)
    assert len(make_work(*words, ("knn", "online")).steps) == 1
