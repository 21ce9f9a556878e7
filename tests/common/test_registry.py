"""Registries, and the sections of a config that they make; presets of sections: test_policy.py."""

import pytest

from common.config import Registry, read_settings
from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.objectives.base import Objective
from pretrain.objectives.infonce import InfoNce
from pretrain.objectives.moco import MoCo


def objective(*overrides, path=None):
    return read_settings(PretrainConfig, path, overrides).objective


def test_modules_are_entries_but_for_the_base_and_helpers(tmp_path, monkeypatch):
    (tmp_path / "toy_shapes").mkdir()
    for name, text in {"__init__": "", "circle": "", "_helper": "raise RuntimeError"}.items():
        (tmp_path / f"toy_shapes/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Registry("toy_shapes", object).names() == ["circle"]
    assert "base" not in Objective.registry.names()
    assert Objective.registry["moco"] is MoCo
    with pytest.raises(UserError, match=r"unknown name .mocco.; did you mean moco\?"):
        Objective.registry["mocco"]


def test_name_chooses_the_class_of_a_section(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("objective: {name: moco, num_negatives: 512, temperature: 0.5}\n")
    assert objective(path=file) == MoCo(num_negatives=512, temperature=0.5)
    assert objective("objective.num_negatives=256", path=file) == MoCo(
        num_negatives=256, temperature=0.5
    )
    assert objective("objective=moco") == MoCo()
    # Settings of the file's choice that the other one lacks stay behind, common ones stay.
    assert objective("objective.name=infonce", path=file) == InfoNce(temperature=0.5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.name=mcoo", "objective: unknown name 'mcoo'; did you mean moco?"),
        ("objective.sinkhorn=4", "override 'objective.sinkhorn=4': unknown key objective.sinkhorn"),
        ("fa.noise.sigma=-1", "fa.noise.sigma must be >= 0, got -1"),
        ("fa.noise.sigma=x", "fa.noise.sigma"),
        ("fa.noise.sigm=1", "unknown key fa.noise.sigm; did you mean fa.noise.sigma?"),
        ("fa.hexagon.side=1", "unknown key fa.hexagon"),
    ],
)
def test_mistakes_name_the_place(override, words):
    with pytest.raises(UserError) as caught:
        objective(override)
    assert words in str(caught.value)
