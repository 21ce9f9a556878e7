"""The one reader of settings: bounds of the YAML, unknown keys, overrides, free keys."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from common.config import (
    CONFIGS,
    find_config,
    parse_yaml,
    read_settings,
    read_yaml,
    read_yaml_with_bases,
    with_overrides,
)
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


@pytest.mark.parametrize("overrides", [["count=4", "out=1e3"], ["inner.options.a.b=[3]"]])
def test_overrides_become_a_yaml(path, overrides):
    expected = read(path, *overrides)
    text = with_overrides(Outer, path.read_text(), overrides)
    path.write_text(text)
    assert read(path) == expected
    assert with_overrides(Outer, text, overrides) == text


@pytest.mark.parametrize("text", ["2026", "true", "1e3", "a=b", "x: y"])
def test_what_looks_like_a_number_is_text_where_text_is_due(path, text):
    if text == "x: y":
        with pytest.raises(UserError, match="out"):
            read(path, f"out={text}")
    else:
        assert read(path, f"out={text}").out == text
    assert read(path, "out=x", "out=null").out is None


def test_a_path_that_is_no_utf8_is_taken_as_it_is(path):
    settings = read_settings(Outer, path, ["out=runs/\udcff: 1"])
    assert settings.out == "runs/\udcff: 1"


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


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 18))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system ['echo']", "tag !!python/object/apply:os.system"),
        ("!!python/tuple [1, 2]", "tag !!python/tuple makes"),
        ("%TAG ! tag:yaml.org,2002:python/\n---\na: !object/new:os.system {}", "python/object/new"),
        ("a: !mine 3", "is not YAML: could not determine .* '!mine'"),
        ("[" * 30 + "]" * 30, "nests deeper"),
        (BOMB, "more than 20,000 values"),
        (BOMB.replace("18", "9") + "<<: *a14\n", "more than 20,000 values"),
        (
            "a0: &a0 {b: 1}\n" + "".join(f"a{i}: &a{i} {{b: *a{i - 1}}}\n" for i in range(1, 30)),
            "deeper",
        ),
        ("a: &a [*a]", r"\*a stands within &a itself"),
        ("a: &a {b: {<<: *a}}", r"\*a stands within &a itself"),
        ("a: [" + "1," * 20_000 + "]", "more than 20,000 values"),
        ("a: 1\nb: {c: 1, d: 2, c: 3}", "here: line 2: key c stands twice"),
        ("a: *b", "is not YAML: .*undefined alias 'b'"),
        ("a: [1", "is not YAML"),
        ("a: 2026-13-45", "is not YAML"),
        *((f"a: !!{tag}", "is not YAML") for tag in ("timestamp x", "bool x", 'int ""', "map [1]")),
        ("a: 1\nb: {c: 2}\na: 3", "line 3: key a stands twice"),
        ("a: {c: 2, b: 1, c: 2}", "key c stands twice"),
        ("{[1]: 2}", "is not YAML"),
        ("[" * 3000, "nests deeper|is not YAML"),
    ],
)
def test_yaml_is_bounded_and_runs_nothing(text, words):
    with pytest.raises(UserError, match=words):
        parse_yaml(text, "here")


def test_aliases_that_repeat_little_are_read():
    text = "a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}"
    assert parse_yaml(text, "here") == {"a": {"x": 1}, "b": [{"x": 1}] * 2, "c": {"x": 1, "y": 2}}


def test_files_below_a_yaml_are_read_with_it(tmp_path):
    own, base, third = (tmp_path / f"{name}.yaml" for name in ("own", "base", "third"))
    base.write_text("A: {x: 1, y: 1}\n")
    third.write_text("A: {y: 2}\nC: 3\n")
    own.write_text('_BASE_: "base.yaml"\nB: 2\n')
    assert read_yaml_with_bases(own) == ({"A": {"x": 1, "y": 1}, "B": 2}, [base])
    own.write_text("_BASE_: [base.yaml, third.yaml]\nA: {x: 4}\n")
    assert read_yaml_with_bases(own) == ({"A": {"x": 4, "y": 2}, "C": 3}, [base, third])
    for name, message in {
        "nowhere.yaml": r"nowhere\.yaml: cannot be read",
        "base.yaml": r"base\.yaml: builds on itself",
        "own.yaml": r"base\.yaml: builds on itself",
        "/dev/zero": "/dev/zero: cannot be read .is a device",
        "https://host/a.yaml": "is no path of a file",
        "[[a]]": "is no path of a file",
        "[third.yaml]": "own.yaml: builds on more than 20 files",
        "'!!python/name:os.system'": "cannot be read",
        "!!python/name:os.system": r"base\.yaml: the tag !!python/name:os.system",
    }.items():
        own.write_text(
            f"_BASE_: {'base.yaml' if 'third' not in name else '[' + 'third.yaml,' * 21 + ']'}"
        )
        base.write_text(f"_BASE_: {name}\n")
        with pytest.raises(UserError, match=message):
            read_yaml_with_bases(own)


@pytest.mark.parametrize("text", ["- a\n", "3", "", "1: 2\n"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml: holds no settings"):
        read_yaml(file)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")


def test_configs_are_found_here_then_in_the_repository_then_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = ("demo", "demo.yaml", "configs/pretrain/demo.yaml")
    assert {find_config(name, "pretrain") for name in named} == {CONFIGS / "pretrain/demo.yaml"}
    deep = find_config("imagenet1k/R50_moco_100ep", "pretrain")
    assert deep == CONFIGS / "pretrain/imagenet1k/R50_moco_100ep.yaml"
    for name in ("demo.yaml", "mine.yaml"):
        Path(name).write_text("{}")
        assert find_config(name, "pretrain") == Path(name)
    Path("demo").mkdir()  # a folder is no config
    assert find_config("demo", "pretrain") == CONFIGS / "pretrain/demo.yaml"
    for name, near in {"dmeo": "demo", "./min.yaml": "mine.yaml", "R5O_C4": "R50_C4"}.items():
        kind = "detection" if near == "R50_C4" else "pretrain"
        with pytest.raises(UserError, match=rf"unknown config '{name}'; did you mean {near}\?"):
            find_config(name, kind)
