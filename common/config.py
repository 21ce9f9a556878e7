"""Strict settings: frozen dataclasses read from YAML and ``key=value`` overrides.

One reader for all programs. The YAML is parsed without running code and within bounds, unknown keys
are refused with the nearest known one, and jsonargparse checks types and builds the dataclasses.

A section may be one of several classes: a ``Registry`` knows them by name, one module for each. A
new one is a new file, and nothing else changes. The name of a class is the name of its module, so
that a registry lists its names from the folder and imports nothing.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from common.errors import UserError, unknown
from common.files import read_text

Schema = TypeVar("Schema")
Base = TypeVar("Base")

_FREE = dict[str, Any]  # the type of mappings that are handed on
_hints_of = functools.cache(typing.get_type_hints)  # else a quarter of the time of a config
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MAX_YAML_BYTES = 1 << 20  # a config has a few KiB
MAX_YAML_DEPTH = 20  # nested collections
MAX_YAML_VALUES = 20_000  # "*name" counts as what it names: 1 KiB of aliases can hold 10^10 values
MAX_BASES = 20  # files of Detectron2's format below one
BASE_KEY = "_BASE_"
_URLS = ("http://", "https://")  # Detectron2 would download them
_YAML_TAG = "tag:yaml.org,2002:"
# What PyYAML raises; those after ValueError for `!!timestamp x`, `!!bool x`, `!!int ""`.
_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, AttributeError, KeyError, IndexError)
_PYTHON_TAG = f"{_YAML_TAG}python"
_FLOAT = f"{_YAML_TAG}float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")


def find_config(name: str | Path, kind: str, presets: str = "**/*.yaml") -> Path:
    """The file of a config: in the working folder, else in the repository, else a preset.

    Args:
        name: A path; or a preset, a file below configs/KIND/ with or without its ending, as `demo`.
        kind: Folder below configs/, as "pretrain".
        presets: Which files in it are presets.
    Raises:
        UserError: If there is none; proposes the nearest.
    """
    folder = CONFIGS / kind
    for path in (Path(name), CONFIGS.parent / name, folder / name, folder / f"{name}.yaml"):
        if path.exists() and not path.is_dir():
            return path
    names = [str(path.relative_to(folder).with_suffix("")) for path in folder.glob(presets)]
    files = [str(path) for path in Path(name).parent.glob("*.y*ml")]
    files += [f"configs/{kind}/{preset}.yaml" for preset in names]
    raise UserError(unknown(f"config {str(name)!r}", str(name), names, more=files))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with two rules of YAML 1.2: 1e-3 is a number, no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise UserError(
                    f"line {key.start_mark.line + 1}: key {key.value} stands twice; remove one"
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: text such as 1e3 in quotes."""


_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys.

    Raises:
        UserError: If it is missing, too large, not YAML, or holds something else.
    """
    raw = parse_yaml(read_text(path, MAX_YAML_BYTES), str(path))
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UserError(f"{path}: holds no settings (key: value)")
    return raw


def read_yaml_with_bases(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """Read a YAML file in Detectron2's format, whose key `_BASE_` names a file or several.

    They are given relative to the file that names them; its own values go before theirs.

    Returns:
        The values of all, and the files below `path`, nearest first.

    Raises:
        UserError: See `read_yaml`; if a file builds on itself or on more than MAX_BASES others.
    """
    bases: list[Path] = []

    def read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        raw = read_yaml(path)
        given = raw.pop(BASE_KEY, [])
        values: dict[str, Any] = {}
        for name in given if isinstance(given, list) else [given]:
            if not isinstance(name, str) or not name.isprintable() or name.startswith(_URLS):
                raise UserError(f"{path}: {BASE_KEY} {name!r} is no path of a file; give one")
            base = (path.parent / os.path.expanduser(name)).resolve()
            if base in (*above, path.resolve()):
                raise UserError(f"{path}: builds on itself through {BASE_KEY} {name}; remove it")
            bases.append(base)
            if len(bases) > MAX_BASES:
                raise UserError(f"{path}: builds on more than {MAX_BASES} files; join some")
            values = overlaid(values, read(base, (*above, path.resolve())))
        return overlaid(values, raw)

    return read(path, ()), bases


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML without running code.

    Raises:
        UserError: If it does not parse, names Python objects, nests too deep or repeats too much.
    """
    try:
        return copy.deepcopy(_loaded_yaml(text))
    except _YAML_ERRORS as error:
        if isinstance(error, UserError):
            raise UserError(f"{where}: {error}") from None
        raise UserError(f"{where}: is not YAML: {one_line(error)}") from None


