"""Grids and presets: what they span, what they merge to, what is refused."""

from pathlib import Path

import pytest
import yaml

from common.config import to_plain
from common.errors import UserError
from pipeline.grid.data import StudyData
from pipeline.grid.grid import Level, Preset, make_plan, merged_config, read_grid, read_preset
from pretrain.config import load_config

STUDIES = Path(__file__).parents[3] / "configs/studies"
GRIDS = sorted(STUDIES.glob("*.yaml"))
PRESETS = sorted(
    (STUDIES / "presets").glob("*.yaml"), key=lambda path: (path.stem != "reproduce-cpu", path)
)


def some_data(digest: str = "d") -> StudyData:
    pools = {share: (Path(f"/x/{share}"),) for share in (0.1, 0.25, 1.0)}
    return StudyData("s", pools, Path("/x/train"), Path("/x/val"), digest, {"data.image_size": 32})


@pytest.mark.parametrize(
    "path", [PRESETS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in PRESETS[1:])]
)
def test_every_cell_of_the_committed_grids_loads_and_can_train(path: Path, tmp_path: Path) -> None:
    preset = read_preset(path)
    plan = make_plan([read_grid(grid, preset.name) for grid in GRIDS], preset, some_data())
    for cell in plan.cells.values():
        file = tmp_path / f"{cell.fingerprint}.yaml"
        file.write_text(yaml.safe_dump(cell.settings["config"]))
        config = load_config(file)
        plain = to_plain(config)
        for section, values in cell.settings["config"].items():
            assert {key: plain[section][key] for key in values} == values
    assert all(grid.comparisons for grid in plan.grids)


def test_reproduce_cpu_is_as_small_as_promised() -> None:
    preset = read_preset(STUDIES / "presets/reproduce-cpu.yaml")
    plan = make_plan([read_grid(grid, preset.name) for grid in GRIDS], preset, some_data())
    assert len(plan.cells) <= 14
    assert preset.seeds == 5
    claims = {comparison.decides for grid in plan.grids for comparison in grid.comparisons}
    assert True in claims
    assert all(any(c.decides for c in grid.comparisons) for grid in plan.grids)


def test_cells_that_come_to_the_same_are_one_and_seeds_do_not_count() -> None:
    preset = read_preset(STUDIES / "presets/reproduce-cpu.yaml")
    grids = [
        read_grid(STUDIES / f"{n}.yaml", preset.name) for n in ("stop_gradient", "architecture")
    ]
    plan = make_plan(grids, preset, some_data())
    none = plan.fingerprint(grids[0], {"cell": "none"})
    assert none == plan.fingerprint(grids[1], {"architecture": "no FA"})
    assert plan.cells[none].axes == {
        "stop_gradient": {"cell": "none"},
        "architecture": {"architecture": "no FA"},
    }
    assert "seed" not in plan.cells[none].settings["config"]
    other = make_plan(grids, preset, some_data("other data"))
    assert set(other.cells).isdisjoint(plan.cells)


def test_what_is_merged_in_which_order() -> None:
    preset = Preset("p", Path("b"), 1, ("knn",), {}, {"byol": {"a.x": 3, "a.y": 3}}, {"a.x": 2})
    level = Level({"a.y": 4, "b": [1]}, "byol", None, {"a.z": 0.5, "n": 10})
    base = {"a": {"x": 0, "y": 0, "z": 0.3}, "n": 4}
    found = merged_config(base, preset, level, {"a.x": 1, "c.d.e": "new"}, "g")
    assert found == {
        "a": {"x": 3, "y": 4, "z": 0.15}, "n": 40, "b": [1], "c": {"d": {"e": "new"}},
    }  # fmt: skip
    assert base == {"a": {"x": 0, "y": 0, "z": 0.3}, "n": 4}
    with pytest.raises(UserError, match=r"scale a\.q: its value is None, no number"):
        merged_config(base, preset, Level(scale={"a.q": 2}), {}, "g")
    with pytest.raises(UserError, match="preset p has no paradigm 'moco'; it has byol"):
        merged_config(base, preset, Level(paradigm="moco"), {}, "g")


GRID = """
title: t
claim: c
axes:
  FA: {none: {fa.method: none}, mask: {fa.method: mask}}
  loss: {mean: {}, free: {fa.feature_loss: free}}
left_out:
  - {cells: {FA: none, loss: free}, reason: one feature}
  - {cells: {FA: mask, loss: free}, reason: small, preset: tiny}
comparisons:
  - name: mask
    treated: {FA: mask, loss: mean}
    control: {FA: none, loss: mean}
  - name: free
    treated: {FA: mask, loss: free}
    control: {FA: mask, loss: mean}
"""


def test_cells_left_out_take_their_comparisons_along(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(GRID)
    grid = read_grid(path, "big")
    assert [tuple(axes.values()) for axes, _ in grid.cells()] == [
        ("none", "mean"), ("mask", "mean"), ("mask", "free"),
    ]  # fmt: skip
    assert [c.name for c in grid.comparisons] == ["mask", "free"]
    assert [c.name for c in read_grid(path, "tiny").comparisons] == ["mask"]
    assert grid.reason_left_out({"FA": "none", "loss": "free"}) == "one feature"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: t", "titel: t", "unknown key titel; did you mean title"),
        ("title: t\n", "", "title is missing"),
        ("FA: mask, loss: mean}", "FA: nn, loss: mean}", "FA has no level 'nn'; it has none, mask"),
        ("control: {FA: none, loss: mean}", "control: {FA: none}", "names no level of loss"),
        ("mean: {}", "mean: {pool: 2}", "pool is 2; give a share above 0, up to 1"),
        ("axes:", "axes: [", "is not YAML"),
        ("left_out:\n", "left_out: 3\nignored:\n", "unknown key ignored"),
        (
            "  FA: {none: {fa.method: none}, mask: {fa.method: mask}}",
            "  FA:",
            "FA: None where keys",
        ),
        ("loss: {mean: {}, free: {fa.feature_loss: free}}", "loss: {}", "loss is empty"),
    ],
)
def test_mistakes_in_a_grid_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "g.yaml"
    assert old in GRID
    path.write_text(GRID.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_grid(path, "big")


def test_two_axes_do_not_set_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(GRID.replace("mean: {}", "mean: {fa.method: nn}"))
    with pytest.raises(UserError, match=r"two axes set fa\.method"):
        read_grid(path, "big").cells()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds is 0; give a whole number from 1 on"),
        ({"metrics": ["top5"]}, "give a list of some of knn, linear, online"),
        ({"base": "nothing.yaml"}, "nothing.yaml does not exist"),
        ({"sets": {"a": {}}}, "sets.a: recipe is missing"),
        ({"sedes": 3}, "unknown key sedes; did you mean seeds"),
        ({"sets": None}, "sets: None where keys"),
        ({"metrics": "knn"}, "metrics 'knn': give a list of some of knn"),
    ],
)
def test_mistakes_in_a_preset_are_named(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    good = {"base": "base.yaml", "seeds": 2, "metrics": ["knn"], "sets": {"a": {"recipe": "x"}}}
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(good))
    assert read_preset(path).name == "p"
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(UserError, match=message):
        read_preset(path)
