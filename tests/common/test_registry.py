"""Registries, and the sections of a config that they make."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import yaml

from common.config import read_settings, to_plain
from common.errors import UserError

FILES = {
    "base.py": """
from dataclasses import dataclass
from typing import ClassVar
from common.config import Registry

@dataclass(frozen=True)
class Shape:
    registry: ClassVar[Registry]
    area: float = 1.0

Shape.registry = Registry("toy_shapes", Shape)
""",
    "circle.py": """
from dataclasses import dataclass
from typing import Literal
from toy_shapes.base import Shape

@dataclass(frozen=True)
class Circle(Shape):
    name: Literal["circle"] = "circle"
    radius: float = 2.0
""",
    "square.py": """
from dataclasses import dataclass
from typing import Literal
from common.errors import require
from toy_shapes.base import Shape

@dataclass(frozen=True)
class Square(Shape):
    name: Literal["square"] = "square"
    side: int = 3

    def __post_init__(self):
        require(self.side > 0, f"side must be > 0, got {self.side}")
""",
    "_helper.py": "raise RuntimeError('not listed')\n",
    "__init__.py": "",
}
SCHEMAS = """
from dataclasses import dataclass, field
from typing import ClassVar
from common.config import with_sections
from toy_shapes.base import Shape
from toy_shapes.circle import Circle

@with_sections(Shape.registry)
@dataclass(frozen=True)
class Every:
    preset: str = "plain"
    short_key: ClassVar[str] = "preset"

    @staticmethod
    def defaults_for(raw):
        return {"square": {"side": 9}} if raw.get("preset") == "large" else {}

@dataclass(frozen=True)
class Settings:
    shape: Shape = field(default_factory=Circle)
    every: Every = field(default_factory=Every)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "toy_shapes").mkdir()
    for name, text in FILES.items():
        (folder / "toy_shapes" / name).write_text(text)
    (folder / "toy_schemas.py").write_text(SCHEMAS)
    return folder


@pytest.fixture
def settings(package, monkeypatch):
    """The class Settings of the package above."""
    monkeypatch.syspath_prepend(str(package))
    import toy_schemas  # type: ignore

    return toy_schemas.Settings


def test_the_module_of_the_base_is_no_entry(settings):
    from toy_shapes.base import Shape  # type: ignore

    assert Shape.registry.names() == ["circle", "square"]
    assert Shape.registry["square"]().side == 3
    with pytest.raises(UserError, match=r"unknown name .sqare.; did you mean square\?"):
        Shape.registry["sqare"]


def test_name_chooses_the_class_of_a_section(settings, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("shape: {name: square, side: 5, area: 7}\n")
    read = read_settings(settings, file)
    assert dataclasses.asdict(read.shape) == {"area": 7.0, "name": "square", "side": 5}
    assert read_settings(settings, file, ["shape.side=6"]).shape.side == 6
    assert read_settings(settings, None, ["shape.radius=3"]).shape.radius == 3
    assert read_settings(settings, None, ["shape=square"]).shape.side == 3
    # Settings of the file's choice that the other one lacks stay behind, common ones stay.
    other = read_settings(settings, file, ["shape.name=circle"]).shape
    assert dataclasses.asdict(other) == {"area": 7.0, "name": "circle", "radius": 2.0}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("shape.name=sqare", "shape: unknown name 'sqare'; did you mean square?"),
        ("shape.side=4", "override 'shape.side=4': unknown key shape.side"),
        ("every.square.side=0", "side must be > 0, got 0"),
        ("every.square.side=x", "every.square.side"),
        ("every.square.sid=1", "unknown key every.square.sid; did you mean every.square.side?"),
        ("every.hexagon.side=1", "unknown key every.hexagon"),
    ],
)
def test_mistakes_name_the_place(settings, override, words):
    with pytest.raises(UserError) as caught:
        read_settings(settings, None, [override])
    assert words in str(caught.value)


def test_sections_of_every_class_with_defaults_of_a_preset(settings, tmp_path):
    read = read_settings(settings, None, ["every.square.side=4"])
    assert (read.every.square.side, read.every.circle.radius) == (4, 2.0)
    large = read_settings(settings, None, ["every=large", "every.square.area=3"]).every
    assert (large.preset, large.square.side, large.square.area) == ("large", 9, 3.0)
    assert pickle.loads(pickle.dumps(large)) == large
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(to_plain(read)))
    assert read_settings(settings, file) == read