@functools.lru_cache(maxsize=64)
def _loaded_yaml(text: str) -> Any:
    """The values of YAML, not to be changed; the stages of a pipeline read the same few files."""
    _check_bounds(text)
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _check_bounds(text: str) -> None:
    """Refuse what is too deep or large once its aliases are written out, and Python's tags."""
    # A collection's anchor, number of values and depth, aliases written out.
    open_nodes: list[list[Any]] = [["", 0, 0]]
    known: dict[str, tuple[int, int]] = {}  # anchor -> number of values and depth
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        tag: str = getattr(event, "tag", None) or ""
        anchor: str = getattr(event, "anchor", None) or ""
        if tag.startswith(_PYTHON_TAG):
            raise UserError(
                f"the tag !!{tag.removeprefix(_YAML_TAG)} makes Python objects and may "
                "run code; write a plain value"
            )
        size, depth = 1, 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([anchor, 1, 1])
            size = 0
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == node[0] for node in open_nodes):
                raise UserError(f"*{anchor} stands within &{anchor} itself; write it out")
            size, depth = known.get(anchor, (1, 0))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, depth = open_nodes.pop()
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if size:
            known[anchor] = (size, depth)
            parent = open_nodes[-1]
            parent[1] += size
            parent[2] = max(parent[2], depth + 1)
        total = sum(node[1] for node in open_nodes)
        if len(open_nodes) - 1 + depth > MAX_YAML_DEPTH or total > MAX_YAML_VALUES:
            raise UserError(
                f"nests deeper than {MAX_YAML_DEPTH} or has more than {MAX_YAML_VALUES:,} "
                "values, its aliases (*name) written out; is it the right file?"
            )


def read_settings(schema: type[Schema], path: Path | None, overrides: Sequence[str] = ()) -> Schema:
    """An instance of a frozen dataclass from a YAML file, or none, and overrides.

    Args:
        schema: The dataclass; fields that are dataclasses are sections. A section that is the base
            of a ``Registry`` is an instance of the class that its key ``name`` says. A section
            with ``short_key`` may be given by that key's value alone; one with ``defaults_for``
            takes what its keys leave open from there. The keys of a field ``dict[str, Any]`` are
            not checked, since another program reads them; they are flattened: ``{train: {epochs:
            3}}`` becomes ``{"train.epochs": 3}``.
        path: YAML file, or None for overrides alone.
        overrides: ``key=value`` with dotted keys; the values are YAML. The last one wins.
    Raises:
        UserError: Unknown key, or a value that the type or the dataclass refuses; names the file
            and the key.
    """
    where = "" if path is None else f"{path}: "
    raw = _normal(schema, {} if path is None else read_yaml(path))
    _leave_behind(schema, raw, _applied(schema, {}, overrides), where)
    raw = _applied(schema, raw, overrides)
    for override in overrides:
        alone = _applied(schema, {}, [override])
        _check_keys(schema, alone, f"override {override!r}: ", "", raw)
    _check_keys(schema, raw, where, "", raw)
    return _build(schema, raw, where)


