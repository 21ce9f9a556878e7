"""The one reader of settings: bounds of the YAML, unknown keys, overrides, free keys."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from common.config import MAX_YAML_ALIASES, parse_yaml, read_settings, read_yaml
from common.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    names: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    out: str | None = None
    count: int = 1
    mode: Literal["a", "b"] = "a"
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count must be >= 1, got {self.count}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text("count: 3\ninner: {rate: 1e-3, names: [x, y]}\n")
    return file


def read(path, *overrides):
    return read_settings(Outer, path, overrides)


def test_file_and_overrides(path):
    found = read(path, "count=4", "inner.rate=2e-5", "mode=b")
    assert found == Outer(count=4, mode="b", inner=Inner(2e-5, ("x", "y")))
    assert read(None) == Outer()
    assert read(path).inner.rate == 1e-3


@pytest.mark.parametrize("text", ["2026", "true", "1e3", "a=b", "x: y"])
def test_what_looks_like_a_number_is_text_where_text_is_due(path, text):
    if text == "x: y":
        with pytest.raises(UserError, match="out"):
            read(path, f"out={text}")
    else:
        assert read(path, f"out={text}").out == text
    assert read(path, "out=x", "out=null").out is None


def test_free_keys_are_handed_on_flat(path):
    found = read(path, "inner.options.train.epochs=3", "inner.options.lr=0.5")
    assert found.inner.options == {"train.epochs": 3, "lr": 0.5}


def test_free_values_stay_as_they_are_written(path):
    path.write_text("inner: {options: {name: '010', flag: 'true', number: 10, items: [1, '2']}}\n")
    expected = {"name": "010", "flag": "true", "number": 10, "items": [1, "2"]}
    assert read(path).inner.options == expected
    assert read(path, "inner.options.name='7'").inner.options["name"] == "7"
    assert read(path, "count=2").inner.rate == 0.1
    with pytest.raises(UserError, match=r"inner\.options is 3; it holds keys"):
        read(path, "inner.options=3")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inner.rat=1", "override 'inner.rat=1': unknown key inner.rat; did you mean inner.rate"),
        ("zzz=1", "unknown key zzz; known are count, inner, mode, out"),
        ("inner=1", "inner is 1; it holds settings of its own"),
        ("count.x=1", "unknown key|holds a value|count"),
        ("count=0", "count must be >= 1, got 0"),
        ("count=many", "count"),
        ("count=null", "count is null; give a value, or leave it out"),
        ("mode=c", "mode"),
        ("count", "is not of the form key=value"),
        ("--count=3", "is not of the form key=value"),
        ("out=[1", "is not YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(path, override, words):
    with pytest.raises(UserError, match=words) as caught:
        read(path, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['echo']", "is not YAML"),
        ("[" * 30 + "]" * 30, "nests deeper"),
        ("a: &a 1\nb: [" + "*a," * (MAX_YAML_ALIASES + 1) + "]", "aliases"),
        ("a: [1", "is not YAML"),
        ("[" * 3000, "nests deeper|is not YAML"),
    ],
)
def test_yaml_is_bounded_and_runs_nothing(text, words):
    with pytest.raises(UserError, match=words):
        parse_yaml(text, "here")


@pytest.mark.parametrize("text", ["- a\n", "3", "", "1: 2\n"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml: holds no settings"):
        read_yaml(file)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")