def dotted(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def in_one_line(value: Any) -> str:
    """A plain value as YAML."""
    options: dict[str, Any] = {"default_flow_style": True, "allow_unicode": True, "width": 10**6}
    text = yaml.dump(value, Dumper=_Dumper, **options)
    return text.removesuffix("\n...\n").strip()


def to_plain(settings: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists of plain values, as it stands in YAML and JSON."""
    return _plain(dataclasses.asdict(settings))


def check_keys(raw: Any, known: Collection[str] | None, needed: set[str], where: str) -> None:
    """Refuse keys that are unknown (``known`` None: all are known) or missing.

    Raises:
        UserError: Naming the key.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: {raw!r} where keys with values are expected")
    for key in raw:
        if known is not None and key not in known:
            raise UserError(f"{where}: {unknown(f'key {key}', str(key), known)}")
    for key in sorted(needed - set(raw)):
        raise UserError(f"{where}: {key} is missing")


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _applied(schema: type, raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Settings with overrides applied in their order."""
    for override in overrides:
        parts, value = _parsed(schema, override)
        node = raw
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"override {override!r}: {part} holds a value, not settings")
        node[parts[-1]] = value
        raw = _normal(schema, raw)
    return raw


def _parsed(schema: type, override: str) -> tuple[list[str], Any]:
    """The way to a field, what follows a free mapping as one key of it, and the value."""
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"override {override!r} is not of the form key=value")
    names, parts, kind = key.split("."), [], schema
    while names:
        parts.append(names.pop(0))
        kind = _hints_of(kind).get(parts[-1]) if _is_schema(kind) else None
        if kind == _FREE and names:
            parts, names, kind = [*parts, ".".join(names)], [], None
    is_name = any("\udc80" <= character <= "\udcff" for character in text)  # not UTF-8
    value = text.strip() if is_name else parse_yaml(text, f"override {override!r}")
    if (isinstance(value, bool | int | float) or not text.strip()) and _is_text(kind):
        value = text.strip()  # out=2026 names a folder
    return parts, value


def with_overrides(schema: type, text: str, overrides: Sequence[str]) -> str:
    """Settings as YAML with `key=value` overrides; the same text where they change nothing.

    Raises:
        UserError: If an override or the YAML is none.
    """
    before = _normal(schema, parse_yaml(text, "YAML"))
    after = _applied(schema, copy.deepcopy(before), overrides)
    if after == before:
        return text
    return yaml.dump(after, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _is_schema(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _is_text(kind: Any) -> bool:
    """Whether a field takes text, and neither numbers nor truth values."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(kind)) if is_union else {kind}
    return str in kinds and not kinds & {bool, int, float}


# -- sections: dataclasses as they are, or chosen by a registry


class Modules:
    """The modules of a package by their names, each imported on first use."""

    def __init__(self, package: str) -> None:
        self.package = package

    def names(self) -> list[str]:
        """All names, sorted; those that begin with ``_`` are not listed."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None, self.package
        modules = [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)]
        return sorted(name for name in modules if not name.startswith("_"))

    def __getitem__(self, name: str) -> Any:
        """The module of a name.

        Raises:
            UserError: If there is none; the nearest name is proposed.
        """
        if name not in self.names():
            raise UserError(unknown(f"name {name!r}", name, self.names()))
        return importlib.import_module(f"{self.package}.{name}")


class Registry(Modules, Generic[Base]):
    """The classes of a package, one in each module but the one that defines their base."""

    def __init__(self, package: str, base: type[Base]) -> None:
        super().__init__(package)
        self.base = base

    def names(self) -> list[str]:
        """As `Modules` lists them, without the base's."""
        own = self.base.__module__.rpartition(".")[2]
        return [name for name in super().names() if name != own]

    def __getitem__(self, name: str) -> type[Base]:
        """The class of a name; raises as `Modules`."""
        module = super().__getitem__(name)
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, self.base)
            and value.__module__ == module.__name__
            and not value.__name__.startswith("_")
        ]
        assert len(classes) == 1, f"{module.__name__} must hold one {self.base.__name__}"
        return classes[0]


def with_sections(registry: Registry) -> Callable[[type[Schema]], type[Schema]]:
    """A decorator of frozen dataclasses: one more field for each class of a registry.

    The field has the name of the class and holds its settings, by default those of ``cls()``:
    registered settings become sections of a config. ``getattr(settings, name)`` gives them.
    """

    def extend(cls: type[Schema]) -> type[Schema]:
        classes = {name: registry[name] for name in registry.names()}
        fields = [
            (k, value, dataclasses.field(default_factory=value)) for k, value in classes.items()
        ]
        extended = dataclasses.make_dataclass(
            cls.__name__, fields, bases=(cls,), frozen=True, kw_only=True
        )
        extended.__module__, extended.__qualname__ = cls.__module__, cls.__qualname__
        extended.__doc__ = cls.__doc__
        return extended

    return extend


def _sections(schema: type) -> Iterator[tuple[dataclasses.Field, type]]:
    """The fields that are sections, each with its dataclass, or with the base of a registry."""
    hints = _hints_of(schema)
    for item in dataclasses.fields(schema):
        kind = hints[item.name]
        if _is_schema(kind):
            yield item, kind


def _is_choice(kind: type) -> bool:
    """Whether ``name`` in the section chooses one of a registry's classes."""
    registry = getattr(kind, "registry", None)
    return registry is not None and registry.base is kind


def _chosen(item: dataclasses.Field, kind: type, raw: Any, where: str) -> type:
    """The class of a section: its own, or the one that its ``name``, or else the default, says."""
    if not _is_choice(kind):
        return kind
    if isinstance(raw, dict) and "name" in raw:
        try:
            return kind.registry[str(raw["name"])]  # type: ignore[attr-defined]
        except UserError as error:
            raise UserError(f"{where}{item.name}: {error}") from None
    is_factory = item.default is dataclasses.MISSING
    return type(item.default_factory() if is_factory else item.default)  # type: ignore[misc]


def _normal(schema: type, raw: dict[str, Any]) -> dict[str, Any]:
    """``objective: {name: byol}`` for the short form ``objective: byol``; free mappings flat."""
    for item, kind in _sections(schema):
        value = raw.get(item.name)
        short = "name" if _is_choice(kind) else getattr(kind, "short_key", None)
        if isinstance(value, str) and short:
            raw[item.name] = {short: value}
        elif isinstance(value, dict) and not _is_choice(kind):
            raw[item.name] = _normal(kind, value)
    for name, kind in _hints_of(schema).items():
        if kind == _FREE and isinstance(raw.get(name), dict):
            raw[name] = dotted(raw[name])
    return raw


def _leave_behind(schema: type, raw: dict[str, Any], overrides: dict[str, Any], where: str) -> None:
    """Drop a file's settings of a choice that an override replaces by another one.

    ``objective.name=byol`` for a file with SimCLR's temperature: BYOL has none.
    """
    for item, kind in _sections(schema):
        own, other = raw.get(item.name), overrides.get(item.name)
        if not (isinstance(own, dict) and isinstance(other, dict)):
            continue
        if not _is_choice(kind):
            _leave_behind(kind, own, other, where)
        elif "name" in other:
            names = [
                {field.name for field in dataclasses.fields(_chosen(item, kind, node, where))}
                for node in (own, other)
            ]
            for key in set(own) & (names[0] - names[1]):
                del own[key]


def _check_keys(schema: type, raw: dict[str, Any], where: str, prefix: str, whole: Any) -> None:
    """Refuse unknown keys. ``whole`` has the names that choose classes, which ``raw`` may lack."""
    sections = {item.name: (item, kind) for item, kind in _sections(schema)}
    known = [item.name for item in dataclasses.fields(schema)]
    for key, value in raw.items():
        if key not in known:
            what = f"key {prefix}{key}"
            inside = [
                f"{section}.{field.name}"
                for section, (_, kind) in sections.items()
                for field in dataclasses.fields(kind)
            ]
            raise UserError(f"{where}{unknown(what, str(key), known, prefix, inside)}")
        if key not in sections:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{where}{prefix}{key} is {value!r}; it holds settings of its own")
        inner = whole.get(key) if isinstance(whole, dict) else None
        chosen = _chosen(*sections[key], inner, f"{where}{prefix}")
        _check_keys(chosen, value, where, f"{prefix}{key}.", inner)


def _build(schema: type[Schema], raw: dict[str, Any], where: str, prefix: str = "") -> Schema:
    """The dataclass of checked keys; the sections first, each by itself."""
    from jsonargparse import ArgumentParser  # slow to import: --help does without

    values: dict[str, Any] = {}
    # A section may have defaults that depend on one of its keys, as a preset.
    if defaults_for := getattr(schema, "defaults_for", None):
        try:
            raw = overlaid(defaults_for(raw), raw)
        except UserError as error:
            raise UserError(f"{where}{prefix.removesuffix('.')}: {error}") from None
    sections = {item.name: (item, kind) for item, kind in _sections(schema)}
    hints, parser = _hints_of(schema), ArgumentParser(exit_on_error=False)
    raw = {k: value for k, value in raw.items() if value is not None or hints.get(k) != _FREE}
    for item in dataclasses.fields(schema):  # type: ignore[arg-type]
        name, has_default = item.name, item.default is not item.default_factory
        if name in sections and name in raw:
            chosen = _chosen(*sections[name], raw[name], f"{where}{prefix}")
            values[name] = _build(chosen, raw[name], where, f"{prefix}{name}.")
        elif name in raw and hints[name] == _FREE:
            # jsonargparse would read text in it as YAML once more ("010" would become 10).
            if not isinstance(raw[name], dict):
                raise UserError(
                    f"{where}{prefix}{name} is {raw[name]!r}; it holds keys with values"
                )
            values[name] = raw[name]
        elif name in raw:
            # jsonargparse lets a null by, whatever the type.
            if raw[name] is None and not {None, type(None)} & {*typing.get_args(hints[name])}:
                raise UserError(f"{where}{prefix}{name} is null; give a value, or leave it out")
            parser.add_argument(f"--{name}", type=hints[name])
        elif not has_default:  # both are dataclasses.MISSING
            raise UserError(f"{where}{prefix}{name} is missing")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            leaves = parser.parse_object({key: raw[key] for key in raw if key not in values})
        return schema(**values, **{key: leaves[key] for key in raw if key not in values})
    except Exception as error:  # jsonargparse raises several kinds, all about the settings
        cause = error.__cause__ if isinstance(error.__cause__, UserError) else error
        text = one_line(cause).replace('Parser key "', f'Parser key "{prefix}')
        raise UserError(f"{where}{text}") from None


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one; of two values the one above counts."""
    both = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(both.get(key), Mapping):
            value = overlaid(both[key], value)
        both[key] = value
    return both


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
